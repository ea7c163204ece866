"""Evaluates the policy before its first update."""

from typing import Any

import lightning as L


class FirstEvaluation(L.Callback):
    """Runs the validation once when training starts from the beginning, so that every curve has its point 0.

    Inside the fit, and not as a validation before it: a strategy that spreads the weights sets its model up once.

    Args:
        enabled: whether to.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.metrics: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if not self.enabled or trainer.global_step or trainer.current_epoch or data.val_tasks is None:
            return
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
