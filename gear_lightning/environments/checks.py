"""Checks of environments' return values. An invalid value fails only its rollout, and the error names its source."""

import functools
import inspect
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import UserError
from .base import EnvironmentFailure, FloodError, Message, RewardError, Step
from .openai_format import plain_messages

MAX_REWARD = 1e15  # its square, in a variance, must fit into float32
MAX_PARTS = 10_000  # bytes of the names of all parts of a reward
MAX_ERROR = 2000  # characters of an error message that are kept


def refuse_generator(function: Any, what: str) -> None:
    """Reject a generator function: the caller does not iterate over what it yields. ``async`` functions are accepted.

    Args:
        function: a function, a method, a partial of one, or an object with ``__call__``.
        what: a description of the function, for the error message.

    Raises:
        UserError: the function yields.
    """
    while isinstance(function, functools.partial):
        function = function.func
    call = function if inspect.isroutine(function) else type(function).__call__
    if inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call):
        raise UserError(f"{what} is a generator function, which is not supported; make it return its result")


def refuse_generator_methods(environment: Any) -> None:
    """Reject an environment with a method that yields.

    Raises:
        UserError: names the method.
    """
    for name in ("check", "reset", "step", "close", "call"):
        if (method := getattr(environment, name, None)) is not None:
            refuse_generator(method, f"{type(environment).__name__}.{name}")


def checked_messages(messages: Any, what: str, limit: int) -> list[Message]:
    """Return an environment's messages as plain JSON data, which can be shown, recorded and checkpointed, in the form
    of chat templates (see `openai_format`).

    Args:
        messages: what the environment returned.
        what: the method that returned them.
        limit: largest allowed size in bytes (`text_bytes`).

    Raises:
        TypeError: not a list of messages with a role and text.
        ValueError: a value that JSON cannot represent, or content that is not text (`FormatError`).
        FloodError: larger than ``limit``.
    """
    if not isinstance(messages, list):
        raise TypeError(f"{what} returned {type(messages).__name__}, expected a list of messages")
    if text_bytes(messages, limit) > limit:  # before anything is copied
        raise FloodError(f"{what} returned more than {limit:,} bytes of text, the remaining limit")
    messages = plain_messages(messages, f"{what} returned messages")
    for message in messages:
        plain = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not plain or not isinstance(message.get("content") or "", str):
            raise TypeError(f"{what} returned {as_text(message)}, expected a message with role and content")
    return json.loads(json.dumps(messages, allow_nan=False))


def text_bytes(value: Any, limit: int) -> int:
    """Return the size of messages in bytes: all text as UTF-8, and one byte for every other value. Stop counting above
    ``limit``.

    Nothing large is copied. A value that contains itself is counted once; writing it as JSON raises later.
    """
    total, inside = -1, set()  # the outer list itself is not counted

    def count(value: Any) -> None:
        nonlocal total
        if isinstance(value, str):
            # ASCII text has one byte per character; text longer than the limit need not be encoded
            plain = value.isascii() or len(value) > limit
            total += len(value) if plain else len(value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, dict | list | tuple) and id(value) not in inside:
            inside.add(id(value))
            parts = (part for pair in value.items() for part in pair) if isinstance(value, dict) else value
            for part in parts:
                if total > limit:
                    break
                count(part)
            inside.discard(id(value))
        total += not isinstance(value, str)

    count(value)
    return total


@dataclass
class CheckedStep(Step):
    """A step as plain data. ``info`` holds ``reward_parts``, ``decisions``, and the other keys of `Step` if given.

    Attributes:
        problem: why a part of the step other than its score was dropped; None if nothing was.
        broken: status of a rollout that needs the messages, if the messages were dropped; else None.
    """

    problem: str | None = None
    broken: Literal["environment_error", "environment_flood"] | None = None


def checked_step(step: Any, limit: int) -> CheckedStep:
    """Return an environment's step as plain data. Invalid parts other than the score are dropped.

    Args:
        step: what the environment returned.
        limit: largest allowed size of its messages in bytes (`text_bytes`).

    Raises:
        RewardError: not a Step, or the reward or a part of it is not a finite number below `MAX_REWARD`.
        TypeError: ``success`` is not a bool.
        ValueError: ``done`` or ``truncated`` is an array.
    """
    if not isinstance(step, Step):
        raise RewardError(f"step returned {type(step).__name__}, expected a Step")
    info = step.info if isinstance(step.info, dict) else {}
    parts = info.get("reward_parts") or {}
    try:
        if text_bytes(list(parts), MAX_PARTS) > MAX_PARTS:
            raise ValueError("too many parts")
        reward, parts = _number(step.reward), {str(name): _number(value) for name, value in parts.items()}
    except Exception as error:
        raise RewardError(
            f"step returned an invalid reward: reward {as_text(step.reward)}, parts {as_text(parts)}"
        ) from error
    if not isinstance(found := info.get("success", False), bool | np.bool_):
        raise TypeError(f"step returned success {as_text(found)}, expected true or false")
    kept: dict[str, Any] = {"success": bool(found)} if "success" in info else {}
    kept |= {"reward_parts": parts, "decisions": []}
    out = CheckedStep([], reward, bool(step.done), bool(step.truncated), kept)
    if isinstance(step, CheckedStep):  # already checked in another process
        out.problem, out.broken = step.problem, step.broken
    try:
        out.messages = checked_messages(step.messages, "step", limit)
    except Exception as error:
        out.problem = as_failure(error)
        out.broken = "environment_flood" if isinstance(error, FloodError) else "environment_error"
    for name, check in (("state", _text), ("feedback", _text), ("decisions", _decisions), ("tool_errors", _texts)):
        try:
            if info.get(name) is not None:
                kept[name] = check(info[name], name, limit)
        except Exception as error:
            out.problem = out.problem or as_failure(error)
    return out


def _text(value: Any, name: str, limit: int) -> str:
    if not isinstance(value, str):
        raise TypeError(f"step returned {name} {as_text(value)}, expected text")
    if text_bytes([value], limit) > limit:
        raise FloodError(f"step returned a {name} of more than {limit:,} bytes, the remaining limit")
    return value


def _texts(value: Any, name: str, limit: int) -> list[str]:
    if not isinstance(value, list):
        raise TypeError(f"step returned {name} {as_text(value)}, expected a list of texts")
    return [_text(one, name, limit)[:MAX_ERROR] for one in value]


def _decisions(value: Any, name: str, limit: int) -> list[dict[str, Any]]:
    if not isinstance(value, list) or text_bytes(value, limit) > limit:
        raise TypeError(f"step returned {name} {as_text(value)}, expected a list of at most {limit:,} bytes")
    for one in value:
        right = isinstance(one, dict) and isinstance(one.get("text"), str) and isinstance(one.get("right"), bool)
        if not right or not one["text"] or type(one.get("occurrence", -1)) is not int:
            raise TypeError(f"step returned the decision {as_text(one)}, expected text (str) and right (bool)")
    return [{"text": one["text"], "right": one["right"], "occurrence": one.get("occurrence", -1)} for one in value]


def _number(value: Any) -> float:
    if isinstance(value, str | bytes) or not abs(number := float(value)) < MAX_REWARD:
        raise ValueError(f"{value!r} is not a finite number")
    return number


def as_text(value: Any) -> str:
    """Return an error's message or a value's ``repr``, shortened. Never raises."""
    try:
        return str(value)[:MAX_ERROR] if isinstance(value, BaseException) else repr(value)[:80]
    except BaseException:
        return "(its text cannot be read)"


def as_failure(error: BaseException) -> str:
    """Return an error's text, prefixed with its type unless it is one of this package's errors."""
    text = as_text(error)
    return text if isinstance(error, EnvironmentFailure | RewardError) else f"{type(error).__name__}: {text}"
