"""Base class of tool-use environments. Tool calls are answered; a message without calls is the final answer and is
scored."""

import asyncio
import dataclasses
import inspect
import json
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Set
from enum import Enum
from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel
from pydantic_core import PydanticSerializationError, to_jsonable_python

from ..errors import UserError
from ..rewards import RewardChoice, check_reward, evaluate, reward_of
from .arguments import check_parameters, read_arguments
from .awaiting import awaited
from .base import Environment, EnvironmentFailure, Message, RewardError, Step, Task, ToolCall, tool_calls, tool_result
from .checks import as_text

OnError = Literal["answer", "end"]

MAX_ERROR = 1000  # characters of an exception that the policy reads
# Exceptions that say nothing about the call: of the machine, the network, the installation or the configuration
_FAULTS = (EnvironmentFailure, RewardError, UserError, OSError, ImportError, MemoryError)
# ... and those of the first kind that a path in the arguments causes
_PATHS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


class ToolError(ValueError):
    """A tool call has a mistake that the agent can correct. The text becomes the tool's result, after "error: "."""


class ToolEnvironment(Environment):
    """Answers tool calls until an assistant message makes none; that message is the final answer.

    The calls of a message are answered in their order, each with the id of its call; those of ``async`` tools run
    together. Arguments are checked against the JSON schema that the task lists for the tool, and the policy reads what
    is wrong.

    An exception of a tool becomes its answer, ``{"error": "KeyError: 'pencil'"}``, and the rollout continues: the
    policy may have caused it, and learns only from rollouts that it finishes. These exceptions still end the rollout,
    which then takes no part in learning, because no call causes them: `OSError` (except of a path: not found, exists,
    no permission, is or is not a directory) with `TimeoutError` and refused connections, also as the ``__cause__`` of
    another exception, `ImportError`, `MemoryError`, and `EnvironmentFailure` and `RewardError` of
    `gear_lightning.environments.base`.

    Args:
        reward: scores the transcript; the name of a built-in reward, an import path, a function, or several rewards
            with their weights, which are summed, such as ``{number: 1.0, format: 0.2}``. The ``reward`` in a task's
            meta takes precedence.
        max_calls: maximum number of tool calls in an episode. A message that exceeds it ends the episode as truncated,
            without a score.
        on_error: what an exception of a tool does. ``answer``: see above; ``rollouts/tool_errors`` counts the rollouts.
            ``end``: it ends the rollout, which takes no part in learning.
    """

    max_result: ClassVar[int | None] = None  # characters of a result that the policy sees

    def __init__(self, reward: RewardChoice | None = None, max_calls: int = 16, on_error: OnError = "answer"):
        if max_calls < 1:
            raise UserError(f"max_calls={max_calls}: must be at least 1")
        if on_error not in get_args(OnError):
            raise UserError(f"on_error={on_error!r}: must be one of {', '.join(get_args(OnError))}")
        self.default_reward = reward
        self.max_calls = max_calls
        self.on_error = on_error

    def check(self, task: Task) -> None:
        check_reward(task, self.default_reward)
        for tool in task.tools:
            function = tool["function"]
            check_parameters(function["parameters"], f"task {task.id}: tool {function['name']!r}")

    def reset(self, task: Task, *, seed: int) -> list[Message]:
        super().reset(task, seed=seed)
        self.reward = reward_of(task, self.default_reward)
        self.transcript: list[Message] = []
        self.calls_left = self.max_calls
        return []

    @abstractmethod
    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """Execute one call and return its result: text, or a value that becomes JSON (a dict, a list, a dataclass, a
        pydantic model, a number, true, null). May be ``async``.

        Raises:
            ToolError: the agent made a mistake. For other exceptions see the class.
        """

    def read_arguments(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call, checked against the tool's JSON schema.

        Raises:
            ToolError: they are wrong.
        """
        if (parameters := self.parameters(name)) is None:
            return arguments
        arguments, problems = read_arguments(name, arguments, parameters)
        if problems:
            raise wrong_arguments(name, problems)
        return arguments

    def parameters(self, name: str) -> dict[str, Any] | None:
        """Return the JSON schema of a tool's arguments, as the task lists it; None if it does not."""
        shown = (tool["function"] for tool in self.task.tools)
        return next((one["parameters"] for one in shown if one["name"] == name), None)

    def step(self, message: Message) -> Step:
        self.transcript.append(message)
        made = tool_calls(message)
        if not made:
            reward, parts = evaluate(self.reward, self.task, self.transcript)
            return Step(reward=reward, done=True, info={"reward_parts": parts})
        self.calls_left -= len(made)
        if self.calls_left < 0:
            return Step(done=True, truncated=True, info={"success": False})
        errors: list[str] = []
        answers = [self._answer(outcome, errors) for outcome in self._outcomes(made)]
        results = [tool_result(call.name, text, call.id) for call, text in zip(made, answers, strict=True)]
        self.transcript += results
        return Step(results, info={"tool_errors": errors})

    def _outcomes(self, made: list[ToolCall]) -> list[Any]:
        """Return what each call returned or raised."""
        found: list[Any] = []
        for call in made:
            try:
                found.append(self.call(call.name, self.read_arguments(call.name, call.arguments)))
            except Exception as error:
                found.append(_Raised(error))
        waiting = [place for place, value in enumerate(found) if inspect.isawaitable(value)]
        if waiting:
            results = awaited(_together([found[place] for place in waiting]))
            for place, value in zip(waiting, results, strict=True):
                found[place] = _Raised(value) if isinstance(value, BaseException) else value
        return found

    def _answer(self, outcome: Any, errors: list[str]) -> str:
        """Return the text that answers a call, and add an exception that it reports to ``errors``."""
        if not isinstance(outcome, _Raised):
            try:
                return encodable(result_text(outcome)[: self.max_result])
            except Exception as error:  # a value that JSON cannot represent
                outcome = _Raised(error)
        error = _single(outcome.error)
        if isinstance(error, ToolError):
            return encodable(f"error: {as_text(error)}")
        if self.on_error == "end" or is_fault(error):
            raise error
        text = encodable(f"{type(error).__name__}: {as_text(error)}"[:MAX_ERROR])
        errors.append(text)
        return json.dumps({"error": text}, ensure_ascii=False)


@dataclasses.dataclass
class _Raised:
    error: BaseException


async def _together(calls: list[Any]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


def _single(error: BaseException) -> BaseException:
    """Return the one exception of a group, such as an `asyncio.TaskGroup` raises."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def is_fault(error: BaseException) -> bool:
    """Return whether an exception of a tool, or what caused it, says nothing about the call; see `ToolEnvironment`."""
    if not isinstance(error, Exception):  # SystemExit
        return True
    seen: set[int] = set()  # a chain of causes can lead back to its start
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, BaseExceptionGroup):
            return any(map(is_fault, cause.exceptions))
        if isinstance(cause, _FAULTS) and not isinstance(cause, _PATHS):
            return True
        cause = cause.__cause__
    return False


def result_text(value: Any) -> str:
    """Return a tool's result as text. A value that is not text becomes JSON.

    Raises:
        EnvironmentFailure: an iterator, which would have to be run.
        ValueError: a value that contains itself.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, Iterator) or hasattr(value, "__anext__"):
        raise EnvironmentFailure(f"a tool returned a {type(value).__name__}, which is not supported; return a list")
    try:
        plain = to_jsonable_python(value, fallback=_unknown)
    except (UnicodeDecodeError, PydanticSerializationError):
        plain = to_jsonable_python(_decoded(value), fallback=_unknown)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _decoded(value: Any) -> Any:
    """Return a value with text in place of bytes, also inside of it."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("utf-8", "replace")
    if isinstance(value, Enum):
        return _decoded(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _decoded(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, BaseModel):
        return _decoded(value.model_dump(by_alias=True))
    if isinstance(value, Mapping):
        return {_decoded(key): _decoded(item) for key, item in value.items()}
    if isinstance(value, list | tuple | Set | deque):
        return [_decoded(item) for item in value]
    of_numpy = getattr(value, "tolist", None)
    return _decoded(of_numpy()) if callable(of_numpy) else value


def _unknown(value: Any) -> Any:
    """Return a value that pydantic does not know as one that it does: arrays and tensors as lists, others as text."""
    return value.tolist() if callable(getattr(value, "tolist", None)) else str(value)


def encodable(text: str) -> str:
    """Return text without lone surrogates, which a tool may return but tokenizers reject."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def unknown_tool(name: str, known: list[str]) -> ToolError:
    """Return the error for a tool that does not exist."""
    return ToolError(f"there is no tool {str(name)[:40]!r}; the tools are: {', '.join(known)}")


def wrong_arguments(name: str, problems: list[str]) -> ToolError:
    """Return the error for arguments with these problems, one in each line."""
    return ToolError("\n".join(f"{name}: {problem}" for problem in problems))
