"""Write checkpoints while training continues, and postpone them if they would take too much time."""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from weakref import proxy

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from gear_lightning.runs.background import WRITER
from gear_lightning.runs.checkpoints import fail_on_all_ranks, remove_unfinished

SMALL = 256 * 2**20  # bytes; a smaller checkpoint is never postponed
STALL = 0.05  # largest share of the time for which training may wait for saves
WRITING = 0.25  # largest share of the time during which a checkpoint may be written


class BackgroundSaves(ModelCheckpoint):
    """The part of `IterationCheckpoint` that writes files: from a copy, in a thread of rank 0, one file at a time.

    A save waits for the previous save. The link ``last.ckpt``, the notification of loggers and the removal of older
    files wait until the manifest of the new file exists. An error in the thread ends the run on all ranks: before the
    next save, before the next iteration's update, or at the end of training.
    """

    background: bool
    min_interval: float | None
    asked: bool  # whether the user has set when to save

    _loggers_pending: bool = False  # whether loggers have not been notified of the newest file
    _began: float | None = None  # when the newest save of this process began
    _blocked: float = 0.0  # seconds for which training waited for that save

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero and self.dirpath is not None:
            remove_unfinished(Path(self.dirpath))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._settle(trainer, wait=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._settle(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Wait for the file that is being written. Use no collective, because other ranks may be anywhere."""
        super().on_exception(trainer, pl_module, exception)
        WRITER.wait()
        error = WRITER.take_error()
        if error is not None and error is not exception:
            print(f"checkpoint: {error}", file=sys.stderr)

    def _settle(self, trainer: L.Trainer, wait: bool = True) -> None:
        WRITER.settle(wait)
        self._notify_loggers(trainer)

    def _notify_loggers(self, trainer: L.Trainer) -> None:
        """Notify the loggers of a new checkpoint after it is written, because they may read the file."""
        if self._loggers_pending and not WRITER.busy and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))
        self._loggers_pending &= WRITER.busy

    # -- files --------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        started = time.monotonic()
        self._settle(trainer)
        with fail_on_all_ranks(trainer.strategy), WRITER.saving(self.background):
            trainer.save_checkpoint(filepath, self.save_weights_only)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        self._began, self._blocked = started, time.monotonic() - started
        self._loggers_pending = True
        self._notify_loggers(trainer)

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        WRITER.then(partial(super()._remove_checkpoint, trainer, filepath))

    # -- how often ----------------------------------------------------------------------------------------------------

    def postponed(self, trainer: L.Trainer) -> bool:
        """Return whether to postpone a checkpoint that is due to a later iteration.

        Rank 0 decides. All ranks must call it.
        """
        return trainer.strategy.broadcast(trainer.is_global_zero and self._too_soon(time.monotonic()))

    def _too_soon(self, now: float) -> bool:
        if self._began is None:
            return False
        if self.min_interval is not None:
            return now - self._began < self.min_interval
        if self.asked or WRITER.size < SMALL:
            return False
        return WRITER.busy or now - self._began < max(self._blocked / STALL, WRITER.seconds / WRITING)
