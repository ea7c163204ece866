"""Group advantages: from the rewards of a task's rollouts to one advantage per rollout."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import UserError


class GroupAdvantage(ABC):
    """Advantage of each rollout of one group. ``rewards`` holds the usable rollouts only."""

    min_group: int = 2

    @abstractmethod
    def __call__(self, rewards: Float[Tensor, " group"]) -> Float[Tensor, " group"]:
        """Advantages; zeros where the rewards have no spread or fewer than ``min_group`` rollouts are left."""

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
    """

    eps: float = 1e-6

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
