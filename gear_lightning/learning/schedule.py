"""The optimizer and its learning rate schedule."""

from typing import Any

import lightning as L
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..errors import UserError
from ..runs.monitor import Monitor, measured, mode_of
from .hyperparameters import FreshOptimizer
from .iterations import Iterations


def plateau_monitor(scheduler: Any) -> str | None:
    """Return the metric that a schedule follows; None for a schedule that counts steps.

    Raises:
        UserError: the schedule names no metric, or its mode does not fit the metric.
    """
    if not isinstance(scheduler, ReduceLROnPlateau):
        return None
    monitor = getattr(scheduler, "monitor", None)
    if monitor is None:
        raise UserError(
            "model.lr_scheduler: ReduceLROnPlateau needs the name of a metric; use --model.lr_scheduler "
            "lightning.pytorch.cli.ReduceLROnPlateau --model.lr_scheduler.monitor val/success "
            "--model.lr_scheduler.mode max"
        )
    mode_of("model.lr_scheduler.mode", monitor, scheduler.mode)  # pyright: ignore[reportArgumentType]
    return monitor


class Schedule(Iterations, L.LightningModule):
    """Mixin of a module that creates the optimizer and steps the schedule.

    Lightning steps schedules after every optimizer step. This class steps ``ReduceLROnPlateau`` at the end of the
    iterations that have measured its metric, before their checkpoint is written: Lightning would step it after the
    checkpoint, and also with the value of an earlier evaluation.
    """

    policy: Any
    optimizer: Any
    lr_scheduler: Any
    _monitor: Monitor | None = None

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.policy.parameters() if p.requires_grad])
        if self.trainer.precision == "bf16-mixed" and hasattr(optimizer, "_step_supports_amp_scaling"):
            # Lightning does not clip the gradients of a fused optimizer, which might unscale them again; bfloat16 has
            # no scaler (https://github.com/Lightning-AI/pytorch-lightning/issues/21435)
            setattr(optimizer, "_step_supports_amp_scaling", False)  # noqa: B010
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        name = plateau_monitor(scheduler)
        self._monitor = None if name is None else Monitor("model.lr_scheduler.monitor", name)
        schedule = {"scheduler": scheduler, "interval": "step" if name is None else "epoch", "reduce_on_plateau": False}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def followed_metric(self) -> str | None:
        """Create the optimizer and its schedule to check them, and return the metric that the schedule follows.

        The result is None if the schedule counts steps.

        Raises:
            UserError: they cannot be created with the configured options, or the metric is not configured.
        """
        fresh = FreshOptimizer(self.optimizer, self.lr_scheduler, [torch.zeros(1)])
        return plateau_monitor(fresh.scheduler)

    def check_optimizer(self, precision: str) -> None:
        """Make the optimizer on trial, and look at whether it can take steps here.

        Args:
            precision: ``trainer.precision``.

        Raises:
            UserError: it cannot.
        """
        optimizer = FreshOptimizer(self.optimizer, None, [torch.zeros(1)]).optimizer
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UserError(
                "model.optimizer=LBFGS computes the loss several times in a step, and a step here is the sum of "
                "micro-batches, computed once; use another optimizer"
            )
        eps = [group["eps"] for group in optimizer.param_groups if isinstance(group.get("eps"), float)]
        if precision == "16-true" and any(torch.tensor(value, dtype=torch.float16) == 0 for value in eps):
            raise UserError(
                f"model.optimizer: eps={min(eps):g} is 0 in float16, and a gradient of 0 would be divided by it; give "
                "model.optimizer.eps of at least 1e-7, or use trainer.precision=bf16-true"
            )

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if self._monitor is None:
            super().lr_scheduler_step(scheduler, metric)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self._monitor is None:
            return
        if not self.step_plateau(measured(self.trainer)) and (missing := self._monitor.missing(self.trainer)):
            self.fail(UserError(missing))

    def step_plateau(self, values: dict[str, Any]) -> bool:
        """Step a schedule that follows a metric. All ranks must call it.

        Args:
            values: newly measured metrics.

        Returns:
            Whether the schedule's metric is among them.
        """
        value = None if self._monitor is None else self._monitor.value(self.trainer, values)
        if value is not None:
            self.trainer.lr_scheduler_configs[0].scheduler.step(value)  # pyright: ignore[reportArgumentType]
        return value is not None
