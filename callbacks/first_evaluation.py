"""Evaluates the policy before its first update, and again where a stop has cut an evaluation short."""

from typing import Any

import lightning as L

from gear_lightning.errors import Stopped


class FirstEvaluation(L.Callback):
    """Runs the validation once when training starts from the beginning, so that every curve has its point 0; and, when
    training goes on, the validation that did not come to its end before.

    Inside the fit, and not as a validation before it: a strategy that spreads the weights sets its model up once.

    Args:
        enabled: whether to run the one before the first update.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.metrics: dict[str, float] = {}
        self._extended = False

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        due = trainer.datamodule.evaluation_due  # pyright: ignore[reportAttributeAccessIssue]
        if due and (trainer.max_epochs or -1) > 0:
            trainer.fit_loop.max_epochs += 1  # pyright: ignore[reportOperatorIssue]
            self._extended = True  # Lightning starts nothing where no iteration is left

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._extended:
            self._extended = False
            trainer.fit_loop.max_epochs -= 1  # pyright: ignore[reportOperatorIssue]
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
