"""Write checkpoints and decide which to keep."""

import math
import os
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from gear_lightning.callbacks.background_saves import BackgroundSaves
from gear_lightning.errors import UserError
from gear_lightning.learning.iterations import last_iteration
from gear_lightning.runs.background import WRITER
from gear_lightning.runs.checkpoint_files import (
    FileNameValues,
    check_cadence,
    check_choice,
    check_filename,
    check_places,
    put_aside,
)
from gear_lightning.runs.checkpoints import known_checkpoints
from gear_lightning.runs.loggers import MetricsFile
from gear_lightning.runs.monitor import (
    Mode,
    Monitor,
    check_monitor,
    has_evaluations,
    measured,
    mode_of,
    own_callbacks_only,
)


class IterationCheckpoint(BackgroundSaves):
    """Writes checkpoints and decides which to keep.

    It always keeps two: the newest, to which ``last.ckpt`` links, and the one before it, in case the newest is damaged
    on the disk. ``save_top_k`` keeps further ones.

    It writes a checkpoint whenever one is due and whenever the run ends: by the number of iterations or steps, the
    time limit, early stopping or `Health`. A checkpoint replaces a file of the same name atomically: a kill leaves
    either the complete old file or the complete new one. A checkpoint at the end of an iteration also holds the
    iteration's row of metrics, which Lightning logs later: a run that is killed in between resumes without losing it.

    Args:
        dirpath: folder of the checkpoints. Null: ``checkpoints`` in the run directory.
        filename: name of a checkpoint without its suffix. ``{epoch}`` is the iteration, ``{step}`` the number of
            optimizer steps, other names in braces are metrics. If ``{step}`` is missing, the name of a checkpoint in
            the middle of an iteration gets the number of steps appended.
        monitor: metric that ranks checkpoints; the ``save_top_k`` best are kept. Only a value measured in the
            checkpoint's own iteration counts: ``val/...`` needs an evaluation in that iteration, and a checkpoint in
            the middle of an iteration has no value. Null: no ranking.
        verbose: report the rank of each checkpoint.
        save_last: create the link ``last.ckpt``; ``true`` and ``link`` mean the same.
        save_top_k: number of best checkpoints to keep if there is a ``monitor``. Without one, 0 and 1 keep only the
            newest two. -1: keep all.
        save_on_exception: rejected, because the state after an error may be half an update.
        save_weights_only: leave out the optimizer. A run cannot resume from such a checkpoint. A run that is asked to
            stop writes a full checkpoint anyway.
        mode: whether the largest (``max``) or the smallest (``min``) value of ``monitor`` is the best. Null: ``max``
            for ``val/success``, ``val/reward``, ``train/success`` and ``train/reward``; required for any other metric.
        auto_insert_metric_name: put the names in ``filename`` before their values.
        every_n_train_steps: optimizer steps between two checkpoints, also in the middle of an iteration.
        train_time_interval: minimum time between two checkpoints, also in the middle of an iteration; with a
            ``monitor`` only at the end of an iteration.
        every_n_epochs: iterations between two checkpoints. Null: 1, if neither of the other two intervals is given. 0:
            no checkpoint before the run ends.
        save_on_train_epoch_end: false: save only after iterations that had an evaluation.
        enable_version_counter: if a file with the new checkpoint's name exists, keep it and append a number to the new
            name. False: an iteration that is repeated after a kill replaces its file.
        background: write from a copy in CPU memory while training continues. False: training waits for every file.
        min_interval: minimum seconds from the start of a save to the start of the next one; a checkpoint that is due
            earlier is postponed to a later iteration. 0: save whenever a checkpoint is due. Null: postpone so that
            training waits for saves for less than 5 % of the time and files are written for less than 25 % of the time;
            never postpone if a checkpoint is smaller than 256 MiB or if ``every_n_epochs``, ``every_n_train_steps`` or
            ``train_time_interval`` is given. The state at the end of a run, and a checkpoint whose ``monitor`` value is
            among the best, are always saved.

    Raises:
        UserError: options contradict one another, have no effect, or are out of range.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: Mode | None = None,
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
        background: bool = True,
        min_interval: float | None = None,
    ):
        check_choice(monitor, mode, save_top_k, save_on_exception)
        check_cadence(every_n_train_steps, every_n_epochs, train_time_interval, save_on_train_epoch_end)
        super().__init__(
            dirpath,
            filename,
            monitor,
            verbose,
            save_last="link" if save_last else save_last,
            save_top_k=1 if save_top_k == 0 else save_top_k,
            save_weights_only=save_weights_only,
            mode="min" if monitor is None else mode_of("checkpoint.mode", monitor, mode),
            auto_insert_metric_name=auto_insert_metric_name,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=save_on_train_epoch_end,
            enable_version_counter=enable_version_counter,
        )
        check_filename(filename, lambda: self._format_checkpoint_name(filename, {}, None, auto_insert_metric_name))
        if min_interval is not None and not 0 <= min_interval < math.inf:
            raise UserError(f"checkpoint.min_interval={min_interval}: must be at least 0 and finite")
        self.background = background
        self.min_interval = min_interval
        self.asked = any(value is not None for value in (every_n_epochs, every_n_train_steps, train_time_interval))
        self._monitor = None if monitor is None else Monitor("checkpoint.monitor", monitor)
        self._newest = self._spare = ""  # paths
        self._files: list[str] = []  # paths that this callback has written and not removed yet
        self._saved = True  # whether a checkpoint holds the newest state
        self._evaluation_due = False  # whether the checkpoint that the run resumes from lacks its evaluation
        self._row: dict[str, float] | None = None

    @property
    def state_key(self) -> str:
        return type(self).__qualname__  # does not depend on the options, because a resume may change them

    # -- when to save -------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._check_run(trainer)
        self._saved = True
        if self._row is not None:
            metrics = {name: value for name, value in self._row.items() if name != "step"}
            for logger in trainer.loggers:
                if isinstance(logger, MetricsFile):
                    logger.log_metrics(metrics, int(self._row["step"]))
        if trainer.ckpt_path is not None:
            self._check_files(trainer)
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if self._evaluation_due and not data.evaluation_due:  # the missing evaluation has just run
            self._save_iteration(trainer, trainer.current_epoch - 1, {**(self._row or {}), **measured(trainer)})
        self._evaluation_due = False

    def _check_run(self, trainer: L.Trainer) -> None:
        evaluates, resumes = has_evaluations(trainer), trainer.ckpt_path is not None
        if self.monitor is not None:
            own = own_callbacks_only([*trainer.callbacks, trainer.lightning_module])  # pyright: ignore
            check_monitor("checkpoint.monitor", self.monitor, evaluates or resumes, own)
        check_places(self._save_on_train_epoch_end, evaluates or resumes)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._saved = False
        if batch_idx + 1 >= trainer.num_training_batches or not self._writes(trainer):
            return  # on_train_epoch_end comes next and saves
        stepped = pl_module.steps_after(batch_idx)
        over = stepped and 0 <= trainer.max_steps <= trainer.global_step
        due = (stepped and self._due_by_steps(trainer)) or (self.monitor is None and self._due_by_time(trainer))
        if over or (due and not self.postponed(trainer)):
            self._save(trainer, self._path(trainer, trainer.current_epoch, {}, middle=True))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        # on all ranks, because this communicates
        row = trainer._logger_connector.metrics["log"]  # trainer.logged_metrics also has earlier ones
        self._row = {name: float(value) for name, value in row.items()}
        values = measured(trainer)
        if self._saved or not self._writes(trainer):
            return  # max_steps has ended the run in the middle of the iteration
        value = None if self._monitor is None else self._monitor.value(trainer, values)
        missing = self._monitor.missing(trainer) if self._monitor is not None and value is None else None
        due = self._due_by_epochs(trainer, bool(pl_module.evaluated)) or self._due_by_steps(trainer)
        due |= self._due_by_time(trainer)
        due = due and (self._among_the_best(value) or not self.postponed(trainer))
        if due or missing or pl_module.failure is not None or last_iteration(trainer):
            self._save(trainer, self._path(trainer, trainer.current_epoch, values), value)
        if missing:
            raise UserError(missing)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not self._saved and self._writes(trainer):  # a callback that runs after this one has ended the run
            self._save_iteration(trainer, trainer.current_epoch - 1, {**(self._row or {}), **pl_module.evaluated})
        self._settle(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do nothing: the checkpoint is written at the end of the iteration, together with its row of metrics."""

    def _writes(self, trainer: L.Trainer) -> bool:
        return trainer.state.fn == TrainerFn.FITTING and not trainer.fast_dev_run and not trainer.sanity_checking  # pyright: ignore

    def _due_by_steps(self, trainer: L.Trainer) -> bool:
        return self._every_n_train_steps >= 1 and trainer.global_step % self._every_n_train_steps == 0

    def _due_by_epochs(self, trainer: L.Trainer, evaluated: bool) -> bool:
        due = self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        return due and (evaluated or self._save_on_train_epoch_end is not False)

    def _due_by_time(self, trainer: L.Trainer) -> bool:
        """Return whether `train_time_interval` has passed. All ranks must call it, because their clocks differ."""
        if self._train_time_interval is None:
            return False
        since = time.monotonic() - (self._last_time_checked or 0.0)
        return trainer.strategy.broadcast(since >= self._train_time_interval.total_seconds())

    # -- what to keep -------------------------------------------------------------------------------------------------

    def _save_iteration(self, trainer: L.Trainer, iteration: int, values: dict[str, Any]) -> None:
        value = None if self._monitor is None else self._monitor.value(trainer, values)
        self._save(trainer, self._path(trainer, iteration, values), value)

    def _save(self, trainer: L.Trainer, path: str, value: float | None = None) -> None:
        """Write the newest state and remove checkpoints that are no longer kept.

        Args:
            path: path of the checkpoint.
            value: value of the monitored metric; None if there is none.
        """
        if path != self._newest:
            self._newest, self._spare = path, self._newest
        self._rank(path, value)
        if self.save_top_k != -1:
            self._files = [*(file for file in self._files if file != path), path]
        if self.save_last:
            self.last_model_path = self._last
        self._save_checkpoint(trainer, path)
        self._saved, self._last_time_checked = True, time.monotonic()
        self.point_last_to(trainer, path)
        for file in list(self._files):
            kept = {self._newest, self._spare, *self.best_k_models}
            if file not in kept and self._should_remove_checkpoint(trainer, file, path):
                self._remove_checkpoint(trainer, file)
                self._files.remove(file)

    def _among_the_best(self, value: float | None) -> bool:
        """Return whether a checkpoint with this value would be one of the best that are kept."""
        sign = 1 if self.mode == "max" else -1
        known = sorted((sign * float(score) for score in self.best_k_models.values()), reverse=True)
        place = max(self.save_top_k, 1)  # -1 keeps all; then only a new best value counts
        return value is not None and (len(known) < place or sign * value > known[place - 1])

    def _rank(self, path: str, value: float | None) -> None:
        """Add a checkpoint to the best ones and drop the worst if there are more than `save_top_k`."""
        self.best_k_models.pop(path, None)
        if self.monitor is None:
            self.best_model_path = path
            return
        if value is None:
            return
        self.current_score = self.best_k_models[path] = torch.tensor(value)
        ranked = sorted(self.best_k_models, key=lambda p: float(self.best_k_models[p]), reverse=self.mode == "max")
        for worst in ranked[self.save_top_k :] if self.save_top_k != -1 else ():  # of equal values, drop the later
            del self.best_k_models[worst]
        self.best_model_path = ranked[0]
        self.best_model_score = self.best_k_models[ranked[0]]
        if self.verbose:
            place = ranked.index(path) + 1
            rank_zero_info(f"{Path(path).name}: {self.monitor}={value:g}, rank {place} of the best checkpoints")

    def _path(self, trainer: L.Trainer, iteration: int, values: dict[str, Any], middle: bool = False) -> str:
        step = trainer.global_step
        known = FileNameValues({**values, "epoch": torch.tensor(iteration), "step": torch.tensor(step)})
        steps = f"-step={step:05d}" if middle and "{step" not in (self.filename or "{step}") else ""

        def numbered(version: int | None) -> str:
            return self.format_checkpoint_name(known, (self.filename or "{epoch}-{step}") + steps, version)

        path, version = numbered(None), self.STARTING_VERSION
        while self._enable_version_counter and path != self._newest and self.file_exists(path, trainer):
            path, version = numbered(version), version + 1
        return trainer.strategy.broadcast(path)

    # -- files --------------------------------------------------------------------------------------------------------

    @property
    def _last(self) -> str:
        return self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)

    def point_last_to(self, trainer: L.Trainer, path: str | Path) -> None:
        """Make ``last.ckpt`` a link to a checkpoint if `save_last` is set. All ranks must call it."""
        if self.save_last:
            self._link_checkpoint(trainer, str(path), self._last)

    @staticmethod
    def _link_checkpoint(trainer: Any, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero:
            WRITER.then(partial(_link, filepath, linkpath))
        trainer.strategy.barrier()

    def _check_files(self, trainer: L.Trainer) -> None:
        """Compare the recorded checkpoints with the files in the folder when a run resumes.

        Forget files that no longer exist, move checkpoints of an abandoned continuation to another folder, and link
        ``last.ckpt`` to the newest of the others. All ranks must call it.
        """
        assert self.dirpath is not None
        folder, steps = Path(self.dirpath), trainer.global_step
        if trainer.is_global_zero:
            known = known_checkpoints(folder)
            if Path(str(trainer.ckpt_path)).is_file():  # not `last`, which is the most advanced valid one
                put_aside([path for path, manifest in known if manifest["order"][0] > steps], folder)
            newest = next((path for path, manifest in known if manifest["order"][0] <= steps), None)
        else:
            newest = None
        there, newest = trainer.strategy.broadcast(([str(path) for path in folder.glob("*.ckpt")], newest))
        if newest is not None:
            self.point_last_to(trainer, newest)
        self._files = [file for file in self._files if file in there]
        self._newest, self._spare = (path if path in there else "" for path in (self._newest, self._spare))
        self.best_k_models = {path: score for path, score in self.best_k_models.items() if path in there}

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        mine = {"mode": self.mode, "newest": self._newest, "spare": self._spare, "files": self._files, "row": self._row}
        return {**super().state_dict(), **mine}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._evaluation_due = trainer.datamodule.evaluation_due  # pyright: ignore[reportAttributeAccessIssue]
        states = checkpoint["callbacks"]
        for key in [key for key in states if key.startswith(f"{self.state_key}{{")]:  # an earlier version
            states.setdefault(self.state_key, states[key])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the list of existing checkpoints.

        Listed checkpoints are deleted later, when newer ones replace them. Only their file names are used, within this
        folder, so that a checkpoint from an untrusted source cannot name files in other folders.
        """
        state = state_dict
        self._row = state.get("row")
        self._newest = self._here(state.get("newest", state["best_model_path"]))
        self._spare = self._here(state.get("spare") or "")
        self._files = [self._here(file) for file in state.get("files", [self._newest, self._spare])]
        best = {self._here(path): torch.as_tensor(score) for path, score in state["best_k_models"].items()}
        if state["monitor"] == self.monitor and state.get("mode", self.mode) == self.mode:
            self.best_k_models = best
            self.best_model_path = self._here(state["best_model_path"])
            self.best_model_score = state["best_model_score"]
            return
        self._files = [file for file in self._files if file not in best]
        if best:
            names = ", ".join(sorted(Path(path).name for path in best))
            rank_zero_warn(f"Checkpoints are no longer ranked by {state['monitor']}; {names} are kept.")

    def _here(self, path: str) -> str:
        """Return the path of the file of that name in this folder; empty if it is not the name of a checkpoint."""
        name = Path(path).name
        return str(Path(str(self.dirpath)) / name) if name.endswith(self.FILE_EXTENSION) else ""


def _link(filepath: str, linkpath: str) -> None:
    fresh = f"{linkpath}.new"
    Path(fresh).unlink(missing_ok=True)
    os.symlink(os.path.relpath(filepath, os.path.dirname(linkpath)), fresh)
    os.replace(fresh, linkpath)
