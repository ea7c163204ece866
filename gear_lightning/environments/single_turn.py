"""An environment with one question and one answer."""

from ..rewards import RewardChoice, check_reward, evaluate, reward_of
from .base import Environment, Message, Step, Task


class SingleTurn(Environment):
    """Scores the first assistant message and ends the episode.

    Args:
        reward: scores the answer; the name of a built-in reward, an import path, a function, or several rewards
            with their weights, which are summed, such as ``{number: 1.0, format: 0.2}``. The ``reward`` in a task's
            meta takes precedence.
    """

    def __init__(self, reward: RewardChoice | None = None):
        self.default_reward = reward

    def check(self, task: Task) -> None:
        check_reward(task, self.default_reward)

    def step(self, message: Message) -> Step:
        reward, parts = evaluate(reward_of(self.task, self.default_reward), self.task, [message])
        return Step(reward=reward, done=True, info={"reward_parts": parts})
