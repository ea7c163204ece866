"""The contract between tasks, environments and the agent loop. It deals in messages, never in token ids."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


class RewardError(RuntimeError):
    """A rollout that cannot be scored. It is left out of learning; the message is recorded."""


class EnvironmentFailure(RuntimeError):
    """A failure of an environment, told in full by its text."""


class TransientError(EnvironmentFailure):
    """A failure that may pass: an `OSError`, such as a refused connection."""


class FloodError(EnvironmentFailure):
    """An environment said more than the rollout's budget of ``output_bytes`` holds."""


@dataclass(frozen=True)
class Task:
    """One problem for the policy.

    Attributes:
        id: unique within its source; appears in records, metrics and error messages.
        messages: what the policy sees, as chat messages (``role``, ``content``).
        tools: JSON schemas of the tools, as chat templates take them.
        reference: the privileged ground truth (an answer, a worked solution, or reference messages). Only the teacher's
            prompt builder reads it; it never reaches the policy.
        meta: whatever the environment needs to play and score the task.
    """

    id: str
    messages: list[Message]
    tools: Sequence[dict[str, Any]] = ()
    reference: str | list[Message] | None = None
    meta: dict[str, Any] = field(default_factory=dict)


class TaskSource(ABC):
    """Tasks by index: the same index always gives the same task, on every rank and after every resume."""

    @property
    @abstractmethod
    def size(self) -> int | None:
        """Number of distinct tasks; None where the source generates tasks without end."""

    @abstractmethod
    def __getitem__(self, index: int) -> Task:
        """The task at ``index`` (0-based; below ``size`` where there is one)."""

    @property
    def fingerprint(self) -> str | None:
        """A text that differs where any of the tasks does, so that a check of them can be remembered; None: unknown."""
        return None

    def longest(self, count: int) -> Sequence[int]:
        """Indices of the tasks whose prompts are likely to be the longest, at most ``count``; empty: unknown."""
        return ()


@dataclass
class Step:
    """What an environment answers to one assistant message.

    Attributes:
        messages: what the policy sees next (tool results, a user turn). May be empty when ``done``; what the policy
            will not see, because this was its last turn, costs nothing where it cannot be used.
        reward: added to the rollout's reward. Must be a finite number.
        done: the episode is over.
        truncated: the episode was cut short by the environment's own budget.
        info: ``success`` (bool) overrides the success rule of the evaluation; ``reward_parts`` (name -> float) is
            recorded; ``state`` (str) names the state that the episode is in now (default: what the messages say), for
            advantages that compare what was done in equal states; ``feedback`` (str) is what a teacher may be shown of
            how the rollout went (an error message, say), the last one counts; ``decisions`` is a list of
            ``{"text": str, "right": bool, "occurrence": int}``: what was decided in the assistant message, for credit
            that knows the truth, by the text of it and which of its occurrences there is meant (0 the first, -1 the
            last and the default). Anything else is ignored.
    """

    messages: list[Message] = field(default_factory=list)
    reward: float = 0.0
    done: bool = False
    truncated: bool = False
    info: dict[str, Any] = field(default_factory=dict)


class Environment(ABC):
    """One episode of one task. Single use: the agent loop makes one instance per rollout.

    ``step`` receives the parsed assistant message: ``content`` (str) and, where the policy called tools, ``tool_calls``
    as a list of ``{"type": "function", "function": {"name": str, "arguments": dict}}``. ``content`` is empty where the
    policy said nothing: score that as any other answer. Whatever ``reset`` or ``step`` raises ends that rollout alone;
    it is counted, recorded and left out of the group's advantages. What ``close`` raises is counted and recorded.
    Methods are plain functions: ``async`` ones are refused before training.

    Attributes:
        tells_decisions: whether its steps say which decisions were right (``Step.info``).
    """

    tells_decisions: bool = False

    def check(self, task: Task) -> None:
        """Look at a task before any training, on an instance that plays none.

        Raises:
            UserError: the task cannot be played or scored; names it.
        """
        return None

    def reset(self, task: Task, *, seed: int) -> list[Message]:
        """Start the episode.

        Args:
            task: the task to play.
            seed: for the environment's own randomness.

        Returns:
            Extra opening messages, appended to ``task.messages``.
        """
        self.task = task
        return []

    @abstractmethod
    def step(self, message: Message) -> Step:
        """Answer one assistant message."""

    def close(self) -> None:
        """Release what the episode holds. Called once, also after failures."""
        return None


@dataclass(frozen=True)
class Demonstration:
    """A transcript for the supervised warm start.

    Attributes:
        task: its opening messages are the prompt.
        messages: what follows the prompt: assistant messages, tool results, ...
        privileged: show the prompt with the task's reference in it, as the teacher will see it.
        unlearned: indices into ``messages`` of assistant messages that are context only (a staged error, say).
    """

    task: Task
    messages: list[Message]
    privileged: bool = False
    unlearned: frozenset[int] = frozenset()


class Demonstrations(ABC):
    """An endless, seeded stream of demonstrations by index."""

    @abstractmethod
    def __getitem__(self, index: int) -> Demonstration:
        """The demonstration at ``index``; the same index always gives the same one."""


def tool_call(name: str, arguments: dict[str, Any], content: str = "") -> Message:
    """An assistant message that calls one tool."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def calls(message: Message) -> list[tuple[str, dict[str, Any]]]:
    """The tool calls of an assistant message as (name, arguments) pairs; empty where there are none."""
    return [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or []]


def tool_result(name: str, content: str) -> Message:
    """The message that answers a call of the tool ``name``."""
    return {"role": "tool", "name": name, "content": content}
