"""Write a file with the current state of a run."""

import errno
import json
import os
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L

from gear_lightning.callbacks.generation import GenerationCallback
from gear_lightning.distributed.collective import gather
from gear_lightning.errors import Stopped
from gear_lightning.runs.files import replace_text, try_to_write

STATUS, ATTEMPTS = "status.json", "attempts.jsonl"
EVERY = 2.0  # seconds between two writes within a phase


class RunStatus(L.Callback):
    """Writes ``RUN/status.json`` (phase, iteration, last checkpoint, failed rollouts by kind) during a run, and a line
    of ``RUN/attempts.jsonl`` at every start and end. `gear-lightning status RUN` shows both. It does not change
    training.
    """

    def __init__(self) -> None:
        self._failures: Counter[str] = Counter()  # over the whole run and all processes
        self._rollouts = 0
        self._status: dict[str, Any] = {}
        self._written = 0.0
        self._writes = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._trainer = trainer
        self._folder = Path(trainer.default_root_dir)
        self._writes = stage == "fit" and trainer.is_global_zero
        if not self._writes:
            return
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, GenerationCallback) and self._rolling not in callback.listeners:
                callback.listeners.append(self._rolling)
        who: dict[str, Any] = {"host": socket.gethostname(), "process": os.getpid(), "processes": trainer.world_size}
        if "SLURM_JOB_ID" in os.environ:
            who["slurm_job"] = os.environ["SLURM_JOB_ID"]
        self._attempt("start", **who)
        self._status = {"phase": "start-up", "started": time.time(), **who}
        self._write()

    # -- phases -------------------------------------------------------------------------------------------------------

    def _update(self, phase: str, *, now: bool = False, **more: Any) -> None:
        if self._writes:
            at = {"iteration": self._trainer.current_epoch, "optimizer_steps": self._trainer.global_step}
            self._status |= {"phase": phase, **at, **more}
            if now or time.time() - self._written > EVERY:
                self._write()

    def _rolling(self, stage: str, finished: int, rollouts: int, tokens: int) -> None:
        phase = "rollout" if stage == "fit" else "evaluation"
        self._update(phase, rollouts_done=f"{finished} of {rollouts}", now=finished == 0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._update("start-up", now=True, iterations=trainer.max_epochs)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._update("rollout", now=True)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._update("update", now=batch_idx == 0, micro_batch=f"{batch_idx + 1} of {trainer.num_training_batches}")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._update("evaluation", now=True)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._update("checkpoint", now=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stats = trainer.datamodule.stats  # pyright: ignore[reportAttributeAccessIssue]
        kinds = {kind: count for kind, count in sorted(stats.left_out.items()) if count}
        for failed, rollouts in gather((kinds, sum(stats.statuses.values()))):
            self._failures.update(failed)
            self._rollouts += rollouts
        self._update("end of the iteration", now=True, rollouts=self._rollouts, failures=dict(self._failures))

    # -- the end ------------------------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._update("finished", now=True, rollouts=self._rollouts, failures=dict(self._failures))
        self._attempt("end", how="finished")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        how = "stopped" if isinstance(exception, Stopped) else f"{type(exception).__name__}: {exception}"
        self._update("stopped" if isinstance(exception, Stopped) else "failed", now=True, why=how.splitlines()[0])
        self._attempt("end", how=how.splitlines()[0])

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": self._rollouts, "failures": dict(self._failures)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rollouts, self._failures = state_dict["rollouts"], Counter(state_dict["failures"])

    # -- files --------------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        self._written = time.time()
        text = json.dumps({**self._status, "time": self._written})
        try_to_write("status", lambda: replace_text(self._folder / STATUS, text))

    def _attempt(self, what: str, **more: Any) -> None:
        if self._writes:
            line = json.dumps({"what": what, "time": time.time(), **more})
            try_to_write("attempts", lambda: _append(self._folder / ATTEMPTS, line))


def _append(path: Path, line: str) -> None:
    content = (line + "\n").encode()
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(end)  # a partial line would make the file unreadable
            raise
