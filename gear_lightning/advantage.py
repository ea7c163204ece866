"""Group advantages: compute one advantage per rollout, or one per turn, from the rewards of a task's rollouts."""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .checks import check_range
from .errors import UserError


class GroupAdvantage(ABC):
    """Computes the advantage of each rollout of one group, or of each of its turns. Arguments contain only the usable
    rollouts."""

    min_group: int = 2

    @abstractmethod
    def __call__(self, rewards: Float[Tensor, " group"]) -> Float[Tensor, " group"]:
        """Return the advantages; zeros if the rewards have no spread or there are fewer than ``min_group`` rollouts."""

    def of_turns(
        self, rewards: Float[Tensor, " group"], turn_rewards: list[list[float]], states: list[list[str]]
    ) -> list[list[float]] | None:
        """Return the advantages of the turns of each rollout; None: every turn has its rollout's advantage.

        Args:
            rewards: reward of each rollout.
            turn_rewards: reward of each turn of each rollout; those of a rollout sum to its reward.
            states: name of the state in which each turn of each rollout began; equal states have equal names.
        """
        return None

    def complaint(self, turn_rewards: list[list[float]]) -> str | None:
        """Return a warning if the method is not suited to an iteration's rewards; None if it is.

        Args:
            turn_rewards: reward of each turn of each rollout of the iteration.
        """
        return None

    def has_signal(
        self, rewards: Float[Tensor, " group"], turn_rewards: list[list[float]], states: list[list[str]]
    ) -> bool:
        """Return whether the group has a learning signal (arguments: see `of_turns`).

        If turns have advantages of their own, one of them must not be 0. Otherwise the rewards must differ.
        """
        turns = self.of_turns(rewards, turn_rewards, states)
        return has_spread(rewards) if turns is None else any(a != 0 for rollout in turns for a in rollout)

    def check_group_size(self, size: int) -> None:
        """Raise if groups of ``size`` can never have a signal.

        Raises:
            UserError: the group is too small.
        """
        if size < self.min_group:
            raise UserError(
                f"group_size={size}: {type(self).__name__} needs rollouts to compare; use at least {self.min_group}"
            )


def has_spread(rewards: Float[Tensor, " group"]) -> bool:
    """Return whether the rewards differ. Compares for equality, because the standard deviation of equal floats need not
    be 0."""
    return rewards.numel() > 1 and bool((rewards != rewards[0]).any())


@dataclass(frozen=True)
class GRPO(GroupAdvantage):
    """(R - mean) / (std + eps), with n - 1 in the standard deviation (arXiv 2402.03300).

    Args:
        eps: added to the standard deviation.

    Raises:
        UserError: ``eps`` below 0, or not finite.
    """

    eps: float = 1e-6

    def __post_init__(self):
        check_range(self, 0, math.inf, "eps")

    def __call__(self, rewards: Float[Tensor, " group"]) -> Float[Tensor, " group"]:
        if not has_spread(rewards):
            return torch.zeros_like(rewards)
        return (rewards - rewards.mean()) / (rewards.std() + self.eps)


@dataclass(frozen=True)
class DrGRPO(GroupAdvantage):
    """R - mean, not divided by the standard deviation (arXiv 2503.20783)."""

    def __call__(self, rewards: Float[Tensor, " group"]) -> Float[Tensor, " group"]:
        return rewards - rewards.mean() if has_spread(rewards) else torch.zeros_like(rewards)


@dataclass(frozen=True)
class LeaveOneOut(GroupAdvantage):
    """R - mean of the other rollouts (RLOO, arXiv 2402.14740)."""

    def __call__(self, rewards: Float[Tensor, " group"]) -> Float[Tensor, " group"]:
        if not has_spread(rewards):
            return torch.zeros_like(rewards)
        n = rewards.numel()
        return rewards - (rewards.sum() - rewards) / (n - 1)


def among_equals(
    values: list[list[float]], keys: Sequence[Sequence[Hashable]], rule: GroupAdvantage
) -> list[list[float]]:
    """Return the advantage of each turn relative to the group's turns with an equal key; 0 for a key that occurs once.

    Args:
        values: value of each turn of each rollout.
        keys: keys of the same turns.
        rule: computes the advantages from the values of one key.
    """
    places: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)
    for i, row in enumerate(keys):
        for k, key in enumerate(row):
            places[key].append((i, k))
    out = [[0.0] * len(row) for row in values]
    for alike in places.values():
        found = rule(torch.tensor([values[i][k] for i, k in alike], dtype=torch.float32))
        for (i, k), advantage in zip(alike, found.tolist(), strict=True):
            out[i][k] = advantage
    return out


@dataclass(frozen=True)
class TurnGRPO(GroupAdvantage):
    """Compares the reward of turn k with the rewards of turn k in the group's other rollouts.

    A_k = (r_k - mean) / (std + eps) over the rollouts that have a turn k, with n - 1 in the standard deviation; 0 if
    only one rollout has a turn k. This is the advantage of CREST ("Teach the Magnitude, Not the Direction", 2026).
    Rewards are not cumulative, so it is meant for environments that reward each turn. The recorded advantage of the
    rollout is that of `GRPO`.

    Args:
        eps: added to the standard deviation.

    Raises:
        UserError: ``eps`` below 0, or not finite.
    """

    eps: float = 1e-6

    def __post_init__(self):
        check_range(self, 0, math.inf, "eps")

    def __call__(self, rewards: Float[Tensor, " group"]) -> Float[Tensor, " group"]:
        return GRPO(self.eps)(rewards)

    def of_turns(
        self, rewards: Float[Tensor, " group"], turn_rewards: list[list[float]], states: list[list[str]]
    ) -> list[list[float]]:
        return among_equals(turn_rewards, [range(len(row)) for row in turn_rewards], GRPO(self.eps))

    def complaint(self, turn_rewards: list[list[float]]) -> str | None:
        paid = any(any(row) for row in turn_rewards)
        if not paid or any(any(row[:-1]) for row in turn_rewards):
            return None
        return (
            "data.advantage=TurnGRPO: only last turns were rewarded in this iteration. TurnGRPO compares turn k with "
            "turn k of the other rollouts, so a rollout that succeeds in a later turn than the others gets a negative "
            "advantage in the turn in which the others succeed. Use TurnGRPO with environments that also reward "
            "earlier turns."
        )


@dataclass(frozen=True)
class MTGRPO(GroupAdvantage):
    """The outcome advantage for every turn, plus the advantage of the earlier turns' rewards for the first turn (arXiv
    2505.11821).

    First turn: A_outcome + coef A_turn; later turns: A_outcome. A rollout of one turn, which got no tool result, has
    A_total. All three are computed by `GRPO` over the group's rollouts: from the reward of the last turn (outcome),
    from the sum of the earlier turns' rewards (turn), and from the rollout's reward (total), which is recorded as its
    advantage.

    The paper has two turns and two separate reward functions. Here, the turn reward is the reward that the environment
    gives before the last turn.

    Args:
        coef: weight of A_turn.
        eps: added to the standard deviations.

    Raises:
        UserError: ``coef`` or ``eps`` below 0, or not finite.
    """

    coef: float = 1.0
    eps: float = 1e-6

    def __post_init__(self):
        check_range(self, 0, math.inf, "coef", "eps")

    def __call__(self, rewards: Float[Tensor, " group"]) -> Float[Tensor, " group"]:
        return GRPO(self.eps)(rewards)

    def of_turns(
        self, rewards: Float[Tensor, " group"], turn_rewards: list[list[float]], states: list[list[str]]
    ) -> list[list[float]]:
        outcomes = self(torch.tensor([sum(row[-1:]) for row in turn_rewards], dtype=torch.float32)).tolist()
        turns = self(torch.tensor([sum(row[:-1]) for row in turn_rewards], dtype=torch.float32)).tolist()
        out = []
        for row, total, outcome, turn in zip(turn_rewards, self(rewards).tolist(), outcomes, turns, strict=True):
            first = total if len(row) < 2 else outcome + self.coef * turn
            out.append([first, *[outcome] * (len(row) - 1)][: len(row)])
        return out


@dataclass(frozen=True)
class GiGPO(GroupAdvantage):
    """The rollout's advantage plus the turn's advantage among turns that began in the same state (arXiv 2505.10978).

    A = A_episode + step_weight A_step. A_episode compares the rewards of the group's rollouts. A_step compares the
    returns, sum_j gamma^j r_(k+j), of all turns of the group that began in the same state, including repeated visits by
    one rollout; it is 0 for a state that occurs once. The environment names the states (``Step.info``); by default the
    text of its messages is the name. If no state after the first turn occurs twice, only first turns get an A_step.

    Args:
        step_weight: weight of A_step.
        gamma: discount factor of the rewards of later turns.
        divide_by_std: divide both deviations from the mean by the standard deviation (n - 1) + eps.
        eps: added to the standard deviations.

    Raises:
        UserError: ``step_weight`` or ``eps`` below 0 or not finite, or ``gamma`` outside [0, 1].
    """

    step_weight: float = 1.0
    gamma: float = 0.95
    divide_by_std: bool = True
    eps: float = 1e-6

    def __post_init__(self):
        check_range(self, 0, math.inf, "step_weight", "eps")
        check_range(self, 0, 1, "gamma")

    def __call__(self, rewards: Float[Tensor, " group"]) -> Float[Tensor, " group"]:
        return (GRPO(self.eps) if self.divide_by_std else DrGRPO())(rewards)

    def of_turns(
        self, rewards: Float[Tensor, " group"], turn_rewards: list[list[float]], states: list[list[str]]
    ) -> list[list[float]]:
        returns = [discounted(row, self.gamma) for row in turn_rewards]
        steps = among_equals(returns, states, GRPO(self.eps) if self.divide_by_std else DrGRPO())
        episodes = self(rewards).tolist()
        return [[a + self.step_weight * s for s in row] for a, row in zip(episodes, steps, strict=True)]


def discounted(rewards: list[float], gamma: float) -> list[float]:
    """Compute the return of each turn: its reward plus gamma times the return of the next turn."""
    returns, after = [], 0.0
    for reward in reversed(rewards):
        after = reward + gamma * after
        returns.append(after)
    return returns[::-1]
