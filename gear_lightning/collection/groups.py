"""Groups of rollouts: whether they have a learning signal, their rows, and their exchange between ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ..advantage import GroupAdvantage
from ..batch import RolloutRow
from ..distributed.collective import gather, place
from ..environments.base import Task
from ..rollout import Rollout, RolloutGroup

Truncated = Literal["learn", "mask"]


@dataclass(frozen=True)
class Signal:
    """Decides which groups have a learning signal.

    Attributes:
        advantage: the group advantage.
        truncated: see `RolloutDataModule`.
    """

    advantage: GroupAdvantage
    truncated: Truncated

    def __call__(self, group: RolloutGroup) -> bool:
        """Return whether the group has a learning signal."""
        inputs = advantage_inputs(group)
        if not self.advantage.has_signal(*inputs):
            return False
        usable = [r for r in group.rollouts if r.learnable]
        if not any(map(self.masked, usable)):
            return True
        turns = self.advantage.of_turns(*inputs) or [[a] for a in self.advantage(inputs[0]).tolist()]
        return any(a != 0 for r, row in zip(usable, turns, strict=True) if not self.masked(r) for a in row)

    def masked(self, rollout: Rollout) -> bool:
        """Return whether the rollout counts in no loss."""
        return self.truncated == "mask" and rollout.status == "truncated"


def advantage_inputs(group: RolloutGroup) -> tuple[torch.Tensor, list[list[float]], list[list[str]]]:
    """Return the inputs of an advantage: rewards, rewards of turns, and states of the learnable rollouts."""
    usable = [r for r in group.rollouts if r.learnable]
    rewards = torch.tensor([r.reward for r in usable], dtype=torch.float32)
    return rewards, [r.turn_rewards for r in usable], [r.states for r in usable]


def make_row(
    rollout: Rollout,
    teacher_prompt: list[int],
    advantage: float,
    group_id: int,
    index: int,
    solved: int = 0,
    turn_advantages: list[float] | None = None,
) -> RolloutRow:
    """Return a rollout as a row of a batch."""
    return RolloutRow(
        tokens=rollout.tokens or [0],
        action_mask=rollout.action_mask or [False],
        turn_ids=rollout.turn_ids or [-1],
        stop_mask=rollout.stop_mask or [False],
        sampler_logprobs=rollout.sampler_logprobs or [0.0],
        prompt_length=rollout.prompt_length,
        teacher_prompt=teacher_prompt,
        reward=rollout.reward,
        success=rollout.success and rollout.learnable,
        advantage=advantage,
        group_id=group_id,
        policy_version=rollout.policy_version,
        index=index,
        turn_advantages=turn_advantages,
        decisions=rollout.decisions or None,
        solved=solved,
        parts=rollout.parts or None,
        versions=rollout.versions or None,
    )


def plan_moves(counts: list[int], share: int) -> list[tuple[int, int]]:
    """Return which ranks give a group to which: (giver, taker) for each group, so that no rank that lacks groups is
    left with fewer than ``share`` while another has more.

    Args:
        counts: number of groups of each rank.
        share: number that each rank needs.
    """
    givers = [rank for rank, count in enumerate(counts) for _ in range(count - share)]
    takers = [rank for rank, count in enumerate(counts) for _ in range(share - count)]
    return list(zip(givers, takers, strict=False))


def spread(groups: list[RolloutGroup], share: int, task_of: Callable[[int], Task]) -> list[RolloutGroup]:
    """Return this rank's groups after ranks with more than ``share`` have given some to ranks with fewer. All ranks
    must call it.

    Args:
        groups: this rank's groups with a signal.
        share: number that each rank needs.
        task_of: returns the task of a group's number.
    """
    rank, _ = place()
    moves = plan_moves(gather(len(groups)), share)
    if not moves:
        return groups
    give = sum(giver == rank for giver, _ in moves)
    kept, given = groups[: len(groups) - give], groups[len(groups) - give :]
    sent = gather([(group.group_id, [r.state_dict() for r in group.rollouts]) for group in given])
    for giver, taker in moves:
        number, states = sent[giver].pop(0)
        if taker == rank:
            task = task_of(number)
            kept.append(RolloutGroup(task, number, [Rollout.from_state_dict(state, task) for state in states]))
    return kept
