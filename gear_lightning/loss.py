"""The policy loss: the clipped surrogate with token-level advantages and explicit denominators."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .errors import UserError

LOG_RATIO_LIMIT = 20.0  # nats; as in verl. exp(89) overflows, and its gradient is then 0 * inf, also under the clip


def clipped_surrogate(
    logprobs: Float[Tensor, "batch seq"],
    old_logprobs: Float[Tensor, "batch seq"],
    advantages: Float[Tensor, "batch seq"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Float[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Loss per token, and where the clip took the gradient away.

    ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` with r the importance ratio (PPO, arXiv 1707.06347; separate
    bounds from DAPO, arXiv 2503.14476). ``dual_clip`` caps the loss at ``-dual_clip A`` where A < 0 (arXiv 1912.09729).
    The log-ratio is limited to plus and minus 20 nats, which also takes the gradient away.
    """
    log_ratio = logprobs - old_logprobs
    ratio = torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-ratio * advantages, -bounded * advantages)
    clipped = ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))
    clipped = clipped | ((advantages != 0) & (log_ratio.abs() > LOG_RATIO_LIMIT))
    if dual_clip is not None:
        cap = -dual_clip * advantages
        clipped = clipped | ((advantages < 0) & (loss > cap))
        loss = torch.where(advantages < 0, torch.minimum(loss, cap), loss)
    return loss, clipped


@dataclass(frozen=True)
class LossTerms:
    """A loss and what to log of it. ``clipped`` is the number of tokens without gradient for the clip."""

    loss: Float[Tensor, ""]
    clipped: Float[Tensor, ""]


class PolicyLoss(ABC):
    """An objective. Its value must be a sum over tokens divided by numbers that do not depend on the micro-batch."""

    @abstractmethod
    def __call__(
        self,
        logprobs: Float[Tensor, "batch seq"],
        old_logprobs: Float[Tensor, "batch seq"],
        advantages: Float[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
        *,
        step_tokens: Tensor,
        step_rollouts: Tensor,
    ) -> LossTerms:
        """This micro-batch's share of the loss of the optimizer step."""


@dataclass(frozen=True)
class ClippedSurrogate(PolicyLoss):
    """PPO's clipped surrogate.

    Args:
        clip_low: lower bound of the importance ratio is 1 - clip_low.
        clip_high: upper bound is 1 + clip_high.
        dual_clip: cap of the loss on negative advantages, as a multiple of the advantage (3.0 in verl). Null: none.
        aggregation: ``token_mean`` over the action tokens of the whole optimizer step; ``sequence_mean``: mean over
            each rollout's tokens, then over rollouts; ``constant``: sum over tokens / (rollouts x constant_length).
        constant_length: tokens, for ``aggregation=constant`` (Dr.GRPO's maximum response length).

    Raises:
        UserError: bounds out of range; ``constant_length`` missing, or given to another aggregation.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    constant_length: int | None = None

    def __post_init__(self):
        if not (0 < self.clip_low <= 1 and self.clip_high > 0):
            raise UserError(f"clip_low={self.clip_low} must lie in (0, 1] and clip_high={self.clip_high} above 0")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError(f"dual_clip={self.dual_clip} must be above 1 (3.0 is usual)")
        if (self.aggregation == "constant") != (self.constant_length is not None):
            raise UserError("aggregation=constant and constant_length go together: give both or neither")
        if self.constant_length is not None and self.constant_length < 1:
            raise UserError(f"constant_length={self.constant_length} must be at least 1 token")

    def __call__(self, logprobs, old_logprobs, advantages, mask, *, step_tokens, step_rollouts) -> LossTerms:
        loss, clipped = clipped_surrogate(
            logprobs,
            old_logprobs,
            advantages,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )
        loss = torch.where(mask, loss, 0)
        if self.aggregation == "token_mean":
            total = loss.sum() / step_tokens.clamp_min(1)
        elif self.aggregation == "sequence_mean":
            total = (loss.sum(-1) / mask.sum(-1).clamp_min(1)).sum() / step_rollouts.clamp_min(1)
        else:
            total = loss.sum() / (step_rollouts.clamp_min(1) * (self.constant_length or 1))
        return LossTerms(total, (clipped & mask).sum().float())
