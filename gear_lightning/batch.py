"""The one room where the rollout wing and the learning wing meet: tensors of rollouts, and the credit given to them."""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class RolloutRow:
    """One rollout as plain lists, ready to be collated.

    Attributes:
        tokens: prompt, actions and observations.
        action_mask: True where the policy sampled the token.
        turn_ids: assistant turn of sampled tokens, -1 elsewhere.
        stop_mask: True on sampled stop tokens.
        sampler_logprobs: nats; 0 where not sampled.
        prompt_length: tokens before the first response token.
        teacher_prompt: ids of the privileged prompt; the policy's own prompt where there is no privileged text.
        reward: total outcome reward.
        success: whether the task counts as solved.
        advantage: after the group baseline.
        turn_advantages: of each assistant turn, where turns have advantages of their own; None: ``advantage``.
        decisions: per token, 1 in a decision that was right, -1 in one that was wrong, 0 elsewhere; None: not known.
        solved: solved rollouts of the group.
        group_id: number of the group in the run.
        policy_version: optimizer steps taken before sampling.
        index: position among this rank's rollouts of the iteration.
    """

    tokens: list[int]
    action_mask: list[bool]
    turn_ids: list[int]
    stop_mask: list[bool]
    sampler_logprobs: list[float]
    prompt_length: int
    teacher_prompt: list[int]
    reward: float
    success: bool
    advantage: float
    group_id: int
    policy_version: int
    index: int
    turn_advantages: list[float] | None = None
    decisions: list[int] | None = None
    solved: int = 0

    @property
    def length(self) -> int:
        """Tokens of the policy's view."""
        return len(self.tokens)

    @property
    def teacher_length(self) -> int:
        """Tokens of the teacher's view: the privileged prompt, and the rollout after its own prompt."""
        return len(self.teacher_prompt) + len(self.tokens) - self.prompt_length


@dataclass(frozen=True)
class RolloutBatch:
    """A micro-batch of rollouts. Entry t of a ``[batch, seq]`` tensor is about token t; rows are right-padded.

    ``step_tokens`` and ``step_rollouts`` count the action tokens and the rollouts of the whole optimizer step, over all
    micro-batches and ranks: the denominators of the loss. ``index`` is the row's place in its rank's iteration, -1 for
    a blank row (a rank with nothing to learn still takes part in the step). ``privileged`` rows have a teacher's view
    that differs from the policy's; the others get uniform credit. ``base_advantages`` are those of the action tokens
    before credit: the rollout's, or their turn's. ``decisions`` is 1 on tokens of decisions that the environment calls
    right, -1 on those of wrong ones; ``solved`` counts the solved rollouts of the row's group.
    """

    tokens: Int[Tensor, "batch seq"]
    valid: Bool[Tensor, "batch seq"]
    action_mask: Bool[Tensor, "batch seq"]
    turn_ids: Int[Tensor, "batch seq"]
    stop_mask: Bool[Tensor, "batch seq"]
    sampler_logprobs: Float[Tensor, "batch seq"]
    rewards: Float[Tensor, " batch"]
    success: Bool[Tensor, " batch"]
    advantages: Float[Tensor, " batch"]
    base_advantages: Float[Tensor, "batch seq"]
    decisions: Int[Tensor, "batch seq"]
    solved: Int[Tensor, " batch"]
    group_ids: Int[Tensor, " batch"]
    policy_version: Int[Tensor, " batch"]
    index: Int[Tensor, " batch"]
    teacher_tokens: Int[Tensor, "batch teacher_seq"]
    teacher_valid: Bool[Tensor, "batch teacher_seq"]
    teacher_offset: Int[Tensor, " batch"]
    privileged: Bool[Tensor, " batch"]
    step_tokens: Int[Tensor, ""]
    step_rollouts: Int[Tensor, ""]
    temperature: float
    inner_epoch: int = 0

    def to(self, device: torch.device | str, **kwargs) -> "RolloutBatch":
        """The batch with its tensors on ``device`` (Lightning calls this)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, **kwargs) for k, v in values.items() if isinstance(v, Tensor)})

    @property
    def size(self) -> int:
        """Number of rows, blank ones included."""
        return self.tokens.shape[0]


class Sealed:
    """A batch on its way to the module, past Lightning's precision plugins: they would cast its rewards, advantages and
    log-probs to the precision of the weights, and do not take frozen dataclasses."""

    def __init__(self, batch: RolloutBatch):
        self.batch = batch


@dataclass(frozen=True)
class TokenStats:
    """What one model says about each token, detached where it is evidence and attached where it is trained.

    ``logprobs`` and ``entropy`` (nats) are 0 outside the tokens that were asked for. ``top_ids`` and ``top_logprobs``
    describe the distribution from which token t was drawn, by the policy's most likely tokens.
    """

    logprobs: Float[Tensor, "batch seq"]
    entropy: Float[Tensor, "batch seq"]
    top_ids: Int[Tensor, "batch seq top"] | None = None
    top_logprobs: Float[Tensor, "batch seq top"] | None = None


@dataclass(frozen=True)
class Credit:
    """Where the group advantage goes. All tensors are detached.

    Attributes:
        weights: 1 outside the action tokens; never negative.
        token_advantages: weight x group advantage on action tokens, 0 elsewhere.
        divergence: as the rule used it, in nats (signed for k1); 0 outside the action tokens.
        anchor: index of the anchor token of the segment that a token is in, -1 outside segments.
        clipped: where the rule's clip decided the weight; None for a rule without one.
    """

    weights: Float[Tensor, "batch seq"]
    token_advantages: Float[Tensor, "batch seq"]
    divergence: Float[Tensor, "batch seq"]
    anchor: Int[Tensor, "batch seq"]
    clipped: Bool[Tensor, "batch seq"] | None = None


def _base(row: RolloutRow) -> list[float]:
    if row.turn_advantages is None:
        return [row.advantage if sampled else 0.0 for sampled in row.action_mask]
    return [row.turn_advantages[turn] if turn >= 0 else 0.0 for turn in row.turn_ids]


def _pad(rows: list[list], fill, dtype: torch.dtype) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=dtype)


def collate(
    rows: list[RolloutRow], *, step_tokens: int, step_rollouts: int, temperature: float, inner_epoch: int = 0
) -> RolloutBatch:
    """Make a micro-batch of rows; no rows give one blank row that adds nothing to any sum."""
    blank = RolloutRow([0, 0], [False] * 2, [-1] * 2, [False] * 2, [0.0] * 2, 1, [0], 0.0, False, 0.0, -1, 0, -1)
    real, rows = bool(rows), rows or [blank]
    teacher = [row.teacher_prompt + row.tokens[row.prompt_length :] for row in rows]
    return RolloutBatch(
        tokens=_pad([r.tokens for r in rows], 0, torch.long),
        valid=_pad([[real] * len(r.tokens) for r in rows], False, torch.bool),
        action_mask=_pad([r.action_mask for r in rows], False, torch.bool),
        turn_ids=_pad([r.turn_ids for r in rows], -1, torch.long),
        stop_mask=_pad([r.stop_mask for r in rows], False, torch.bool),
        sampler_logprobs=_pad([r.sampler_logprobs for r in rows], 0.0, torch.float32),
        rewards=torch.tensor([r.reward for r in rows], dtype=torch.float32),
        success=torch.tensor([r.success for r in rows], dtype=torch.bool),
        advantages=torch.tensor([r.advantage for r in rows], dtype=torch.float32),
        base_advantages=_pad([_base(r) for r in rows], 0.0, torch.float32),
        decisions=_pad([r.decisions or [0] * len(r.tokens) for r in rows], 0, torch.long),
        solved=torch.tensor([r.solved for r in rows]),
        group_ids=torch.tensor([r.group_id for r in rows]),
        policy_version=torch.tensor([r.policy_version for r in rows]),
        index=torch.tensor([r.index for r in rows]),
        teacher_tokens=_pad(teacher, 0, torch.long),
        teacher_valid=_pad([[real] * len(t) for t in teacher], False, torch.bool),
        teacher_offset=torch.tensor([len(r.teacher_prompt) - r.prompt_length for r in rows]),
        privileged=torch.tensor([r.teacher_prompt != r.tokens[: r.prompt_length] for r in rows]),
        step_tokens=torch.tensor(step_tokens),
        step_rollouts=torch.tensor(step_rollouts),
        temperature=temperature,
        inner_epoch=inner_epoch,
    )
