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


def sampler_weights(
    old_logprobs: Float[Tensor, "batch seq"], sampler_logprobs: Float[Tensor, "batch seq"], cap: float
) -> tuple[Float[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Truncated importance weight of each token, without gradient, and where it was truncated.

    ``min(exp(old_logprob - sampler_logprob), cap)``: corrects for tokens that were drawn with other numbers than those
    that training computes (Ionides 2008, doi 10.1198/106186008X320456; token by token for RL as in verl,
    docs/algo/rollout_corr_math.md section 3.3.1). Exactly 1 where both are equal. The log-ratio is limited to plus and
    minus 20 nats.
    """
    log_ratio = (old_logprobs - sampler_logprobs).detach()
    ratio = torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    return ratio.clamp_max(cap), ratio > cap


@dataclass(frozen=True)
class LossTerms:
    """A loss and what to log of it: sums over the tokens of the micro-batch.

    Attributes:
        loss: this micro-batch's share of the step's loss.
        clipped: number of tokens without gradient for the clip.
        sampler_ratio: sum of the truncated importance weights of the sampler. None: not used.
        sampler_truncated: number of tokens at which they were truncated. None: not used.
    """

    loss: Float[Tensor, ""]
    clipped: Float[Tensor, ""]
    sampler_ratio: Float[Tensor, ""] | None = None
    sampler_truncated: Float[Tensor, ""] | None = None


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
        sampler_logprobs: Float[Tensor, "batch seq"],
        step_tokens: Tensor,
        step_rollouts: Tensor,
    ) -> LossTerms:
        """This micro-batch's share of the loss of the optimizer step.

        Args:
            logprobs: of the policy that is trained, nats; the only argument with gradient.
            old_logprobs: the same before the first of the inner epochs, nats.
            advantages: of each token, with its credit.
            mask: tokens that count.
            sampler_logprobs: as the generation engine reported them, nats, before any top-p and top-k.
            step_tokens: action tokens of the whole optimizer step.
            step_rollouts: rollouts of the whole optimizer step.
        """


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
        sampler_cap: truncated importance sampling: weigh each token by exp(old log-prob - sampler's log-prob), at most
            this (2.0 is usual), for a sampler whose numbers are not the trainer's: see ``train/sampler_gap_max``. Both
            log-probs are those before top-p and top-k, so it corrects numbers, not the cut of those. Null: off.

    Raises:
        UserError: bounds out of range; ``constant_length`` missing, or given to another aggregation; ``sampler_cap``
            below 1.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    constant_length: int | None = None
    sampler_cap: float | None = None

    def __post_init__(self):
        if not (0 < self.clip_low <= 1 and self.clip_high > 0):
            raise UserError(f"clip_low={self.clip_low} must lie in (0, 1] and clip_high={self.clip_high} above 0")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError(f"dual_clip={self.dual_clip} must be above 1 (3.0 is usual)")
        if (self.aggregation == "constant") != (self.constant_length is not None):
            raise UserError("aggregation=constant and constant_length go together: give both or neither")
        if self.constant_length is not None and self.constant_length < 1:
            raise UserError(f"constant_length={self.constant_length} must be at least 1 token")
        if self.sampler_cap is not None and not self.sampler_cap >= 1:
            raise UserError(f"sampler_cap={self.sampler_cap} must be at least 1 (2.0 is usual); null for no correction")

    def __call__(
        self, logprobs, old_logprobs, advantages, mask, *, sampler_logprobs, step_tokens, step_rollouts
    ) -> LossTerms:
        loss, clipped = clipped_surrogate(
            logprobs,
            old_logprobs,
            advantages,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )
        weight = truncated = None
        if self.sampler_cap is not None:
            weight, truncated = sampler_weights(old_logprobs, sampler_logprobs, self.sampler_cap)
            loss = weight * loss
            weight, truncated = torch.where(mask, weight, 0).sum(), (truncated & mask).sum().float()
        loss = torch.where(mask, loss, 0)
        if self.aggregation == "token_mean":
            total = loss.sum() / step_tokens.clamp_min(1)
        elif self.aggregation == "sequence_mean":
            total = (loss.sum(-1) / mask.sum(-1).clamp_min(1)).sum() / step_rollouts.clamp_min(1)
        else:
            total = loss.sum() / (step_rollouts.clamp_min(1) * (self.constant_length or 1))
        return LossTerms(total, (clipped & mask).sum().float(), weight, truncated)
