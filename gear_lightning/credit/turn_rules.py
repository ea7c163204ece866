"""Credit rules with one weight per assistant turn."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import gear
from ..batch import Credit
from ..checks import check_positive, check_range
from .base import CreditAssigner, Evidence, spread_credit, teacher_of, turn_starts


def turn_sums(values: Float[Tensor, "batch seq"], starts: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
    """Return the sum over the turn of each action token; 0 elsewhere.

    Args:
        values: of each token.
        starts: as returned by `turn_starts`.
    """
    where, inside = starts.clamp_min(0), starts >= 0
    total = torch.zeros_like(values).scatter_add(-1, where, torch.where(inside, values, 0))
    return torch.where(inside, total.gather(-1, where), 0)


@dataclass(frozen=True)
class TurnSight(CreditAssigner):
    """More credit for turns that the teacher finds more likely than the rollout's others (TurnSight, arXiv 2608.04007).

    A ((1 - l) + l w) with w = 1 + e tanh(sign(A) z): z is the z-score of a turn's mean log p_T - log p_S. Defaults are
    the paper's.

    Compared with its paper, the comparison within the group and the look-ahead are missing. The paper compares a turn
    with all turns of the prompt's group; here z is over the turns of the rollout whose advantages have the same sign,
    because a rule receives one rollout at a time. A turn without another one to compare therefore has weight 1, and for
    two turns z is always 1 and -1 if their difference exceeds the rounding noise (`gear_lightning.gear.above_noise`;
    the noise of a mean of n tokens is taken as that of one token divided by the square root of n). The paper's teacher
    also sees the tool results of the next one to three turns, each in a separate view; here the teacher sees what
    ``model.teacher`` configures, in one view.

    Args:
        mix: l, share of the weighting; the rest is uniform.
        strength: e, weights before mixing stay within 1 - e and 1 + e.

    Raises:
        UserError: values out of range.
    """

    lacks = "the comparison with the group's turns, and the teacher's access to later tool results"

    mix: float = 0.5
    strength: float = 0.5

    fixed_segments = True

    @property
    def compares_turns(self) -> bool:
        return True

    def __post_init__(self):
        check_range(self, 0, 1, "mix", "strength")

    def __call__(self, evidence: Evidence) -> Credit:
        divergence = evidence.policy.logprobs - teacher_of(evidence, self).logprobs
        starts = turn_starts(evidence.action_mask, evidence.turn_ids)
        base = evidence.base_advantages
        gap = gear.segment_signal(-divergence, starts, "mean")
        first = starts == torch.arange(starts.shape[-1], device=starts.device)  # each turn counts once
        noise = evidence.noise.log_ratio / gear.segment_lengths(starts).sqrt()
        z = gear.scale_signal(gap, first, "zscore", advantages=base, noise=noise).gather(-1, starts.clamp_min(0))
        weights = 1 + self.mix * self.strength * torch.tanh(base.sign() * z)
        return spread_credit(evidence, weights, divergence, starts)


@dataclass(frozen=True)
class PBSD(CreditAssigner):
    """Turns weighed by the teacher's evidence for the whole turn (PBSD, arXiv 2606.09348).

    A (1 + sign(A) clip(tanh(s / delta), -c, c)) with s = log p_T - log p_S of the turn, that is, summed over its
    tokens: by Bayes' rule, s measures how much more likely the turn makes the answer that the teacher was shown. The
    values of delta and c are this project's own. So is the following correction: rounding errors add up over a turn,
    and s is multiplied by `gear_lightning.gear.above_noise` of its own size, where the noise of a sum of n tokens is
    taken as that of one token times the square root of n.

    Args:
        delta: nats of evidence at which the weight begins to level off.
        clip: c; weights stay within 1 - c and 1 + c.

    Raises:
        UserError: values out of range.
    """

    delta: float = 1.0
    clip: float = 0.5

    fixed_segments = True

    def __post_init__(self):
        check_positive(self, "delta")
        check_range(self, 0, 1, "clip")

    def __call__(self, evidence: Evidence) -> Credit:
        divergence = evidence.policy.logprobs - teacher_of(evidence, self).logprobs
        starts = turn_starts(evidence.action_mask, evidence.turn_ids)
        total = turn_sums(-divergence, starts)
        kept = gear.above_noise(total.abs(), evidence.noise.log_ratio * gear.segment_lengths(starts).sqrt())
        signal = torch.tanh(total * kept / self.delta)
        weights = 1 + evidence.base_advantages.sign() * signal.clamp(-self.clip, self.clip)
        return spread_credit(evidence, weights, divergence, starts, signal.abs() >= self.clip)
