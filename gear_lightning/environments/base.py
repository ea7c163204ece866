"""Base classes of tasks and environments, as the agent loop uses them. They handle messages, never token ids."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


class RewardError(RuntimeError):
    """A rollout cannot be scored. It is excluded from learning, and the message is recorded."""


class EnvironmentFailure(RuntimeError):
    """An environment failed. The text describes the failure completely."""


class TransientError(EnvironmentFailure):
    """A failure that a retry may fix: an `OSError`, such as a refused connection."""


class FloodError(EnvironmentFailure):
    """An environment returned more text than the rollout's budget ``output_bytes`` allows."""


@dataclass(frozen=True)
class Task:
    """One problem for the policy.

    Attributes:
        id: unique within its source; appears in records, metrics and error messages.
        messages: what the policy sees, as chat messages (``role``, ``content``).
        tools: JSON schemas of the tools, in the format of chat templates.
        reference: the privileged ground truth (an answer, a worked solution, or reference messages). Only the teacher's
            prompt builder reads it; it never reaches the policy.
        meta: further data that the environment needs to run and score the task.
    """

    id: str
    messages: list[Message]
    tools: Sequence[dict[str, Any]] = ()
    reference: str | list[Message] | None = None
    meta: dict[str, Any] = field(default_factory=dict)


class TaskSource(ABC):
    """Tasks by index. The same index always returns the same task, on every rank and after every resume."""

    @property
    @abstractmethod
    def size(self) -> int | None:
        """Number of distinct tasks; None if the source generates tasks endlessly."""

    @abstractmethod
    def __getitem__(self, index: int) -> Task:
        """Return the task at ``index`` (0-based; below ``size`` if that is not None)."""

    @property
    def fingerprint(self) -> str | None:
        """A text that changes whenever any of the tasks changes. It is the key under which a passed check of the tasks
        is cached. None: unknown."""
        return None

    def longest(self, count: int) -> Sequence[int]:
        """Return the indices of at most ``count`` tasks that probably have the longest prompts; empty if unknown."""
        return ()


@dataclass
class Step:
    """An environment's answer to one assistant message.

    Attributes:
        messages: what the policy sees next (tool results, a user turn). May be empty when ``done``. If this was the
            policy's last turn, invalid messages do not fail the rollout, because the policy does not see them.
        reward: added to the rollout's reward. Must be a finite number.
        done: the episode is over.
        truncated: the environment's own budget cut the episode short.
        info: ``success`` (bool) overrides the success rule of the evaluation. ``reward_parts`` (name -> float) is
            recorded. ``state`` (str) names the current state of the episode (default: the text of the messages), for
            advantages that compare turns that began in equal states. ``feedback`` (str) describes how the rollout went
            (for example an error message) and may be shown to a teacher; the last one counts. ``decisions`` is a list
            of ``{"text": str, "right": bool, "occurrence": int}``: the decisions in the assistant message, for credit
            rules that use the ground truth. ``text`` is the text of the decision, and ``occurrence`` is the index of
            the occurrence that is meant (0 is the first, -1 the last and the default). Other keys are ignored.
    """

    messages: list[Message] = field(default_factory=list)
    reward: float = 0.0
    done: bool = False
    truncated: bool = False
    info: dict[str, Any] = field(default_factory=dict)


class Environment(ABC):
    """One episode of one task. Single use: the agent loop creates one instance per rollout.

    ``step`` receives the parsed assistant message: ``content`` (str) and, if the policy called tools, ``tool_calls`` as
    a list of ``{"type": "function", "function": {"name": str, "arguments": dict}}``. ``content`` is empty if the policy
    wrote nothing; score that like any other answer. An exception in ``reset`` or ``step`` ends only that rollout; it is
    counted, recorded and excluded from the group's advantages. An exception in ``close`` is counted and recorded.
    Methods must be plain functions: ``async`` ones are rejected before training.

    Attributes:
        reports_decisions: whether its steps report which decisions were right (``Step.info``).
    """

    reports_decisions: bool = False

    def check(self, task: Task) -> None:
        """Check a task before training, on an instance that runs no episode.

        Raises:
            UserError: the task cannot be run or scored; names the task.
        """
        return None

    def reset(self, task: Task, *, seed: int) -> list[Message]:
        """Start the episode.

        Args:
            task: the task to run.
            seed: for the environment's own randomness.

        Returns:
            Extra opening messages, which the agent loop appends to ``task.messages``.
        """
        self.task = task
        return []

    @abstractmethod
    def step(self, message: Message) -> Step:
        """Return the environment's answer to one assistant message."""

    def close(self) -> None:
        """Release the resources of the episode. Called once, also after failures."""
        return None


@dataclass(frozen=True)
class Demonstration:
    """A transcript for the supervised warm start.

    Attributes:
        task: its opening messages are the prompt.
        messages: the messages after the prompt: assistant messages, tool results, ...
        privileged: use the prompt with the task's reference in it, as the teacher sees it.
        unlearned: indices into ``messages`` of assistant messages that are only context (for example a staged error).
    """

    task: Task
    messages: list[Message]
    privileged: bool = False
    unlearned: frozenset[int] = frozenset()


class Demonstrations(ABC):
    """An endless, seeded stream of demonstrations by index."""

    @abstractmethod
    def __getitem__(self, index: int) -> Demonstration:
        """Return the demonstration at ``index``; the same index always returns the same one."""


def tool_call(name: str, arguments: dict[str, Any], content: str = "") -> Message:
    """Return an assistant message that calls one tool."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def calls(message: Message) -> list[tuple[str, dict[str, Any]]]:
    """Return the tool calls of an assistant message as (name, arguments) pairs; empty if there are none."""
    return [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or []]


def tool_result(name: str, content: str) -> Message:
    """Return the message that answers a call of the tool ``name``."""
    return {"role": "tool", "name": name, "content": content}
