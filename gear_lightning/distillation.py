"""Self-distillation: losses that move the policy towards its privileged teacher's predictions at the same tokens.

They are added to a policy loss (`gear_lightning.loss`) or replace it. `skew_divergence` and `gated_gap` are pure
functions of tensors; the classes are the options of a recipe.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .batch import TokenStats
from .errors import UserError
from .gear import with_tail
from .loss import LOG_RATIO_LIMIT


def _kl(a: Tensor, b: Tensor) -> Tensor:
    """Return KL(a || b) of log-probs over the last axis.

    The terms ``- a.exp() + b.exp()`` add nothing, because both sum to 1. With them the gradient in a is a log(a / b):
    exactly 0 where both are equal, so that the optimizer takes no steps from rounding errors.
    """
    return (a.exp() * (a - b) - a.exp() + b.exp()).sum(-1)


def skew_divergence(
    policy_top: Float[Tensor, "batch seq top"], teacher_top: Float[Tensor, "batch seq top"], skew: float
) -> Float[Tensor, "batch seq"]:
    """Return the divergence of two distributions, given by log-probs of the same tokens plus one tail bucket, in nats.

    With S the policy, T the teacher and M = (1 - skew) S + skew T: ``(1 - skew) KL(S || M) + skew KL(T || M)``, the
    generalized Jensen-Shannon divergence (arXiv 2306.13649; at most log 2). At skew 0 and 1, where that is 0, the
    result follows OPSD's and SDPO's code: KL(T || S) at 0, KL(S || T) at 1. Exact if the tokens are the whole
    vocabulary. Only S has a gradient.
    """
    s, t = with_tail(policy_top), with_tail(teacher_top.detach())
    if skew == 0:
        return _kl(t, s)
    if skew == 1:
        return _kl(s, t)
    with torch.no_grad():  # M sums to 1: the gradient through it cancels
        gap = t - s
        # log(M / S), in a form that is 0 where S = T, and finite even if T / S is not
        low, high = gap.clamp_max(0), gap.clamp_min(0)
        rise = torch.where(
            gap > 0, high + torch.log1p((1 - skew) * torch.expm1(-high)), torch.log1p(skew * torch.expm1(low))
        )
        mixture = s + rise
    return (1 - skew) * _kl(s, mixture) + skew * _kl(t, mixture)


def gated_gap(
    logprobs: Float[Tensor, "batch seq"], teacher_logprobs: Float[Tensor, "batch seq"], beta: float
) -> Float[Tensor, "batch seq"]:
    """Return ``g (log T - log S)`` of sampled tokens, in nats, with g = sigmoid(beta (log T - log S)) held fixed.

    Its gradient in log S is -g: to reduce it, the policy makes its sampled tokens more likely, most of all those to
    which the teacher assigns a higher probability. If every token gets the same gate (``beta`` 0), the expected
    gradient on the policy's own samples is 0.
    """
    gap = teacher_logprobs.detach() - logprobs
    return torch.sigmoid(beta * gap).detach() * gap


class Distillation(ABC):
    """A distillation loss. A subclass is a frozen dataclass, named in YAML by ``class_path``.

    Attributes:
        coef: weight of the term that is added to the policy loss.
    """

    coef: float

    @property
    def top_k(self) -> int:
        """Number of the policy's most likely tokens to compare distributions on; 0 if sampled tokens suffice."""
        return 0

    @abstractmethod
    def token_losses(
        self,
        policy: TokenStats,
        teacher: TokenStats,
        old_logprobs: Float[Tensor, "batch seq"],
        advantages: Float[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq"]:
        """Return the loss of each token before ``coef``; any finite value outside the action tokens."""

    def __call__(
        self,
        policy: TokenStats,
        teacher: TokenStats,
        old_logprobs: Float[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
        *,
        privileged: Bool[Tensor, " batch"],
        advantages: Float[Tensor, "batch seq"],
        step_tokens: Tensor,
    ) -> Float[Tensor, ""]:
        """Return this micro-batch's share of the optimizer step's loss: ``coef`` x sum over tokens / ``step_tokens``.

        Args:
            policy: the policy's statistics, with gradient.
            teacher: the teacher's statistics, for the same ``top_k`` tokens.
            old_logprobs: the policy's log-probs before the first inner epoch, nats.
            mask: tokens that count.
            privileged: rows for which the teacher saw more than the policy; the other rows add nothing.
            advantages: of each token, before credit.
            step_tokens: number of action tokens of the whole optimizer step.

        Raises:
            UserError: the loss compares distributions, and the statistics contain none.
        """
        losses = self.token_losses(policy, teacher, old_logprobs, advantages)
        losses = torch.where(mask & privileged[:, None], losses, 0)
        return self.coef * losses.sum() / step_tokens.clamp_min(1)

    def _top(self, policy: TokenStats, teacher: TokenStats) -> tuple[Tensor, Tensor]:
        if policy.top_logprobs is None or teacher.top_logprobs is None:
            raise UserError(f"{type(self).__name__} compares full distributions, and these rollouts have none")
        return policy.top_logprobs[..., : self.top_k], teacher.top_logprobs[..., : self.top_k]

    def _check(self, **values: tuple[float | None, float, float]) -> None:
        """Raise unless each option, given as (value, low, high), lies in [low, high]."""
        for name, (value, low, high) in values.items():
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
                raise UserError(f"{type(self).__name__}: {name}={value} must be a number {bounds}")
        if self.coef == 0:
            raise UserError(f"{type(self).__name__}: coef=0 turns distillation off; use model.distillation=null")


@dataclass(frozen=True)
class OPSD(Distillation):
    """On-policy self-distillation: a divergence of full distributions, on the policy's rollouts (arXiv 2601.18734).

    The paper computes it over the whole vocabulary. Here it is computed over the policy's most likely tokens and a
    bucket for the rest; it equals the paper's if ``top_k_tokens`` is the vocabulary size. Each such token costs a few
    float32 numbers per action token of the micro-batch, kept until its backward pass.

    Args:
        coef: weight of the term.
        beta: 0 is KL(teacher || policy), 1 is KL(policy || teacher), values between are the generalized Jensen-Shannon
            divergence.
        top_k_tokens: number of the policy's most likely tokens over which it is computed, plus a tail bucket.
        token_clip: maximum loss of one token, nats; a token above it has no gradient. Null: no maximum, with which
            CREST ("Teach the Magnitude, Not the Direction", 2026) saw training collapse within about 100 steps.

    Raises:
        UserError: an option out of range.
    """

    coef: float = 1.0
    beta: float = 0.5
    top_k_tokens: int = 100
    token_clip: float | None = None

    def __post_init__(self):
        self._check(
            coef=(self.coef, 0, math.inf),
            beta=(self.beta, 0, 1),
            top_k_tokens=(self.top_k_tokens, 1, math.inf),
            token_clip=(self.token_clip, 1e-6, math.inf),
        )

    @property
    def top_k(self) -> int:
        return self.top_k_tokens

    def token_losses(self, policy, teacher, old_logprobs, advantages):
        losses = skew_divergence(*self._top(policy, teacher), self.beta)
        return losses if self.token_clip is None else losses.clamp_max(self.token_clip)


@dataclass(frozen=True)
class SDPO(Distillation):
    """Self-distillation from a solved rollout of the group, or from feedback (arXiv 2601.20802).

    Each token's divergence, as in `OPSD`, is multiplied by its importance weight min(policy / old policy, is_clip),
    without gradient: 1 in the first inner epoch. A rollout without demonstration or feedback adds nothing. Use
    ``model.teacher.shows=peer_or_feedback`` to show these to the teacher. For the memory of ``top_k_tokens`` see
    `OPSD`.

    Args:
        coef: weight of the term.
        alpha: 0 is KL(teacher || policy), 1 is KL(policy || teacher), values between are the generalized Jensen-Shannon
            divergence.
        top_k_tokens: number of the policy's most likely tokens over which it is computed, plus a tail bucket.
        is_clip: cap of the importance weight.

    Raises:
        UserError: an option out of range.
    """

    coef: float = 1.0
    alpha: float = 0.5
    top_k_tokens: int = 100
    is_clip: float = 2.0

    def __post_init__(self):
        self._check(
            coef=(self.coef, 0, math.inf),
            alpha=(self.alpha, 0, 1),
            top_k_tokens=(self.top_k_tokens, 1, math.inf),
            is_clip=(self.is_clip, 1, math.inf),
        )

    @property
    def top_k(self) -> int:
        return self.top_k_tokens

    def token_losses(self, policy, teacher, old_logprobs, advantages):
        log_ratio = (policy.logprobs - old_logprobs).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        return log_ratio.exp().clamp_max(self.is_clip) * skew_divergence(*self._top(policy, teacher), self.alpha)


@dataclass(frozen=True)
class SDPG(Distillation):
    """Self-distillation in addition to a policy gradient: KL(policy || teacher) of full distributions.

    From arXiv 2606.04036: the term of the paper's loss with beta. The term with alpha pulls the policy to a frozen
    reference model and needs its forward pass on each micro-batch, which this framework does not run. For the memory of
    ``top_k_tokens`` see `OPSD`.

    Args:
        coef: weight of the term, the paper's beta.
        top_k_tokens: number of the policy's most likely tokens over which the KL is computed, plus a tail bucket.
        token_clip: maximum loss of one token, nats; a token above it has no gradient. Null: no maximum.
        positives_only: only on tokens with a positive advantage.

    Raises:
        UserError: an option out of range.
    """

    coef: float = 0.001
    top_k_tokens: int = 100
    token_clip: float | None = 20.0
    positives_only: bool = False

    def __post_init__(self):
        self._check(
            coef=(self.coef, 0, math.inf),
            top_k_tokens=(self.top_k_tokens, 1, math.inf),
            token_clip=(self.token_clip, 1e-6, math.inf),
        )

    @property
    def top_k(self) -> int:
        return self.top_k_tokens

    def token_losses(self, policy, teacher, old_logprobs, advantages):
        losses = skew_divergence(*self._top(policy, teacher), 1.0)
        losses = losses if self.token_clip is None else losses.clamp_max(self.token_clip)
        return torch.where(advantages > 0, losses, 0) if self.positives_only else losses


@dataclass(frozen=True)
class SDAR(Distillation):
    """Gated self-distillation of sampled tokens in addition to GRPO (arXiv 2605.15155): see `gated_gap`.

    Its value may be negative. It needs no distributions.

    Args:
        coef: weight of the term.
        beta: sharpness of the gate, per nat. 0 weighs all tokens by 1/2, which the authors call GRPO+OPSD.

    Raises:
        UserError: an option out of range.
    """

    coef: float = 0.01
    beta: float = 5.0

    def __post_init__(self):
        self._check(coef=(self.coef, 0, math.inf), beta=(self.beta, 0, math.inf))

    def token_losses(self, policy, teacher, old_logprobs, advantages):
        return gated_gap(policy.logprobs, teacher.logprobs, self.beta)
