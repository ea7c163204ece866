"""Evaluate the policy before its first update, and repeat an evaluation that a stop interrupted."""

from typing import Any

import lightning as L

from gear_lightning.errors import Stopped
from gear_lightning.runs.monitor import has_evaluations


class FirstEvaluation(L.Callback):
    """Runs the validation before the first update of a fresh run, and an interrupted validation when a run resumes.

    The first validation gives every curve a value at step 0. It runs inside ``fit`` instead of ``Trainer.validate``,
    because a strategy that shards the weights sets up its model once.

    Args:
        enabled: whether to run the validation before the first update.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.metrics: dict[str, float] = {}
        self._limits: tuple[int | None, int] | None = None

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        data.evaluation_due &= has_evaluations(trainer)
        if data.evaluation_due:
            loop = trainer.fit_loop
            self._limits = loop.max_epochs, loop.epoch_loop.max_steps
            # otherwise Lightning does not start if no iteration is left
            loop.max_epochs = loop.epoch_loop.max_steps = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._limits is not None:
            trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = self._limits
            self._limits = None
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        fresh = self.enabled and not trainer.global_step and not trainer.current_epoch
        if data.val_tasks is None or not (fresh or data.evaluation_due):
            return
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        if data.evaluation_due:
            raise Stopped
        if fresh:
            self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        else:
            pl_module.step_plateau(pl_module.evaluated)  # as at the end of the iteration that lacked its evaluation
