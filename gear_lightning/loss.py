"""Policy losses: a loss for each token, with its own advantage, and one way to sum them with explicit denominators."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .errors import UserError

LOG_RATIO_LIMIT = 20.0  # nats, as in verl. exp(89) overflows, and its gradient is then 0 * inf even if clipped


def clipped_surrogate(
    logprobs: Float[Tensor, "batch seq"],
    old_logprobs: Float[Tensor, "batch seq"],
    advantages: Float[Tensor, "batch seq"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Float[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Return the loss per token, and the tokens whose gradient the clip removed.

    ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` with r the importance ratio (PPO, arXiv 1707.06347; separate
    bounds from DAPO, arXiv 2503.14476). ``dual_clip`` caps the loss at ``-dual_clip A`` where A < 0 (arXiv 1912.09729).
    The log-ratio is clamped to plus and minus 20 nats, which also removes the gradient.
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


def sequence_log_ratio(
    logprobs: Float[Tensor, "batch seq"], old_logprobs: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    """Return log s_t of GSPO's token form, in nats.

    Its value is the mean log-ratio of the rollout's action tokens, the same for all of them. Its gradient is that of
    token t's own log-prob: ``s_t = sg[s] p_t / sg[p_t]`` with ``s = exp(mean_t log r_t)`` (arXiv 2507.18071).
    """
    gap = torch.where(mask, logprobs - old_logprobs, 0).detach()
    mean = gap.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp_min(1)
    return mean + (logprobs - logprobs.detach())


def weighted_likelihood(
    logprobs: Float[Tensor, "batch seq"],
    old_logprobs: Float[Tensor, "batch seq"],
    advantages: Float[Tensor, "batch seq"],
    *,
    clip_low: float | None,
    clip_high: float,
) -> tuple[Float[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Return the loss per token, and the tokens whose weight was clipped.

    ``-sg[clip(r, 1 - clip_low, 1 + clip_high)] A log p`` with r the importance ratio (CISPO, arXiv 2506.13585).
    ``clip_low`` None: no lower bound. Every token keeps its gradient. The log-ratio is clamped to plus and minus 20
    nats.
    """
    log_ratio = (logprobs - old_logprobs).detach()
    ratio = torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    weight = ratio.clamp(None if clip_low is None else 1 - clip_low, 1 + clip_high)
    return -weight * advantages * logprobs, (advantages != 0) & (weight != ratio)


SamplerLevel = Literal["token", "turn", "sequence"]


@dataclass(frozen=True)
class SamplerCorrection:
    """How losses weigh tokens for their sampler: see `sampler_weights` and the options of `TokenLoss`."""

    cap: float
    level: SamplerLevel = "token"
    outside: Literal["truncate", "mask"] = "truncate"
    floor: float = 0.0


def sampler_weights(
    old_logprobs: Float[Tensor, "batch seq"],
    sampler_logprobs: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    turn_ids: Int[Tensor, "batch seq"] | None,
    correction: SamplerCorrection,
) -> tuple[Float[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Return the importance weight of each token, without gradient, and the tokens where it was limited.

    The weight corrects for tokens sampled with other probabilities than those that training starts from: those of an
    older policy, or of an engine that computes differently. With the ratio w = exp(sum(old_logprob - sampler_logprob))
    of the token itself, of its turn or of its rollout (``level``), it is ``min(w, cap)`` (``truncate``, Ionides 2008,
    doi 10.1198/106186008X320456), or w, and 0 outside of [floor, cap] (``mask``, as IcePop and TRL's ``token_mask`` and
    ``sequence_mask``). It is exactly 1 if both log-probs are equal. Log-ratios are clamped to plus and minus 20 nats.

    Args:
        old_logprobs: nats; the policy's before the first inner epoch.
        sampler_logprobs: nats; of the policy that sampled.
        mask: action tokens; others have no influence.
        turn_ids: index of each action token's turn; only needed for ``level=turn``.
        correction: level and limits.
    """
    log_ratio = torch.where(mask, old_logprobs - sampler_logprobs, 0).detach()
    if correction.level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)
    elif correction.level == "turn":
        assert turn_ids is not None
        turns = turn_ids.clamp_min(0)  # tokens outside of turns add 0
        sums = log_ratio.new_zeros(len(turns), int(turns.max()) + 1).scatter_add(-1, turns, log_ratio)
        log_ratio = sums.gather(-1, turns)
    ratio = torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    if correction.outside == "truncate":
        return ratio.clamp_max(correction.cap), ratio > correction.cap
    outside = (ratio > correction.cap) | (ratio < correction.floor)
    return ratio.masked_fill(outside, 0), outside


@dataclass(frozen=True)
class LossTerms:
    """A loss and its values to log: sums over the tokens of the micro-batch.

    Attributes:
        loss: this micro-batch's share of the step's loss.
        clipped: number of tokens that the clip changed: it removed the gradient, or changed the weight (CISPO).
        sampler_ratio: sum of the importance weights for the sampler. None: not used.
        sampler_truncated: number of tokens whose weight was limited. None: not used.
    """

    loss: Float[Tensor, ""]
    clipped: Float[Tensor, ""]
    sampler_ratio: Float[Tensor, ""] | None = None
    sampler_truncated: Float[Tensor, ""] | None = None


class PolicyLoss(ABC):
    """An objective. It must return a sum over tokens divided by numbers that do not depend on the micro-batch."""

    @abstractmethod
    def __call__(
        self,
        logprobs: Float[Tensor, "batch seq"],
        old_logprobs: Float[Tensor, "batch seq"],
        advantages: Float[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
        *,
        sampler_logprobs: Float[Tensor, "batch seq"],
        turn_ids: Int[Tensor, "batch seq"] | None = None,
        step_tokens: Tensor,
        step_rollouts: Tensor,
    ) -> LossTerms:
        """Return this micro-batch's share of the loss of the optimizer step.

        Args:
            logprobs: of the policy in training, nats; the only argument with gradient.
            old_logprobs: the policy's log-probs before the first inner epoch, nats.
            advantages: of each token, including credit.
            mask: tokens that count.
            sampler_logprobs: as reported by the generation engine, nats, before any top-p and top-k.
            turn_ids: index of each action token's turn.
            step_tokens: number of action tokens of the whole optimizer step.
            step_rollouts: number of rollouts of the whole optimizer step.
        """


@dataclass(frozen=True, kw_only=True)
class TokenLoss(PolicyLoss):
    """A loss of each token, and the aggregation over the tokens of a step.

    Args:
        aggregation: ``token_mean`` over the action tokens of the whole optimizer step; ``sequence_mean``: mean over
            each rollout's tokens, then over rollouts; ``constant``: sum over tokens / (rollouts x constant_length).
        constant_length: tokens, for ``aggregation=constant`` (Dr.GRPO's maximum response length).
        sampler_cap: importance sampling: weigh each token by exp(old log-prob - sampler's log-prob), at most this value
            (2.0 is usual), for a sampler whose probabilities differ from the trainer's: an older policy's
            (``generation.ahead``), or those of an engine that computes differently: see ``train/sampler_gap_max``. Both
            log-probs are taken before top-p and top-k, so it does not correct the truncation by top-p and top-k. Null:
            off.
        sampler_level: what the ratio covers: the ``token``, its ``turn`` or its whole rollout (``sequence``), whose
            ratios are products over their tokens.
        sampler_outside: what to do with tokens whose ratio is outside of the limits: ``truncate`` the weight to the
            cap, or ``mask`` the token: weight 0. It still counts in the denominator.
        sampler_floor: lower limit, for ``mask``.

    Raises:
        UserError: ``constant_length`` missing, or given to another aggregation; ``sampler_cap`` below 1, or not finite;
            ``sampler_floor`` not in [0, 1); or an option about the ratio that does nothing.
    """

    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    constant_length: int | None = None
    sampler_cap: float | None = None
    sampler_level: SamplerLevel = "token"
    sampler_outside: Literal["truncate", "mask"] = "truncate"
    sampler_floor: float = 0.0

    def __post_init__(self):
        if (self.aggregation == "constant") != (self.constant_length is not None):
            raise UserError("aggregation=constant and constant_length go together: give both or neither")
        if self.constant_length is not None and self.constant_length < 1:
            raise UserError(f"constant_length={self.constant_length} must be at least 1 token")
        if self.sampler_cap is not None and not 1 <= self.sampler_cap < math.inf:
            raise UserError(
                f"sampler_cap={self.sampler_cap} must be at least 1 and finite (2.0 is usual); null for no correction"
            )
        if not 0 <= self.sampler_floor < 1:
            raise UserError(f"sampler_floor={self.sampler_floor} must be at least 0 and below 1")
        if self.sampler_cap is None and (self.sampler_level, self.sampler_outside) != ("token", "truncate"):
            raise UserError(
                f"sampler_level={self.sampler_level} and sampler_outside={self.sampler_outside} do nothing without "
                "sampler_cap; give one (2.0 is usual)"
            )
        if self.sampler_floor and (self.sampler_cap is None or self.sampler_outside != "mask"):
            raise UserError(
                f"sampler_floor={self.sampler_floor} does nothing without sampler_cap and sampler_outside=mask"
            )

    @abstractmethod
    def per_token(
        self,
        logprobs: Float[Tensor, "batch seq"],
        old_logprobs: Float[Tensor, "batch seq"],
        advantages: Float[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
    ) -> tuple[Float[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """Return the loss of each token and the tokens that the clip changed; arbitrary values outside the mask."""

    @property
    def correction(self) -> SamplerCorrection | None:
        """How tokens are weighed for their sampler; None: not at all."""
        if self.sampler_cap is None:
            return None
        return SamplerCorrection(self.sampler_cap, self.sampler_level, self.sampler_outside, self.sampler_floor)

    def __call__(
        self, logprobs, old_logprobs, advantages, mask, *, sampler_logprobs, turn_ids=None, step_tokens, step_rollouts
    ) -> LossTerms:
        loss, clipped = self.per_token(logprobs, old_logprobs, advantages, mask)
        weight = truncated = None
        if self.correction is not None:
            weight, truncated = sampler_weights(old_logprobs, sampler_logprobs, mask, turn_ids, self.correction)
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


def _check_bounds(kind: object, clip_low: float | None, clip_high: float) -> None:
    if not ((clip_low is None or 0 < clip_low <= 1) and 0 < clip_high < math.inf):
        raise UserError(
            f"{type(kind).__name__}: clip_low={clip_low} must lie in (0, 1] and clip_high={clip_high} be above 0, "
            "and finite"
        )


@dataclass(frozen=True)
class ClippedSurrogate(TokenLoss):
    """PPO's clipped surrogate.

    The loss of GRPO (arXiv 2402.03300), Dr.GRPO (2503.20783) and DAPO (2503.14476), depending on bounds and
    aggregation. At ratio 1, that is, in the first inner epoch, the gradient with respect to a token's log-prob is minus
    its advantage divided by the denominator of ``aggregation``.

    Args:
        clip_low: lower bound of the importance ratio is 1 - clip_low.
        clip_high: upper bound is 1 + clip_high.
        dual_clip: cap of the loss on negative advantages, as a multiple of the advantage (3.0 in verl). Null: no cap.

    Raises:
        UserError: bounds out of range, or as in `TokenLoss`.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None

    def __post_init__(self):
        super().__post_init__()
        _check_bounds(self, self.clip_low, self.clip_high)
        if self.dual_clip is not None and not 1 < self.dual_clip < math.inf:
            raise UserError(f"dual_clip={self.dual_clip} must be above 1 and finite (3.0 is usual); null for no cap")

    def per_token(self, logprobs, old_logprobs, advantages, mask):
        return clipped_surrogate(
            logprobs,
            old_logprobs,
            advantages,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )


@dataclass(frozen=True)
class GSPO(TokenLoss):
    """The clipped surrogate with one importance ratio for the whole rollout, in its token form (arXiv 2507.18071).

    ``-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)`` with s the geometric mean of the ratios of the rollout's
    action tokens, over all of its turns. The gradient of a token that is not clipped is -s A with its own A.

    At ratio 1, that is, in the first inner epoch, the gradient with respect to a token's log-prob is minus its
    advantage / (tokens of the rollout x rollouts), as in `ClippedSurrogate` with ``aggregation=sequence_mean``. The two
    differ from the second inner epoch on.

    Args:
        clip_low: lower bound of s is 1 - clip_low. The default is the authors'; s varies far less than a token's ratio.
        clip_high: upper bound of s is 1 + clip_high.

    Raises:
        UserError: bounds out of range, or as in `TokenLoss`.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = field(default="sequence_mean", kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        _check_bounds(self, self.clip_low, self.clip_high)

    def per_token(self, logprobs, old_logprobs, advantages, mask):
        log_ratio = sequence_log_ratio(logprobs, old_logprobs, mask)
        none = torch.zeros_like(log_ratio)
        return clipped_surrogate(log_ratio, none, advantages, clip_low=self.clip_low, clip_high=self.clip_high)


@dataclass(frozen=True)
class CISPO(TokenLoss):
    """Log-likelihood weighted by the clipped importance ratio, which has no gradient (MiniMax-M1, arXiv 2506.13585).

    ``-sg[clip(r, 1 - clip_low, 1 + clip_high)] A log p``: unlike with `ClippedSurrogate`, every token keeps its
    gradient. The value of the loss has no meaning; its gradient is that of the surrogate with a fixed weight.

    At ratio 1, that is, in the first inner epoch, the gradient with respect to a token's log-prob is minus its
    advantage divided by the denominator of ``aggregation``, as in `ClippedSurrogate`. The two differ from the second
    inner epoch on.

    Args:
        clip_low: weights are at least 1 - clip_low. Null, as in the paper's runs: no lower bound.
        clip_high: weights are at most 1 + clip_high. The default, a weight of at most 5, is that of ScaleRL (arXiv
            2510.13786); the paper tunes it and gives no value.

    Raises:
        UserError: bounds out of range, or as in `TokenLoss`.
    """

    clip_low: float | None = None
    clip_high: float = 4.0

    def __post_init__(self):
        super().__post_init__()
        _check_bounds(self, self.clip_low, self.clip_high)

    def per_token(self, logprobs, old_logprobs, advantages, mask):
        return weighted_likelihood(logprobs, old_logprobs, advantages, clip_low=self.clip_low, clip_high=self.clip_high)
