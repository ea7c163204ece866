"""Looks at what environments answer, so that nonsense costs one rollout and is told where it arose."""

import functools
import inspect
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import UserError
from .base import EnvironmentFailure, FloodError, Message, RewardError, Step

MAX_REWARD = 1e15  # its square, in a variance, must fit into float32
MAX_PARTS = 10_000  # bytes of the names of a reward's parts
MAX_ERROR = 2000  # characters of an error's text that are kept


def refuse_async(function: Any, what: str) -> None:
    """Refuse a function whose result is not what it returns: nothing here awaits or iterates over it.

    Args:
        function: a function, a method, a partial of one, or an object with ``__call__``.
        what: what it is for, for the error.

    Raises:
        UserError: it is ``async``, or yields.
    """
    while isinstance(function, functools.partial):
        function = function.func
    call = function if inspect.isroutine(function) else type(function).__call__
    if inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call):
        raise UserError(
            f"{what} is async, and nothing awaits it: make it a plain function (asyncio.run in it runs async code)"
        )
    if inspect.isgeneratorfunction(call):
        raise UserError(f"{what} yields, and nothing iterates over it: make it return its result")


def refuse_async_methods(environment: Any) -> None:
    """Refuse an environment with a method that is ``async`` or yields.

    Raises:
        UserError: names the method.
    """
    if inspect.iscoroutine(environment):
        environment.close()
        raise UserError("generation.environment is an async function; give a class, or a plain function that makes one")
    for name in ("check", "reset", "step", "close", "call"):
        if (method := getattr(environment, name, None)) is not None:
            refuse_async(method, f"{type(environment).__name__}.{name}")


def checked_messages(messages: Any, what: str, room: int) -> list[Message]:
    """Messages of an environment as plain data that can be shown, recorded and kept.

    Args:
        messages: what the environment gave.
        what: the method that gave it.
        room: bytes that they may have (`text_bytes`).

    Raises:
        TypeError: not a list of messages with a role and text.
        ValueError: holds what JSON has no word for.
        FloodError: more than ``room``.
    """
    if not isinstance(messages, list):
        raise TypeError(f"{what} gave {type(messages).__name__} in place of a list of messages")
    if text_bytes(messages, room) > room:  # before anything is made of it
        raise FloodError(f"{what} gave more than {room:,} bytes of text, all that is left to it")
    for message in messages:
        plain = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not plain or not isinstance(message.get("content") or "", str):
            raise TypeError(f"{what} gave {as_text(message)} in place of a message with role and content")
    return json.loads(json.dumps(messages, allow_nan=False))


def text_bytes(value: Any, room: int) -> int:
    """Bytes of all text in messages, as UTF-8, and one for anything else; stops counting above ``room``.

    Nothing large is copied. What holds itself is counted once, and left to whoever writes it as JSON.
    """
    total, inside = -1, set()  # the list of messages itself is none of them

    def count(value: Any) -> None:
        nonlocal total
        if isinstance(value, str):
            # text without other characters has as many bytes; longer text than fits need not be encoded
            plain = value.isascii() or len(value) > room
            total += len(value) if plain else len(value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, dict | list | tuple) and id(value) not in inside:
            inside.add(id(value))
            parts = (part for pair in value.items() for part in pair) if isinstance(value, dict) else value
            for part in parts:
                if total > room:
                    break
                count(part)
            inside.discard(id(value))
        total += not isinstance(value, str)

    count(value)
    return total


@dataclass
class CheckedStep(Step):
    """A step as plain data; ``info`` holds ``reward_parts``, ``decisions`` and what else of `Step` was given.

    Attributes:
        problem: why something that the step gave beside its score was left out; None: nothing was.
        broken: how a rollout ends that needs the messages, where it is they that were left out; else None.
    """

    problem: str | None = None
    broken: Literal["environment_error", "environment_flood"] | None = None


def checked_step(step: Any, room: int) -> CheckedStep:
    """A step of an environment as plain data. What it gives beside its score is left out where it cannot be used.

    Args:
        step: what the environment gave.
        room: bytes that its messages may have (`text_bytes`).

    Raises:
        RewardError: not a Step; the reward or a part of it is not a finite number below `MAX_REWARD`.
        TypeError: ``success`` is not a truth value.
        ValueError: ``done`` or ``truncated`` is an array.
    """
    if inspect.isawaitable(step):
        raise RewardError(f"step gave a {type(step).__name__}: it is async, and nothing awaits it")
    if not isinstance(step, Step):
        raise RewardError(f"step gave {type(step).__name__} in place of a Step")
    info = step.info if isinstance(step.info, dict) else {}
    parts = info.get("reward_parts") or {}
    try:
        if text_bytes(list(parts), MAX_PARTS) > MAX_PARTS:
            raise ValueError("too many parts")
        reward, parts = _number(step.reward), {str(name): _number(value) for name, value in parts.items()}
    except Exception as error:
        raise RewardError(f"the environment gave reward {as_text(step.reward)}, parts {as_text(parts)}") from error
    if not isinstance(found := info.get("success", False), bool | np.bool_):
        raise TypeError(f"step gave success {as_text(found)} in place of true or false")
    told: dict[str, Any] = {"success": bool(found)} if "success" in info else {}
    told |= {"reward_parts": parts, "decisions": []}
    out = CheckedStep([], reward, bool(step.done), bool(step.truncated), told)
    if isinstance(step, CheckedStep):  # of another process
        out.problem, out.broken = step.problem, step.broken
    try:
        out.messages = checked_messages(step.messages, "step", room)
    except Exception as error:
        out.problem = as_failure(error)
        out.broken = "environment_flood" if isinstance(error, FloodError) else "environment_error"
    for name, check in (("state", _text), ("feedback", _text), ("decisions", _decisions)):
        try:
            if info.get(name) is not None:
                told[name] = check(info[name], name, room)
        except Exception as error:
            out.problem = out.problem or as_failure(error)
    return out


def _text(value: Any, name: str, room: int) -> str:
    if not isinstance(value, str):
        raise TypeError(f"step gave {name} {as_text(value)} in place of text")
    if text_bytes([value], room) > room:
        raise FloodError(f"step gave a {name} of more than {room:,} bytes, all that is left to it")
    return value


def _decisions(value: Any, name: str, room: int) -> list[dict[str, Any]]:
    if not isinstance(value, list) or text_bytes(value, room) > room:
        raise TypeError(f"step gave {name} {as_text(value)} in place of a list that fits into the budget")
    for one in value:
        right = isinstance(one, dict) and isinstance(one.get("text"), str) and isinstance(one.get("right"), bool)
        if not right or not one["text"] or type(one.get("occurrence", -1)) is not int:
            raise TypeError(f"step gave the decision {as_text(one)} in place of a text and whether it is right")
    return [{"text": one["text"], "right": one["right"], "occurrence": one.get("occurrence", -1)} for one in value]


def _number(value: Any) -> float:
    if isinstance(value, str | bytes) or not abs(number := float(value)) < MAX_REWARD:
        raise ValueError(f"{value!r} is no finite number")
    return number


def as_text(value: Any) -> str:
    """An error's message or a value as written, short; whatever it does when asked."""
    try:
        return str(value)[:MAX_ERROR] if isinstance(value, BaseException) else repr(value)[:80]
    except BaseException:
        return "(its text cannot be made)"


def as_failure(error: BaseException) -> str:
    """An error's text with its kind before it, where the text does not say all."""
    text = as_text(error)
    return text if isinstance(error, EnvironmentFailure | RewardError) else f"{type(error).__name__}: {text}"
