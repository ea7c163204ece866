"""Looks at what environments answer, so that nonsense costs one rollout and is told where it arose."""

import json
from typing import Any

import numpy as np

from .base import Message, RewardError, Step

MAX_REWARD = 1e15  # its square, in a variance, must fit into float32


def checked_messages(messages: Any, what: str) -> list[Message]:
    """Messages of an environment as plain data that can be shown, recorded and kept.

    Raises:
        TypeError: not a list of messages with a role and text.
        ValueError: holds what JSON has no word for.
    """
    if not isinstance(messages, list):
        raise TypeError(f"{what} gave {type(messages).__name__} in place of a list of messages")
    for message in messages:
        plain = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not plain or not isinstance(message.get("content") or "", str):
            raise TypeError(f"{what} gave {as_text(message)} in place of a message with role and content")
    return json.loads(json.dumps(messages, allow_nan=False))


def checked_step(step: Any) -> Step:
    """A step of an environment as plain data; ``info`` keeps ``success`` and ``reward_parts``.

    Raises:
        RewardError: not a Step; the reward or a part of it is not a finite number below `MAX_REWARD`.
        TypeError: messages that are none.
        ValueError: as `checked_messages`; an array in place of a truth value.
    """
    if not isinstance(step, Step):
        raise RewardError(f"step gave {type(step).__name__} in place of a Step")
    info = step.info if isinstance(step.info, dict) else {}
    parts = info.get("reward_parts") or {}
    try:
        reward, parts = _number(step.reward), {str(name): _number(value) for name, value in parts.items()}
    except Exception as error:
        raise RewardError(f"the environment gave reward {as_text(step.reward)}, parts {as_text(parts)}") from error
    if not isinstance(found := info.get("success", False), bool | np.bool_):
        raise TypeError(f"step gave success {as_text(found)} in place of true or false")
    told = {"success": bool(found)} if "success" in info else {}
    messages = checked_messages(step.messages, "step")
    return Step(messages, reward, bool(step.done), bool(step.truncated), {**told, "reward_parts": parts})


def _number(value: Any) -> float:
    if isinstance(value, str | bytes) or not abs(number := float(value)) < MAX_REWARD:
        raise ValueError(f"{value!r} is no finite number")
    return number


def as_text(value: Any) -> str:
    """An error's message or a value as written, short; whatever it does when asked."""
    try:
        return str(value) if isinstance(value, BaseException) else repr(value)[:80]
    except Exception:
        return "(its text cannot be made)"
