"""The interface between rollout generation and learning: rollouts as tensors, and the credit assigned to them."""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

REASONING, CALL = 1, 2  # values of the column ``parts``: tokens of reasoning, and of tool calls


@dataclass(frozen=True)
class RolloutRow:
    """One rollout as plain lists, ready to be collated.

    Attributes:
        tokens: prompt, actions and observations.
        action_mask: True where the policy sampled the token.
        turn_ids: assistant turn of sampled tokens, -1 elsewhere.
        stop_mask: True on sampled stop tokens.
        sampler_logprobs: nats; 0 on tokens that were not sampled.
        prompt_length: tokens before the first response token.
        teacher_prompt: ids of the privileged prompt; the policy's own prompt if there is no privileged text.
        reward: total outcome reward.
        success: whether the task counts as solved.
        advantage: advantage of the rollout in its group.
        turn_advantages: advantage of each assistant turn, if turns have their own; None: all have ``advantage``.
        decisions: per token, 1 in a right decision, -1 in a wrong one, 0 elsewhere; None: not known.
        parts: per token, `REASONING` or `CALL` (a tool call) on sampled tokens, 0 elsewhere; None: not known.
        versions: per token, the policy version that sampled it, up to the last sampled token; None: all have
            ``policy_version``.
        solved: number of solved rollouts in the group.
        group_id: number of the group in the run.
        policy_version: optimizer steps taken before sampling (before its first turn).
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
    parts: list[int] | None = None
    versions: list[int] | None = None

    @property
    def length(self) -> int:
        """Number of tokens in the policy's view."""
        return len(self.tokens)

    @property
    def teacher_length(self) -> int:
        """Number of tokens in the teacher's view: the privileged prompt, and the rollout without its own prompt."""
        return len(self.teacher_prompt) + len(self.tokens) - self.prompt_length

    @cached_property
    def columns(self) -> dict[str, Tensor]:
        """The token columns of `RolloutBatch`, without padding. Cached, because the device waits during collation, and
        a row is collated again in every inner epoch."""
        tokens, turns = _tensor(self.tokens, np.int64), _tensor(self.turn_ids, np.int64)
        mask = _tensor(self.action_mask, np.bool_)
        if self.turn_advantages is None:
            base = torch.where(mask, torch.tensor(self.advantage, dtype=torch.float32), 0.0)
        else:
            base = torch.zeros(len(turns))
            base[turns >= 0] = torch.tensor(self.turn_advantages, dtype=torch.float32)[turns[turns >= 0]]
        return {
            "tokens": tokens,
            "valid": torch.ones(len(tokens), dtype=torch.bool),
            "action_mask": mask,
            "turn_ids": turns,
            "stop_mask": _tensor(self.stop_mask, np.bool_),
            "sampler_logprobs": _tensor(self.sampler_logprobs, np.float32),
            "base_advantages": base,
            "decisions": torch.zeros_like(tokens) if not self.decisions else _tensor(self.decisions, np.int64),
            "parts": torch.zeros_like(tokens) if not self.parts else _tensor(self.parts, np.int64),
            "versions": self._versions(mask),
            "teacher_tokens": torch.cat([_tensor(self.teacher_prompt, np.int64), tokens[self.prompt_length :]]),
            "teacher_valid": torch.ones(self.teacher_length, dtype=torch.bool),
        }

    def _versions(self, mask: Tensor) -> Tensor:
        if not self.versions:
            return torch.where(mask, self.policy_version, -1)
        known = _tensor(self.versions, np.int64)
        return torch.where(mask, torch.nn.functional.pad(known, (0, len(mask) - len(known)), value=-1), -1)


def _tensor(values: list, kind: type[np.generic]) -> Tensor:
    # several times faster than torch.tensor of a list
    return torch.from_numpy(np.fromiter(values, kind, len(values)))


@dataclass(frozen=True)
class RolloutBatch:
    """A micro-batch of rollouts. Entry t of a ``[batch, seq]`` tensor belongs to token t; rows are right-padded.

    ``step_tokens`` and ``step_rollouts`` are the denominators of the loss: they count the action tokens and the
    rollouts of the whole optimizer step, over all micro-batches and ranks. ``index`` is the row's position in its
    rank's iteration, -1 for a blank row (a rank without learnable rollouts still takes part in the step).
    ``privileged`` rows have a teacher's view that differs from the policy's; all other rows get uniform credit.
    ``base_advantages`` are the advantages of the action tokens before credit: those of the rollout or of the turn.
    ``decisions`` is 1 on tokens of decisions that the environment judged right, -1 on those judged wrong, 0 elsewhere.
    ``parts`` is `REASONING` or `CALL` (a tool call) on sampled tokens, 0 elsewhere; a turn's stop token belongs to what
    it ends. ``versions`` is the policy version that sampled a token, -1 elsewhere; ``policy_version`` that of the
    rollout's first turn. ``solved`` counts the solved rollouts of the row's group. The rows take part in
    ``inner_epochs`` optimizer steps; ``inner_epoch`` is the index of this one, from 0.
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
    parts: Int[Tensor, "batch seq"]
    versions: Int[Tensor, "batch seq"]
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
    inner_epochs: int = 1

    def to(self, device: torch.device | str, **kwargs) -> "RolloutBatch":
        """Return the batch with its tensors on ``device`` (called by Lightning)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, **kwargs) for k, v in values.items() if isinstance(v, Tensor)})

    @property
    def size(self) -> int:
        """Number of rows, including blank rows."""
        return self.tokens.shape[0]


class Sealed:
    """Wraps a batch so that Lightning's precision plugins do not convert it: they would cast rewards, advantages and
    log-probs to the precision of the weights, and they do not support frozen dataclasses."""

    def __init__(self, batch: RolloutBatch):
        self.batch = batch


@dataclass(frozen=True)
class TokenStats:
    """Per-token statistics of one model: detached if used as evidence, attached to the graph if used for training.

    ``logprobs`` and ``entropy`` (nats) are 0 outside the requested tokens. ``top_ids`` and ``top_logprobs`` describe
    the distribution of token t, restricted to the policy's most likely tokens.
    """

    logprobs: Float[Tensor, "batch seq"]
    entropy: Float[Tensor, "batch seq"]
    top_ids: Int[Tensor, "batch seq top"] | None = None
    top_logprobs: Float[Tensor, "batch seq top"] | None = None


@dataclass(frozen=True)
class Credit:
    """Credit of each token: its share of the group advantage. All tensors are detached.

    Attributes:
        weights: never negative; 1 outside the action tokens.
        token_advantages: weight x group advantage on action tokens, 0 elsewhere.
        divergence: the divergence that the rule used, in nats (signed for k1); 0 outside the action tokens.
        anchor: index of the anchor token of the token's segment, -1 outside segments.
        clipped: tokens whose weight the rule's clip determined; None for a rule without a clip.
    """

    weights: Float[Tensor, "batch seq"]
    token_advantages: Float[Tensor, "batch seq"]
    divergence: Float[Tensor, "batch seq"]
    anchor: Int[Tensor, "batch seq"]
    clipped: Bool[Tensor, "batch seq"] | None = None


def _pad(parts: list[Tensor], fill: int) -> Tensor:
    padded = parts[0].new_full((len(parts), max(map(len, parts))), fill)
    for row, part in zip(padded, parts, strict=True):
        row[: len(part)] = part
    return padded


FILL = {"turn_ids": -1, "versions": -1}  # values of padding other than 0


def collate(
    rows: list[RolloutRow],
    *,
    step_tokens: int,
    step_rollouts: int,
    temperature: float,
    inner_epoch: int = 0,
    inner_epochs: int = 1,
) -> RolloutBatch:
    """Return a micro-batch of rows. Without rows, it has one blank row that contributes 0 to every sum."""
    blank = RolloutRow([0, 0], [False] * 2, [-1] * 2, [False] * 2, [0.0] * 2, 1, [0], 0.0, False, 0.0, -1, 0, -1)
    real, rows = bool(rows), rows or [blank]
    columns = {name: _pad([r.columns[name] for r in rows], FILL.get(name, 0)) for name in rows[0].columns}
    for name in () if real else ("valid", "teacher_valid"):
        columns[name].zero_()
    return RolloutBatch(
        **columns,
        rewards=torch.tensor([r.reward for r in rows], dtype=torch.float32),
        success=torch.tensor([r.success for r in rows], dtype=torch.bool),
        advantages=torch.tensor([r.advantage for r in rows], dtype=torch.float32),
        solved=torch.tensor([r.solved for r in rows]),
        group_ids=torch.tensor([r.group_id for r in rows]),
        policy_version=torch.tensor([r.policy_version for r in rows]),
        index=torch.tensor([r.index for r in rows]),
        teacher_offset=torch.tensor([len(r.teacher_prompt) - r.prompt_length for r in rows]),
        privileged=torch.tensor([r.teacher_prompt != r.tokens[: r.prompt_length] for r in rows]),
        step_tokens=torch.tensor(step_tokens),
        step_rollouts=torch.tensor(step_rollouts),
        temperature=temperature,
        inner_epoch=inner_epoch,
        inner_epochs=inner_epochs,
    )
