"""Interface of credit rules: from evidence about the rollouts of a micro-batch to an advantage for each token."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..batch import CALL, REASONING, Credit, RolloutBatch, TokenStats
from ..errors import UserError


class RoundingNoise(NamedTuple):
    """Size of the differences that rounding alone produces: 99th percentiles of absolute values, in nats.

    A constant of the run, measured once with equal weights and no privileged text
    (`gear_lightning.probes.noise_floor`). 0: not known, or no noise.

    Attributes:
        log_ratio: of log p_policy - log p_teacher at the sampled tokens.
        divergence: of the run's own credit rule, if it compares full distributions.
    """

    log_ratio: float = 0.0
    divergence: float = 0.0


@dataclass(frozen=True)
class Evidence:
    """Input of a credit rule: one row per rollout, one column per token (see `RolloutBatch`). All tensors are detached.

    Attributes:
        advantages: of each rollout, before credit.
        action_mask: tokens sampled by the policy.
        turn_ids: assistant turn, -1 elsewhere.
        stop_mask: sampled stop tokens.
        policy_version: optimizer steps taken before sampling.
        policy: the policy's statistics of each token.
        teacher: the teacher's statistics; None if no teacher ran.
        divergence: set when credit is recomputed from records that do not contain the distributions; it replaces any
            divergence of distributions.
        privileged: rollouts for which the teacher saw more than the policy; None: all of them.
        turn_advantages: advantage of each token before credit, if the turns of a rollout have advantages of their own;
            None: the rollout's advantage applies to every token.
        decisions: 1 on tokens of a decision that the environment marks as right, -1 on those of a wrong one, 0
            elsewhere; None: the environment does not label decisions.
        solved: number of solved rollouts in the rollout's group; None: not known.
        parts: 1 on tokens of reasoning, 2 on those of tool calls, 0 elsewhere; None: not known.
        noise: of rounding. Code that removes the size of a signal must compare that size with this noise (see
            `gear_lightning.gear.above_noise`); otherwise it assigns as much credit to rounding as to real differences.
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
    parts: Int[Tensor, "batch seq"] | None = None
    noise: RoundingNoise = RoundingNoise()

    @classmethod
    def of(
        cls,
        batch: RolloutBatch,
        policy: TokenStats,
        teacher: TokenStats | None,
        noise: RoundingNoise = RoundingNoise(),
    ) -> "Evidence":
        """Return the evidence of a micro-batch."""
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
            parts=batch.parts,
            noise=noise,
        )

    @property
    def base_advantages(self) -> Float[Tensor, "batch seq"]:
        """Advantage of each token before credit; the value outside the action tokens is arbitrary."""
        if self.turn_advantages is not None:
            return self.turn_advantages
        return self.advantages[:, None].expand(self.action_mask.shape)

    def within(self, scope: Bool[Tensor, "batch seq"]) -> "Evidence":
        """Return the evidence in which only the tokens of ``scope`` are action tokens."""

        def only(values: Any) -> Any:
            if values is None:
                return None
            return torch.where(scope.reshape(*scope.shape, *[1] * (values.dim() - 2)), values, 0)

        def stats(given: TokenStats | None) -> Any:
            return given and TokenStats(*(only(getattr(given, f.name)) for f in fields(TokenStats)))

        return replace(
            self,
            action_mask=scope,
            turn_ids=torch.where(scope, self.turn_ids, -1),
            stop_mask=self.stop_mask & scope,
            policy=stats(self.policy),
            teacher=stats(self.teacher),
            divergence=only(self.divergence),
            turn_advantages=only(self.turn_advantages),
            decisions=only(self.decisions),
            parts=only(self.parts),
        )


Rule = Callable[["CreditAssigner", Evidence], Credit]


def _scoped(rule: Rule) -> Rule:
    """Return a rule's ``__call__`` that follows the option ``where``."""

    @wraps(rule)
    def call(self: "CreditAssigner", evidence: Evidence) -> Credit:
        if self.where == "all":
            return rule(self, evidence)
        scope = self.scope(evidence)
        found = rule(self, evidence.within(scope))
        outside = torch.where(evidence.action_mask, evidence.base_advantages, 0)
        return Credit(
            torch.where(scope, found.weights, 1),
            torch.where(scope, found.token_advantages, outside),
            torch.where(scope, found.divergence, 0),
            torch.where(scope, found.anchor, -1),
            None if found.clipped is None else found.clipped & scope,
        )

    return call


@dataclass(frozen=True)
class CreditAssigner(ABC):
    """Computes `Credit` from `Evidence`.

    A subclass is a frozen dataclass, named in YAML by ``class_path``. It may use statistics of one rollout or a
    constant, never statistics of the micro-batch. It need not know ``where``: calling a rule passes evidence in which
    only the tokens of the scope are action tokens.

    Args:
        where: the tokens that the rule weighs: ``all`` sampled tokens, those of the ``answer`` (everything but the
            reasoning), or those of ``actions`` (tool calls). The others keep a weight of 1, that is, the advantage of
            GRPO, and the rule computes as if they were not sampled. A turn's stop token belongs to what it ends.

    Attributes:
        needs_teacher: whether the rule reads the teacher's statistics.
        needs_decisions: whether the rule reads which decisions were right; few environments provide this.
        fixed_segments: whether its segments begin at fixed places (for example at every turn), whatever the divergence
            there.
        lacks: which parts of the paper the rule is named after are missing, if the difference is too large to report
            results under the paper's name; shown next to results.
    """

    where: Literal["all", "answer", "actions"] = field(default="all", kw_only=True)

    lacks: ClassVar[str] = ""
    needs_teacher: ClassVar[bool] = True
    needs_decisions: ClassVar[bool] = False
    fixed_segments: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in vars(cls):
            cls.__call__ = _scoped(vars(cls)["__call__"])  # pyright: ignore[reportAttributeAccessIssue]

    def scope(self, tokens: "Evidence | RolloutBatch") -> Bool[Tensor, "batch seq"]:
        """Return the action tokens that the rule weighs, see ``where``.

        Raises:
            UserError: an unknown ``where``, or evidence without the column ``parts``.
        """
        if self.where == "all":
            return tokens.action_mask
        if self.where not in ("answer", "actions"):
            raise UserError(f"{type(self).__name__}: where={self.where} must be all, answer or actions")
        if tokens.parts is None:
            raise UserError(
                f"{type(self).__name__}: where={self.where} needs to know which tokens are reasoning and tool calls "
                "(Evidence.parts), and these rollouts have no such column"
            )
        inside = tokens.parts == CALL if self.where == "actions" else tokens.parts != REASONING
        return tokens.action_mask & inside

    @property
    def compares_turns(self) -> bool:
        """Whether the rule compares the turns of a rollout: one with a single turn then has weights of 1."""
        return False

    @property
    def top_k(self) -> int:
        """Number of the policy's most likely tokens to compare distributions on; 0 if sampled tokens suffice."""
        return 0

    @abstractmethod
    def __call__(self, evidence: Evidence) -> Credit:
        """Return the credit of each token."""


def spread_credit(
    evidence: Evidence,
    weights: Float[Tensor, "batch seq"],
    divergence: Float[Tensor, "batch seq"] | None = None,
    anchor: Int[Tensor, "batch seq"] | None = None,
    clipped: Bool[Tensor, "batch seq"] | None = None,
    *,
    by_teacher: bool = True,
) -> Credit:
    """Return the credit with these weights.

    Args:
        evidence: the evidence from which the weights were computed.
        weights: values outside the action tokens are arbitrary.
        divergence: nats; None: not measured.
        anchor: see `Credit`; None: there are no segments.
        clipped: see `Credit`.
        by_teacher: the weights depend on the teacher: they are set to 1 for rollouts without privileged text.
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
    """Return where weights, as returned by `gear_lightning.gear.signal_weights`, are at a bound of the clip."""
    return (weights == 1 - clip) | (weights == 1 + clip)


def teacher_of(evidence: Evidence, rule: object) -> TokenStats:
    """Return the teacher's statistics.

    Raises:
        UserError: the evidence contains none.
    """
    if evidence.teacher is None:
        raise UserError(f"{type(rule).__name__} needs the teacher's log-probs, and these rollouts have none")
    return evidence.teacher


def top_of(evidence: Evidence, rule: CreditAssigner) -> tuple[Tensor, Tensor]:
    """Return log-probs of the policy's ``rule.top_k`` most likely tokens under the policy and under the teacher.

    Raises:
        UserError: the evidence contains no distributions.
    """
    top, teacher_top = evidence.policy.top_logprobs, teacher_of(evidence, rule).top_logprobs
    if top is None or teacher_top is None:
        raise UserError(f"{type(rule).__name__} compares full distributions, and these rollouts have none")
    return top[..., : rule.top_k], teacher_top[..., : rule.top_k]  # sorted by probability; the stored k may be larger


def turn_starts(mask: Bool[Tensor, "batch seq"], turn_ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """Return the index of the first action token of each action token's turn; -1 elsewhere."""
    where = torch.arange(turn_ids.shape[-1], device=turn_ids.device).expand_as(turn_ids)
    turns = torch.where(mask, turn_ids, -1)
    previous = torch.nn.functional.pad(turns.cummax(-1).values[:, :-1], (1, 0), value=-1)
    first = torch.where(mask & (turn_ids > previous), where, -1).cummax(-1).values
    return torch.where(mask, first, -1)


def mixing(mix: float, decay: int | None, version: Int[Tensor, " batch"]) -> Float[Tensor, "batch 1"]:
    """Return the share of the weighting after ``version`` optimizer steps.

    It starts at ``mix`` and decays linearly to 0 over ``decay`` steps.
    """
    if decay is None:
        return torch.full_like(version, 1, dtype=torch.float32)[:, None] * mix
    return mix * (1 - version.float() / decay).clamp_min(0)[:, None]


@dataclass(frozen=True)
class Uniform(CreditAssigner):
    """The same advantage for every token of a rollout, or of a turn if turns have their own advantages: plain GRPO.

    Runs no teacher.

    Raises:
        UserError: ``where`` is set: every weight is 1 anyway.
    """

    needs_teacher = False

    def __post_init__(self):
        if self.where != "all":
            raise UserError(
                f"Uniform: where={self.where} does nothing, because all weights are 1; set it to all, or use another "
                "rule"
            )

    def __call__(self, evidence: Evidence) -> Credit:
        return spread_credit(evidence, torch.ones_like(evidence.policy.logprobs), by_teacher=False)
