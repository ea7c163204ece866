"""When checkpoints are written, and which are kept."""

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L

from gear_lightning.background import WRITER
from gear_lightning.callbacks.background_saves import BackgroundSaves
from gear_lightning.errors import UserError
from gear_lightning.loggers import MetricsFile


class IterationCheckpoint(BackgroundSaves):
    """Lightning's ModelCheckpoint that also saves after the last iteration, whatever ``every_n_epochs``, and replaces
    the ``last.ckpt`` link in one go, so that a kill leaves the old one or the new one.

    Of the checkpoints that ``save_top_k`` would remove, the newest stays: what is left if the last one is damaged.
    A checkpoint also holds the iteration's row of metrics, which Lightning logs after it: a run killed in between lacks
    nothing when it goes on.

    Args:
        background: write from a copy in CPU memory while training goes on. False: training waits for every file.
        min_interval: least seconds from the start of a save to the next one; a checkpoint that is due earlier is left
            to a later iteration. 0: save whenever one is due. Null: as long as training waits for saves for less than 5
            % of the time, and files are written for less than 25 %; every iteration where a checkpoint has less than
            256 MiB, or where ``every_n_epochs``, ``every_n_train_steps`` or ``train_time_interval`` is given. The state
            at the end of a run is always saved.

    Raises:
        UserError: an option out of range.
    """

    def __init__(self, *args: Any, background: bool = True, min_interval: float | None = None, **options: Any):
        super().__init__(*args, **options)
        if min_interval is not None and not 0 <= min_interval < math.inf:
            raise UserError(f"checkpoint.min_interval={min_interval} must be at least 0, and finite")
        self.background = background
        self.min_interval = min_interval
        cadence = ("every_n_epochs", "every_n_train_steps", "train_time_interval")
        self.asked = any(options.get(name) is not None for name in cadence)

    _spare: str | None = None
    _row: dict[str, float] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._row is None:
            return
        metrics = {name: value for name, value in self._row.items() if name != "step"}
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.log_metrics(metrics, int(self._row["step"]))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # on all ranks, for it communicates
        row = trainer._logger_connector.metrics["log"]  # trainer.logged_metrics also has those of earlier iterations
        self._row = {name: float(value) for name, value in row.items()}
        super().on_train_epoch_end(trainer, pl_module)
        over = trainer.current_epoch + 1 == trainer.max_epochs or trainer.should_stop
        if over and self._should_save_on_train_epoch_end(trainer) and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Any]) -> None:
        over = trainer.current_epoch + 1 == trainer.max_epochs or trainer.should_stop
        if over or self.monitor is not None or not self.postponed(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        spare, self._spare = self._spare, filepath
        if spare is not None and spare != filepath:
            super()._remove_checkpoint(trainer, spare)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "spare": self._spare, "row": self._row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up which checkpoints there are. Those that newer ones replace are deleted, by the paths in the
        checkpoint: a checkpoint that someone else wrote must not name other files."""
        mine = dict(state_dict)
        spare, self._row = mine.pop("spare", None), mine.pop("row", None)
        super().load_state_dict(mine)
        self._spare = spare if spare and self._ours(spare) else None
        self.best_model_path, self.kth_best_model_path, self.last_model_path = (
            path if self._ours(path) else ""
            for path in (self.best_model_path, self.kth_best_model_path, self.last_model_path)
        )
        self.best_k_models = {path: score for path, score in self.best_k_models.items() if self._ours(path)}

    def _ours(self, path: str) -> bool:
        place = Path(path)
        return (
            self.dirpath is not None
            and place.suffix == ".ckpt"
            and place.parent.resolve() == Path(self.dirpath).resolve()
        )

    @staticmethod
    def _link_checkpoint(trainer: Any, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero:
            WRITER.then(partial(_link, filepath, linkpath))
        trainer.strategy.barrier()


def _link(filepath: str, linkpath: str) -> None:
    fresh = f"{linkpath}.new"
    Path(fresh).unlink(missing_ok=True)
    os.symlink(os.path.relpath(filepath, os.path.dirname(linkpath)), fresh)
    os.replace(fresh, linkpath)
