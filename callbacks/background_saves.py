"""Checkpoints that are written while training goes on, and no more often than that costs little."""

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

SMALL = 256 * 2**20  # bytes of a checkpoint that is never too large to be written after an iteration
STALL = 0.05  # most of the time for which training waits while it saves
WRITING = 0.25  # most of the time for which a checkpoint is being written


class BackgroundSaves(ModelCheckpoint):
    """The part of `IterationCheckpoint` that writes: from a copy, in a thread of rank 0, one file at a time.

    A save waits for the one before it. What names a new file (``last.ckpt``, loggers) and the removal of older ones
    wait until its manifest is there. An error of the thread ends the run on all ranks: before the next save, before the
    next iteration's update, or at the end of training.
    """

    background: bool
    min_interval: float | None
    asked: bool  # whether the user has said when to save

    _untold: bool = False  # whether loggers have not heard of the newest file
    _began: float | None = None  # when the newest save of this process began
    _blocked: float = 0.0  # seconds for which training waited for it

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
        """Wait for the file that is being written. The other ranks may be anywhere."""
        super().on_exception(trainer, pl_module, exception)
        WRITER.wait()
        error = WRITER.take_error()
        if error is not None and error is not exception:
            print(f"checkpoint: {error}", file=sys.stderr)

    def _settle(self, trainer: L.Trainer, wait: bool = True) -> None:
        WRITER.settle(wait)
        self._tell_loggers(trainer)

    def _tell_loggers(self, trainer: L.Trainer) -> None:
        """Here, and not when a save begins: they may want the file."""
        if self._untold and not WRITER.busy and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))
        self._untold &= WRITER.busy

    # -- files --------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        started = time.monotonic()
        self._settle(trainer)
        with fail_on_all_ranks(trainer.strategy), WRITER.saving(self.background):
            trainer.save_checkpoint(filepath, self.save_weights_only)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        self._began, self._blocked = started, time.monotonic() - started
        self._untold = True
        self._tell_loggers(trainer)

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        WRITER.then(partial(super()._remove_checkpoint, trainer, filepath))

    # -- how often ----------------------------------------------------------------------------------------------------

    def postponed(self, trainer: L.Trainer) -> bool:
        """Whether a checkpoint that is due is left to a later iteration. Rank 0 decides; all ranks must call it."""
        return trainer.strategy.broadcast(trainer.is_global_zero and self._too_soon(time.monotonic()))

    def _too_soon(self, now: float) -> bool:
        if self._began is None:
            return False
        if self.min_interval is not None:
            return now - self._began < self.min_interval
        if self.asked or WRITER.size < SMALL:
            return False
        return WRITER.busy or now - self._began < max(self._blocked / STALL, WRITER.seconds / WRITING)
