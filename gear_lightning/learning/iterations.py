"""Iterations: a run ends only at the end of one, and each records the metrics measured during it."""

from typing import Any

import lightning as L

from ..errors import UserError


class Iterations(L.LightningModule):
    """Mixin of a module that never stops in the middle of an iteration.

    If a callback sets ``trainer.should_stop`` between two micro-batches, the run stops at the end of the iteration.

    Attributes:
        evaluated: metrics of this iteration's evaluation; empty if there was none, or if it was interrupted.
        failure: error that the run raises after this iteration and its checkpoint.
    """

    failure: UserError | None = None
    _stops: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.evaluated: dict[str, Any] = {}

    def fail(self, failure: UserError) -> None:
        """Raise an error once the iteration has ended and its checkpoint is saved. All ranks must call it."""
        self.failure = failure
        self.trainer.should_stop = True

    def on_fit_start(self) -> None:
        self.failure, self._stops = None, False

    def _defer_stop(self) -> None:
        self._stops |= self.trainer.should_stop
        self.trainer.should_stop = False

    def on_train_epoch_start(self) -> None:
        if self.failure is not None:  # trainer.min_epochs or min_steps kept the run from stopping
            raise self.failure
        self.evaluated = {}
        self._defer_stop()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 < self.trainer.num_training_batches:
            self._defer_stop()

    def on_train_epoch_end(self) -> None:
        self.trainer.should_stop |= self._stops
        self._stops = False

    def on_validation_end(self) -> None:
        trainer: Any = self.trainer
        if not trainer.sanity_checking and not trainer.datamodule.evaluation_due:
            self.evaluated = dict(trainer._logger_connector.metrics["callback"])

    def on_train_end(self) -> None:
        if self.failure is not None:
            raise self.failure


def at_a_limit(trainer: Any) -> bool:
    """Return whether the run has reached its limit of iterations or steps."""
    done, most = trainer.fit_loop.epoch_progress.current.processed, trainer.fit_loop.max_epochs
    return 0 <= (-1 if most is None else most) <= done or 0 <= trainer.max_steps <= trainer.global_step


def last_iteration(trainer: Any) -> bool:
    """Return whether the iteration that is about to end is the last one."""
    return at_a_limit(trainer) or (trainer.should_stop and trainer.fit_loop._can_stop_early)
