"""Where a run may end, and what was measured since it was there the last time: the iteration."""

from typing import Any

import lightning as L

from ..errors import UserError


class Iterations(L.LightningModule):
    """The part of a module that keeps an iteration whole.

    A callback that sets ``trainer.should_stop`` between two micro-batches stops the run at the end of the iteration.

    Attributes:
        evaluated: metrics of this iteration's evaluation; empty where it had none, or was cut short.
        failure: why the run ends with an error after this iteration, and after its checkpoint.
    """

    failure: UserError | None = None
    _stops: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.evaluated: dict[str, Any] = {}

    def fail(self, failure: UserError) -> None:
        """End the run with an error, once the iteration is over and its state is saved. All ranks must call it."""
        self.failure = failure
        self.trainer.should_stop = True

    def on_fit_start(self) -> None:
        self.failure, self._stops = None, False

    def _put_off(self) -> None:
        self._stops |= self.trainer.should_stop
        self.trainer.should_stop = False

    def on_train_epoch_start(self) -> None:
        if self.failure is not None:  # trainer.min_epochs or min_steps has kept the run going
            raise self.failure
        self.evaluated = {}
        self._put_off()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 < self.trainer.num_training_batches:
            self._put_off()

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
    """Whether the iterations or steps that a run may take are done."""
    done, most = trainer.fit_loop.epoch_progress.current.processed, trainer.fit_loop.max_epochs
    return 0 <= (-1 if most is None else most) <= done or 0 <= trainer.max_steps <= trainer.global_step


def last_iteration(trainer: Any) -> bool:
    """Whether no iteration comes after the one that is at its end."""
    return at_a_limit(trainer) or (trainer.should_stop and trainer.fit_loop._can_stop_early)
