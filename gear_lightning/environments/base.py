"""Base classes of tasks and environments, as the agent loop uses them. They handle messages, never token ids."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import UserError
from .openai_format import TOOL_FORM, FormatError, is_tool, plain_messages, plain_tools

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

    Messages and tools may have the forms of the OpenAI API; they are converted into those of chat templates, see
    `gear_lightning.environments.openai_format`. `check_format` reports what cannot be converted.

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

    def __post_init__(self):
        for name, value in self._converted():
            with suppress(FormatError):  # a source may make a task that never runs; `check_format` raises
                object.__setattr__(self, name, value())

    def _converted(self) -> list[tuple[str, Callable[[], Any]]]:
        return [
            ("messages", lambda: plain_messages(self.messages, "messages")),
            ("reference", lambda: plain_messages(self.reference, "reference")),
            ("tools", lambda: plain_tools(self.tools)),
        ]

    def check_format(self) -> None:
        """Check that the messages and tools could be converted into those of chat templates.

        Raises:
            UserError: a message has an image or other content that is not text, or a tool is not a function with a name
                and parameters; names the task and the key.
        """
        try:
            for _, value in self._converted():
                value()
        except FormatError as error:
            raise UserError(f"task {self.id}: {error}") from None
        for place, tool in enumerate(self.tools):
            if not is_tool(tool):
                raise UserError(f"task {self.id}: tools[{place}] is not of the form {TOOL_FORM}")


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
    def digest(self) -> str | None:
        """A text that is equal on two processes if their tasks are. Before training it is compared between all ranks,
        which finds different files on different machines. None: unknown."""
        return None

    @property
    def fingerprint(self) -> str | None:
        """A text that changes whenever any of the tasks changes. It is the key under which a passed check of the tasks
        is cached. None: unknown."""
        return None

    def place_of(self, index: int) -> str | None:
        """Return where the task at ``index`` is written, such as its file and line, for errors; None if unknown."""
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
            the occurrence that is meant (0 is the first, -1 the last and the default). ``tool_errors`` is a list of
            texts: exceptions of tools that the policy reads as answers; they are counted. Other keys are ignored.
    """

    messages: list[Message] = field(default_factory=list)
    reward: float = 0.0
    done: bool = False
    truncated: bool = False
    info: dict[str, Any] = field(default_factory=dict)


class Environment(ABC):
    """One episode of one task. Single use: the agent loop creates one instance per rollout.

    ``step`` receives the parsed assistant message: ``content`` (str) and, if the policy called tools, ``tool_calls`` as
    a list of ``{"type": "function", "id": str, "function": {"name": str, "arguments": dict}}``; ``id`` may be missing.
    ``content`` is the answer, without the reasoning, which is in ``reasoning`` if the policy wrote any; ``unfinished``
    is True if the turn ends inside of it. ``content`` is empty if the policy wrote no answer; score that like any other
    answer. An exception in ``reset`` or ``step`` ends only that rollout; it is counted, recorded and excluded from the
    group's advantages. An exception in ``close`` is counted and recorded.

    Methods may be ``async``: they are awaited, under the same time limits. All of them run on one event loop of the
    process, so a client that is bound to its loop can serve all rollouts. Tasks that an episode starts may run until
    its ``close`` returns; those that are left are then canceled.

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

    def __post_init__(self):
        object.__setattr__(self, "messages", plain_messages(self.messages, "messages"))


class Demonstrations(ABC):
    """An endless, seeded stream of demonstrations by index."""

    @abstractmethod
    def __getitem__(self, index: int) -> Demonstration:
        """Return the demonstration at ``index``; the same index always returns the same one."""


def tool_call(name: str, arguments: dict[str, Any], content: str = "") -> Message:
    """Return an assistant message that calls one tool."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


class ToolCall(NamedTuple):
    """A call of a tool. ``id`` is None if the syntax of the model's tool calls has no ids."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


def tool_calls(message: Message) -> list[ToolCall]:
    """Return the tool calls of an assistant message; empty if there are none."""
    made = message.get("tool_calls") or []
    return [ToolCall(c["function"]["name"], c["function"]["arguments"], c.get("id")) for c in made]


def calls(message: Message) -> list[tuple[str, dict[str, Any]]]:
    """Return the tool calls of an assistant message as (name, arguments) pairs; empty if there are none."""
    return [(call.name, call.arguments) for call in tool_calls(message)]


def tool_result(name: str, content: str, call_id: str | None = None) -> Message:
    """Return the message that answers a call of the tool ``name``.

    Args:
        name: name of the tool.
        content: its result.
        call_id: id of the call, which the message repeats as ``tool_call_id``. None: the call has no id.
    """
    message = {"role": "tool", "name": name, "content": content}
    return message if call_id is None else {**message, "tool_call_id": call_id}
