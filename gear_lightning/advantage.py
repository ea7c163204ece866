"""Group advantages: from the rewards of a task's rollouts to one advantage per rollout, or one per turn."""

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
    """Advantage of each rollout of one group, or of each of its turns. Arguments hold the usable rollouts only."""

    min_group: int = 2

    @abstractmethod
    def __call__(self, rewards: Float[Tensor, " group"]) -> Float[Tensor, " group"]:
        """Advantages; zeros where the rewards have no spread or fewer than ``min_group`` rollouts are left."""

    def of_turns(
        self, rewards: Float[Tensor, " group"], turn_rewards: list[list[float]], states: list[list[str]]
    ) -> list[list[float]] | None:
        """Advantages of the turns of each rollout; None: every turn has its rollout's.

        Args:
            rewards: of each rollout.
            turn_rewards: of each turn of each rollout; those of a rollout sum to its reward.
            states: where each turn of each rollout began, by a name that is equal for equal states.
        """
        return None

    def complaint(self, turn_rewards: list[list[float]]) -> str | None:
        """What to warn of, where an iteration's rewards are not what the method is for; None: nothing.

        Args:
            turn_rewards: of each turn of each rollout of the iteration.
        """
        return None

    def has_signal(
        self, rewards: Float[Tensor, " group"], turn_rewards: list[list[float]], states: list[list[str]]
    ) -> bool:
        """Whether there is anything to learn from the group (arguments: see `of_turns`).

        Where turns have advantages of their own: whether one of them is not 0. Else: whether the rewards differ.
        """
        turns = self.of_turns(rewards, turn_rewards, states)
        return has_spread(rewards) if turns is None else any(a != 0 for rollout in turns for a in rollout)

    def check_group_size(self, size: int) -> None:
        """Fail early where groups of ``size`` can never carry a signal.

        Raises:
            UserError: the group is too small.
        """
        if size < self.min_group:
            raise UserError(
                f"group_size={size} gives {type(self).__name__} nothing to compare; use at least {self.min_group}"
            )


def has_spread(rewards: Float[Tensor, " group"]) -> bool:
    """Whether the rewards differ at all: by equality, for the standard deviation of equal floats need not be 0."""
    return rewards.numel() > 1 and bool((rewards != rewards[0]).any())


@dataclass(frozen=True)
class GRPO(GroupAdvantage):
    """(R - mean) / (std + eps), std with n - 1 (arXiv 2402.03300).

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
    """The rule's advantage of each turn among the group's turns with an equal key; 0 for a key that is there once.

    Args:
        values: of each turn of each rollout.
        keys: of the same turns.
        rule: what compares the values of one key.
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
    """Each turn by its own reward: turn k's against that of turn k of the group's other rollouts.

    A_k = (r_k - mean) / (std + eps) over the rollouts that have a turn k, std with n - 1; 0 where only one has it. This
    is the advantage of CREST ("Teach the Magnitude, Not the Direction", 2026). Rewards are not cumulative, so it is for
    environments that reward each turn. The rollout's own advantage, which is recorded, is that of `GRPO`.

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
            "data.advantage=TurnGRPO: only last turns were rewarded in this iteration. It compares turn k with turn k "
            "of the other rollouts, so that one that succeeds later than they is blamed in the turn that ends theirs. "
            "It is for environments that reward turns on the way."
        )


@dataclass(frozen=True)
class MTGRPO(GroupAdvantage):
    """The outcome for every turn, and what the turns earned on the way for the first one (arXiv 2505.11821).

    First turn: A_outcome + coef A_turn; later turns: A_outcome. A rollout of one turn, which got no tool result, has
    A_total. All three are those of `GRPO` over the group's rollouts: of the reward of the last turn (outcome), of the
    sum of the earlier turns' rewards (turn), and of the rollout's reward (total), which is recorded as its advantage.

    The paper has two turns and tells the two rewards apart by function; what the turn is rewarded for is here what the
    environment pays before the last turn.

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
    """The rollout's advantage plus that of a turn among turns that began in the same state (arXiv 2505.10978).

    A = A_episode + step_weight A_step. A_episode compares the rewards of the group's rollouts. A_step compares the
    returns, sum_j gamma^j r_(k+j), of all turns of the group with an equal state, also where one rollout came there
    twice; it is 0 for a state that was seen once. States are told by the environment (``Step.info``), else by what its
    messages say; where none comes up twice beyond the first turn, only that turn gets more than A_episode.

    Args:
        step_weight: weight of A_step.
        gamma: discount of the rewards of later turns.
        divide_by_std: divide both deviations from the mean by the standard deviation (n - 1) + eps; false: do not.
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
    """Return of each turn: its reward, and gamma times the return of the next."""
    returns, after = [], 0.0
    for reward in reversed(rewards):
        after = reward + gamma * after
        returns.append(after)
    return returns[::-1]
