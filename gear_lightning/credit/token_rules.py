"""Credit rules that weigh each token on its own."""

import math
from dataclasses import dataclass

import torch

from .. import gear
from ..batch import Credit
from ..checks import check_positive, check_range
from ..errors import UserError
from .base import CreditAssigner, Evidence, at_bound, mixing, spread_credit, teacher_of, top_of


@dataclass(frozen=True)
class RLSD(CreditAssigner):
    """Token-level reweighting of RLSD (arXiv 2604.03128).

    A ((1 - lambda) + lambda clip(exp(sign(A) (log p_T - log p_S)))).

    Args:
        mix: lambda, the share of the weighting.
        clip: weights within 1 - clip and 1 + clip.
        mix_decay: optimizer steps over which lambda decays to 0 (60 in the authors' released script). Null: constant.
    """

    mix: float = 0.5
    clip: float = 0.2
    mix_decay: int | None = None

    def __post_init__(self):
        if not (0 <= self.mix <= 1 and 0 <= self.clip <= 1):
            raise UserError(f"RLSD: mix={self.mix} and clip={self.clip} must lie in [0, 1]")
        if self.mix_decay is not None and self.mix_decay < 1:
            raise UserError(f"RLSD: mix_decay={self.mix_decay} must be at least 1")

    def __call__(self, evidence: Evidence) -> Credit:
        divergence = evidence.policy.logprobs - teacher_of(evidence, self).logprobs
        weights = gear.signal_weights(divergence, evidence.base_advantages, evidence.action_mask, clip=self.clip)
        clipped = at_bound(weights, self.clip)
        weights = 1 + mixing(self.mix, self.mix_decay, evidence.policy_version) * (weights - 1)
        return spread_credit(evidence, weights, divergence, clipped=clipped)


@dataclass(frozen=True)
class EGRSD(CreditAssigner):
    """RLSD with a gate on the teacher's share, which closes where the teacher is uncertain.

    In the style of EGRSD, arXiv 2605.13255:
    A (1 + g lambda (clip(exp(sign(A) (log p_T - log p_S))) - 1)), g = g_min + (1 - g_min) (1 - min(H_T / h, 1)).

    Compared with its paper, only the idea is implemented. Only the abstract was available: three signals (the reward's
    direction, the size of the likelihood ratio, and a gate that falls with the teacher's entropy H_T and has a floor
    above 0) make the weight of a token. The formula and position of the gate, and every default except RLSD's two, are
    this project's own. The position of the gate defines the effect of an uncertain teacher: here the weight goes to 1,
    and no rollout loses credit; the abstract can also be read as a gate on the whole weight. The variant with a
    look-ahead window (CL-EGRSD) is not included.

    Args:
        mix: lambda, as in RLSD.
        clip: likelihood ratios within 1 - clip and 1 + clip, as in RLSD.
        gate_floor: g_min, the value of the gate where the teacher is uncertain.
        entropy_scale: h, nats: entropy from which the gate is at its floor. The default is log 2, the entropy of a
            choice between two equally likely tokens.

    Raises:
        UserError: values out of range.
    """

    lacks = "the paper's formula: only its abstract was available; formula, position and values of the gate are our own"

    mix: float = 0.5
    clip: float = 0.2
    gate_floor: float = 0.1
    entropy_scale: float = 0.693

    def __post_init__(self):
        check_range(self, 0, 1, "mix", "clip", "gate_floor")
        check_positive(self, "entropy_scale")

    def __call__(self, evidence: Evidence) -> Credit:
        teacher = teacher_of(evidence, self)
        divergence = evidence.policy.logprobs - teacher.logprobs
        weights = gear.signal_weights(divergence, evidence.base_advantages, evidence.action_mask, clip=self.clip)
        clipped = at_bound(weights, self.clip)
        unsure = (teacher.entropy / self.entropy_scale).clamp(0, 1)
        gate = 1 - (1 - self.gate_floor) * unsure
        return spread_credit(evidence, 1 + gate * self.mix * (weights - 1), divergence, clipped=clipped)


@dataclass(frozen=True)
class CREST(CreditAssigner):
    """The token part of CREST ("Teach the Magnitude, Not the Direction", 2026): weights are never below 1.

    A (1 + lambda_t (w - 1)) with w = clip(exp(sign(A) (log p_T - log p_S) / tau), 1 - e, 1 + e), and
    lambda_t = min(lambda m_t, lambda) where sign(A) (log p_T - log p_S) > 0 (teacher and reward agree), 0 elsewhere.
    m_t = 1 + rho (2 sigmoid(z_t) - 1), z_t the z-score of the surprisal -log p_S within the rollout, over both signs of
    A (0 if surprisals differ by rounding alone): tokens of which the policy was certain count less. Weights lie in
    [1, 1 + lambda e]; defaults are the paper's. Its other part, an advantage for each turn, is
    `gear_lightning.advantage.TurnGRPO`.

    Args:
        mix: lambda, the largest share of the weighting.
        clip: e, the clip range of w.
        temperature: tau, divides the log-ratio.
        gate_slope: rho, how far the share falls for tokens of which the policy was certain.

    Raises:
        UserError: values out of range.
    """

    mix: float = 0.3
    clip: float = 0.28
    temperature: float = 2.0
    gate_slope: float = 0.5

    def __post_init__(self):
        check_range(self, 0, 1, "mix", "clip", "gate_slope")
        check_positive(self, "temperature")

    def __call__(self, evidence: Evidence) -> Credit:
        mask, divergence = evidence.action_mask, evidence.policy.logprobs - teacher_of(evidence, self).logprobs
        weights = gear.signal_weights(
            divergence,
            evidence.base_advantages,
            mask,
            kappa=1 / self.temperature,
            clip=self.clip,
            direction_gate=True,  # weights above 1 mean agreement; the others become 1, as with a share of 0
        )
        clipped = weights == 1 + self.clip
        noise = evidence.noise.log_ratio
        surprise = gear.scale_signal(-evidence.policy.logprobs, mask, "zscore", noise=noise).sigmoid()
        share = self.mix * (1 + self.gate_slope * (2 * surprise - 1)).clamp(0, 1)
        return spread_credit(evidence, 1 + share * (weights - 1), divergence, clipped=clipped)


@dataclass(frozen=True)
class GTPO(CreditAssigner):
    """More credit for uncertain tokens of good rollouts and for confident tokens of bad ones.

    In the style of GTPO, arXiv 2508.04349: A (a1 + a2 x_t) / (a1 + a2) with x_t = H_t / mean H where A > 0, and
    (1/H_t) / mean (1/H) where A < 0; H is the policy's entropy and the mean is over the rollout's tokens with that
    sign, so that the mean weight is 1.

    Compared with its paper, the comparison within the group is missing. The paper compares the tokens of all rollouts
    of a group at one position (which would need the whole group in one micro-batch), shapes rewards, and normalizes
    good and bad tokens separately; here a token is compared with those of its own rollout, and advantages are shaped.

    Runs no teacher.

    Args:
        alpha1: a1, share of the rollout's own advantage.
        alpha2: a2, share that follows the entropy.
        entropy_floor: nats; lower entropies are raised to this value. The paper uses 1e-8; with that value, rounding at
            the most certain token would determine 1/H of a long rollout, so the default is this project's own.

    Raises:
        UserError: values out of range.
    """

    lacks = "the comparison with the group's tokens at one position, and the shaping of rewards"

    alpha1: float = 1.0
    alpha2: float = 0.1
    entropy_floor: float = 0.01

    needs_teacher = False

    def __post_init__(self):
        check_range(self, 0, math.inf, "alpha1", "alpha2")
        check_positive(self, "entropy_floor")
        if not 0 < self.alpha1 + self.alpha2 < math.inf:
            raise UserError(f"GTPO: alpha1={self.alpha1} and alpha2={self.alpha2} must be finite, and not both 0")

    def __call__(self, evidence: Evidence) -> Credit:
        mask, sign = evidence.action_mask, evidence.base_advantages.sign()
        entropy = evidence.policy.entropy.clamp_min(self.entropy_floor)
        ratio = torch.ones_like(entropy)
        for side, value in ((sign > 0, entropy), (sign < 0, 1 / entropy)):
            ratio = torch.where(mask & side, value / gear.masked_mean(value, mask & side), ratio)
        weights = (self.alpha1 + self.alpha2 * ratio) / (self.alpha1 + self.alpha2)
        return spread_credit(evidence, weights, by_teacher=False)


@dataclass(frozen=True)
class SCGRPO(CreditAssigner):
    """Weight D / (D + c) with D = KL(teacher || policy), for both signs of the advantage (SC-GRPO, arXiv 2606.18810).

    c is the 75th percentile of D over the rollout's tokens of one sign of advantage, at least 1e-4; the authors take it
    over the micro-batch, which would make the gradient depend on the micro-batch size. Rollouts of a group with exactly
    one solved rollout have weight 1, as in the authors' routing; if all rollouts of a group are solved, group baselines
    give them no advantage. The authors' pseudo-advantage for groups without a solved rollout is not implemented: it
    needs a teacher pass before the batch is made.

    D / (D + c) does not depend on the size of D: if the teacher adds no information, it would lower the weights of a
    rollout to about 0.4 on average, and thereby the effective learning rate. This project's change: as the 75th
    percentile of D falls to the rounding noise (at least 1e-4), all weights go to 1, by
    `gear_lightning.gear.above_noise`.

    Args:
        top_k_tokens: number of the policy's most likely tokens over which D is computed, plus a tail bucket.

    Raises:
        UserError: values out of range; when called, rollouts without ``solved`` or without a teacher's distributions.
    """

    top_k_tokens: int = 100

    def __post_init__(self):
        if self.top_k_tokens < 1:
            raise UserError(f"SCGRPO: top_k_tokens={self.top_k_tokens} must be at least 1")

    @property
    def top_k(self) -> int:
        return self.top_k_tokens

    def __call__(self, evidence: Evidence) -> Credit:
        if evidence.solved is None:
            raise UserError(
                "SCGRPO needs the number of solved rollouts of each rollout's group (Evidence.solved), and these "
                "rollouts have none; store it with the records, or use another credit rule"
            )
        if evidence.divergence is not None:
            divergence = evidence.divergence
        else:
            divergence = gear.distribution_divergence(*top_of(evidence, self), "forward_kl")
        mask, base = evidence.action_mask, evidence.base_advantages
        weights = gear.scale_signal(divergence, mask, "saturate", advantages=base)
        noise = max(evidence.noise.divergence, gear.SATURATE_FLOOR)
        for part in gear.one_sign(base, mask):
            kept = gear.above_noise(gear.masked_quantile(divergence, part, 0.75), noise)
            weights = torch.where(part, 1 + kept * (weights - 1), weights)
        weights = torch.where(evidence.solved[:, None] == 1, 1, weights)
        return spread_credit(evidence, weights, divergence)
