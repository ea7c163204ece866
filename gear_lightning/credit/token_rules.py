"""Credit rules that weigh each token for itself."""

from dataclasses import dataclass

from .. import gear
from ..batch import Credit
from ..errors import UserError
from .base import CreditAssigner, Evidence, at_bound, mixing, spread_credit, teacher_of, top_of


@dataclass(frozen=True)
class RLSD(CreditAssigner):
    """Token-level reweighting of RLSD (arXiv 2604.03128).

    A ((1 - lambda) + lambda clip(exp(sign(A) (log p_T - log p_S)))).

    Args:
        mix: lambda.
        clip: weights within 1 - clip and 1 + clip.
        mix_decay: optimizer steps over which lambda falls to 0 (60 in the authors' released script). Null: constant.
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
class SCGRPO(CreditAssigner):
    """Weight D / (D + c) with D = KL(teacher || policy), for both signs of the advantage (SC-GRPO, arXiv 2606.18810).

    c is the rollout's 75th percentile of D, at least 1e-4; the authors take it over the micro-batch, which would make
    the gradient depend on the micro-batch size. Their routing of groups without a solved rollout is not included.

    Args:
        top_k_tokens: the policy's most likely tokens on which D is taken, plus a tail bucket.
    """

    top_k_tokens: int = 100

    def __post_init__(self):
        if self.top_k_tokens < 1:
            raise UserError(f"SCGRPO: top_k_tokens={self.top_k_tokens} must be at least 1")

    @property
    def top_k(self) -> int:
        return self.top_k_tokens

    def __call__(self, evidence: Evidence) -> Credit:
        if evidence.divergence is not None:
            divergence = evidence.divergence
        else:
            divergence = gear.distribution_divergence(*top_of(evidence, self), "forward_kl")
        weights = gear.scale_signal(divergence, evidence.action_mask, "saturate")
        return spread_credit(evidence, weights, divergence)
