"""Base class of tool-use environments. Tool calls are answered; a message without calls is the final answer and is
scored."""

from abc import abstractmethod
from typing import Any

from ..errors import UserError
from ..rewards import Reward, check_reward, evaluate, reward_of
from .base import Environment, Message, Step, Task, calls, tool_result


class ToolError(ValueError):
    """A tool call has a mistake that the agent can correct. The text becomes the tool's result, after "error: "."""


class ToolEnvironment(Environment):
    """Answers tool calls until an assistant message makes none; that message is the final answer.

    Args:
        reward: scores the transcript; the name of a built-in reward, an import path, or a function. The ``reward`` in
            a task's meta takes precedence.
        max_calls: maximum number of tool calls in an episode. A message that exceeds it ends the episode as truncated,
            without a score.
    """

    def __init__(self, reward: str | Reward | None = None, max_calls: int = 16):
        if max_calls < 1:
            raise UserError(f"max_calls={max_calls}: must be at least 1")
        self.default_reward = reward
        self.max_calls = max_calls

    def check(self, task: Task) -> None:
        check_reward(task, self.default_reward)

    def reset(self, task: Task, *, seed: int) -> list[Message]:
        super().reset(task, seed=seed)
        self.reward = reward_of(task, self.default_reward)
        self.transcript: list[Message] = []
        self.calls_left = self.max_calls
        return []

    @abstractmethod
    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Execute one call and return its result.

        Raises:
            ToolError: the agent made a mistake. Any other exception ends the rollout.
        """

    def step(self, message: Message) -> Step:
        self.transcript.append(message)
        made = calls(message)
        if not made:
            reward, parts = evaluate(self.reward, self.task, self.transcript)
            return Step(reward=reward, done=True, info={"reward_parts": parts})
        self.calls_left -= len(made)
        if self.calls_left < 0:
            return Step(done=True, truncated=True, info={"success": False})
        results = [tool_result(name, self._answer(name, arguments)) for name, arguments in made]
        self.transcript += results
        return Step(results)

    def _answer(self, name: str, arguments: dict[str, Any]) -> str:
        try:
            answer = self.call(name, arguments)
            if not isinstance(answer, str):
                raise TypeError(f"the tool {str(name)[:40]!r} returned {type(answer).__name__}, expected text")
            return encodable(answer)
        except ToolError as error:
            return encodable(f"error: {error}")


def encodable(text: str) -> str:
    """Return text without lone surrogates, which a tool may return but tokenizers reject."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def unknown_tool(name: str, known: list[str]) -> ToolError:
    """Return the error for a tool that does not exist."""
    return ToolError(f"there is no tool {str(name)[:40]!r}; the tools are: {', '.join(known)}")
