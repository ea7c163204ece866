"""What a credit rule is: evidence about the rollouts of a micro-batch in, an advantage for each of their tokens out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..batch import Credit, RolloutBatch, TokenStats
from ..errors import UserError


class RoundingNoise(NamedTuple):
    """Size of what rounding alone makes, as 99th percentiles of absolute values, nats: a constant of a run, measured
    once with equal weights and nothing privileged (`gear_lightning.probes.noise_floor`). 0: not known, or none.

    Attributes:
        log_ratio: of log p_policy - log p_teacher at the sampled tokens.
        divergence: of the run's own credit rule, where that compares whole distributions.
    """

    log_ratio: float = 0.0
    divergence: float = 0.0


@dataclass(frozen=True)
class Evidence:
    """What credit is decided on: one row per rollout, one column per token (see `RolloutBatch`). All detached.

    Attributes:
        advantages: of each rollout, before credit.
        action_mask: sampled by the policy.
        turn_ids: assistant turn, -1 elsewhere.
        stop_mask: sampled stop tokens.
        policy_version: optimizer steps taken before sampling.
        policy: what the policy says about each token.
        teacher: what the teacher says; None where none ran.
        divergence: given when credit is recomputed from records whose distributions are gone; it takes the place of any
            divergence of distributions.
        privileged: where the teacher saw more than the policy; None: everywhere.
        turn_advantages: advantage of each token before credit, where the turns of a rollout have advantages of their
            own; None: the rollout's.
        decisions: 1 on tokens of a decision that the environment calls right, -1 on those of a wrong one, 0 elsewhere;
            None: the environment does not tell.
        solved: number of solved rollouts in the rollout's group; None: not known.
        noise: of rounding. Whatever takes the size out of a signal must compare that size with it (see
            `gear_lightning.gear.above_noise`), or it makes as much credit of rounding as of knowledge.
    """

    advantages: Float[Tensor, " batch"]
    action_mask: Bool[Tensor, "batch seq"]
    turn_ids: Int[Tensor, "batch seq"]
    stop_mask: Bool[Tensor, "batch seq"]
    policy_version: Int[Tensor, " batch"]
    policy: TokenStats
    teacher: TokenStats | None = None
    divergence: Float[Tensor, "batch seq"] | None = None
    privileged: Bool[Tensor, " batch"] | None = None
    turn_advantages: Float[Tensor, "batch seq"] | None = None
    decisions: Int[Tensor, "batch seq"] | None = None
    solved: Int[Tensor, " batch"] | None = None
    noise: RoundingNoise = RoundingNoise()

    @classmethod
    def of(
        cls,
        batch: RolloutBatch,
        policy: TokenStats,
        teacher: TokenStats | None,
        noise: RoundingNoise = RoundingNoise(),
    ) -> "Evidence":
        """The evidence of a micro-batch."""
        policy = replace(policy, logprobs=policy.logprobs.detach())
        if policy.top_logprobs is not None:
            policy = replace(policy, top_logprobs=policy.top_logprobs.detach())
        return cls(
            batch.advantages,
            batch.action_mask,
            batch.turn_ids,
            batch.stop_mask,
            batch.policy_version,
            policy,
            teacher,
            privileged=batch.privileged,
            turn_advantages=batch.base_advantages,
            decisions=batch.decisions,
            solved=batch.solved,
            noise=noise,
        )

    @property
    def base_advantages(self) -> Float[Tensor, "batch seq"]:
        """Advantage of each token before credit; of any value outside the action tokens."""
        if self.turn_advantages is not None:
            return self.turn_advantages
        return self.advantages[:, None].expand(self.action_mask.shape)


class CreditAssigner(ABC):
    """Turns evidence into `Credit`.

    A subclass is a frozen dataclass, named in YAML by ``class_path``. It may use statistics of one rollout or a
    constant, never of the micro-batch.

    Attributes:
        needs_teacher: whether it looks at the teacher.
        needs_decisions: whether it looks at which decisions were right, which few environments can tell.
        fixed_segments: whether its segments begin at fixed places (every turn, say), whatever the divergence there.
        lacks: what it lacks compared with the paper that it is named after, where that is too much for results under
            the paper's name; told where results are shown.
    """

    lacks: str = ""
    needs_teacher: bool = True
    needs_decisions: bool = False
    fixed_segments: bool = False

    @property
    def compares_turns(self) -> bool:
        """Whether it weighs the turns of a rollout against each other: one of a single turn has weight 1 throughout."""
        return False

    @property
    def top_k(self) -> int:
        """Number of the policy's most likely tokens to compare distributions on; 0 where sampled tokens suffice."""
        return 0

    @abstractmethod
    def __call__(self, evidence: Evidence) -> Credit:
        """Assign credit."""


def spread_credit(
    evidence: Evidence,
    weights: Float[Tensor, "batch seq"],
    divergence: Float[Tensor, "batch seq"] | None = None,
    anchor: Int[Tensor, "batch seq"] | None = None,
    clipped: Bool[Tensor, "batch seq"] | None = None,
    *,
    by_teacher: bool = True,
) -> Credit:
    """Credit with these weights.

    Args:
        evidence: what they were decided on.
        weights: any value outside the action tokens.
        divergence: nats; None: none was measured.
        anchor: see `Credit`; None: there are no segments.
        clipped: see `Credit`.
        by_teacher: the weights are the teacher's word: 1 where it was shown nothing.
    """
    mask = evidence.action_mask
    clipped = None if clipped is None else clipped & mask
    if by_teacher and evidence.privileged is not None:
        weights = torch.where(evidence.privileged[:, None], weights, 1)
        anchor = None if anchor is None else torch.where(evidence.privileged[:, None], anchor, -1)
        clipped = None if clipped is None else clipped & evidence.privileged[:, None]
    weights = torch.where(mask, weights, 1)
    advantages = torch.where(mask, weights * evidence.base_advantages, 0)
    if divergence is None:
        divergence = torch.zeros_like(weights)
    if anchor is None:
        anchor = torch.full_like(evidence.turn_ids, -1)
    return Credit(weights, advantages, torch.where(mask, divergence, 0), anchor, clipped)


def at_bound(weights: Float[Tensor, "batch seq"], clip: float) -> Bool[Tensor, "batch seq"]:
    """Where weights, as they come from `gear_lightning.gear.signal_weights`, sit at a bound of the clip."""
    return (weights == 1 - clip) | (weights == 1 + clip)


def teacher_of(evidence: Evidence, rule: object) -> TokenStats:
    """The teacher's stats.

    Raises:
        UserError: there are none.
    """
    if evidence.teacher is None:
        raise UserError(f"{type(rule).__name__} needs the teacher's log-probs, and these rollouts have none")
    return evidence.teacher


def top_of(evidence: Evidence, rule: CreditAssigner) -> tuple[Tensor, Tensor]:
    """Log-probs of the policy's ``rule.top_k`` most likely tokens under the policy and under the teacher.

    Raises:
        UserError: they were not kept.
    """
    top, teacher_top = evidence.policy.top_logprobs, teacher_of(evidence, rule).top_logprobs
    if top is None or teacher_top is None:
        raise UserError(f"{type(rule).__name__} compares whole distributions, and these rollouts have none")
    return top[..., : rule.top_k], teacher_top[..., : rule.top_k]  # sorted: a larger k may have been asked for


def turn_starts(mask: Bool[Tensor, "batch seq"], turn_ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """Index of the first action token of each action token's turn; -1 elsewhere."""
    where = torch.arange(turn_ids.shape[-1], device=turn_ids.device).expand_as(turn_ids)
    turns = torch.where(mask, turn_ids, -1)
    previous = torch.nn.functional.pad(turns.cummax(-1).values[:, :-1], (1, 0), value=-1)
    first = torch.where(mask & (turn_ids > previous), where, -1).cummax(-1).values
    return torch.where(mask, first, -1)


def mixing(mix: float, decay: int | None, version: Int[Tensor, " batch"]) -> Float[Tensor, "batch 1"]:
    """Share of the weighting after ``version`` optimizer steps: ``mix``, falling linearly to 0 over ``decay`` steps."""
    if decay is None:
        return torch.full_like(version, 1, dtype=torch.float32)[:, None] * mix
    return mix * (1 - version.float() / decay).clamp_min(0)[:, None]


@dataclass(frozen=True)
class Uniform(CreditAssigner):
    """The same advantage for every token of a rollout, or of a turn where turns have their own: plain GRPO.

    Runs no teacher.
    """

    needs_teacher = False

    def __call__(self, evidence: Evidence) -> Credit:
        return spread_credit(evidence, torch.ones_like(evidence.policy.logprobs), by_teacher=False)
