"""An environment with one question and one answer."""

from ..rewards import Reward, check_reward, evaluate, reward_of
from .base import Environment, Message, Step, Task


class SingleTurn(Environment):
    """Scores the first assistant message and ends the episode.

    Args:
        reward: scores the answer; the name of a built-in reward, an import path, or a function. The ``reward`` in a
            task's meta takes precedence.
    """

    def __init__(self, reward: str | Reward | None = None):
        self.default_reward = reward

    def check(self, task: Task) -> None:
        check_reward(task, self.default_reward)

    def step(self, message: Message) -> Step:
        reward, parts = evaluate(reward_of(self.task, self.default_reward), self.task, [message])
        return Step(reward=reward, done=True, info={"reward_parts": parts})
