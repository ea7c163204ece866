"""Optimizer steps without a finite gradient, or without any gradient, are skipped.

The decision is made once the gradient of the step is complete, before it is clipped, and is the same on all ranks. A
skipped step changes nothing: no weight, no optimizer state (Adam's momentum would move the weights even with a gradient
of 0, and so would weight decay), no average of the teacher. It still counts as an optimizer step of the trainer.
"""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from ..distributed.sharding import full, local
from ..errors import UserError
from ..runs.finite import all_finite


class StepGuard(L.LightningModule):
    """Mixin of a module that decides whether an optimizer step is taken.

    Attributes:
        gradient_norm: 2-norm of the whole gradient of the latest optimizer step, before clipping; infinite if the
            gradient is not finite on some rank.
        step_taken: whether that step was taken.
        skipped_in_a_row: number of latest optimizer steps in a row that were skipped because of non-finite gradients.
    """

    policy: Any
    gradient_norm: float = math.nan
    step_taken: bool = True
    skipped_in_a_row: int = 0

    @property
    def step_skipped(self) -> bool:
        """Whether the latest optimizer step was skipped because its gradient is not finite."""
        return not self.step_taken and not math.isfinite(self.gradient_norm)

    def steps_after(self, batch_idx: int) -> bool:
        """Return whether an optimizer step follows this micro-batch.

        DeepSpeed counts micro-batches itself, and Lightning calls `optimizer_step` for every one.
        """
        return (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Decide on the step, then clip. Lightning calls this after the callbacks' gradient hooks, before the step."""
        if self._engine is None:
            self._decide(self._norm_over_ranks())
            if not self.step_taken:  # optimizers do not change parameters without a gradient
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None
                return
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, epoch: int, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(epoch, batch_idx, *args, **kwargs)
        if self._engine is not None and self.steps_after(batch_idx):
            # DeepSpeed checks the norm over all ranks itself: see also `zero_state.keep_idle_steps_idle`
            overflow, norm = self._engine.optimizer.overflow, self._engine.get_global_grad_norm()
            self._decide(math.inf if overflow else float(norm))

    def check_steps(self, most: int) -> None:
        """Stop a run whose optimizer steps are all skipped.

        Raises:
            UserError: on all ranks, if the latest ``most`` optimizer steps were skipped.
        """
        if self.skipped_in_a_row >= most:
            raise UserError(
                f"the gradients of {self.skipped_in_a_row} optimizer steps in a row are not finite, the last one in "
                f"iteration {self.trainer.current_epoch}; the weights are those before these steps. Lower the learning "
                "rate, clip gradients (trainer.gradient_clip_val) or use a wider trainer.precision"
            )

    @property
    def _engine(self) -> Any:
        """DeepSpeed's engine, which holds the gradients; None with other strategies."""
        engine: Any = self.trainer.strategy.model
        return engine if hasattr(engine, "get_global_grad_norm") else None

    def _norm_over_ranks(self) -> float:
        """Return the norm of the gradient; infinite on all ranks if it is not finite on one. All ranks must call it."""
        grads = [p.grad for p in self.policy.parameters() if p.grad is not None]
        norm = full(nn.utils.get_total_norm(grads)).float().nan_to_num(math.inf, math.inf, math.inf)
        return float(self.trainer.strategy.reduce(norm.to(self.device), reduce_op="max"))

    def _decide(self, norm: float) -> None:
        self.gradient_norm, self.step_taken = norm, 0 < norm < math.inf
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if self.step_skipped else 0
        if not self.step_skipped:
            return
        broken = torch.tensor(float(not all_finite(map(local, self.policy.parameters()))), device=self.device)
        if self.trainer.strategy.reduce(broken, reduce_op="max"):
            raise UserError(
                f"the policy has weights that are not finite after {self.trainer.global_step} optimizer steps, and no "
                "further step can repair them. Resume from the newest checkpoint (--ckpt_path last) with a lower "
                "learning rate, gradient clipping (trainer.gradient_clip_val) or a wider trainer.precision"
            )
        rank_zero_warn(
            f"The gradient of optimizer step {self.trainer.global_step + 1} is not finite: the step is skipped, and "
            "weights, optimizer and teacher do not change. train/skipped_steps counts such steps."
        )
