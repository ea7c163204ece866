"""Verifiable rewards: functions from a finished transcript to a number."""

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from math import inf, isfinite
from typing import Any

from .environments.base import Message, RewardError, Task
from .environments.checks import as_text, refuse_async
from .errors import UserError, require_extra

Reward = Callable[[Task, list[Message]], "float | Mapping[str, float]"]
"""``reward(task, transcript)``: the transcript is what follows the prompt, and its last message is the final answer.
Gives a number, or the parts of one by name, which are summed and recorded one by one."""

# a minus with a space behind it is a sign too, unless it subtracts (`12 - 5`) or begins an item of a list
_NUMBER = re.compile(
    r"(?:(?<![\w)])(?:[-−]|(?<![0-9)%}] )(?<!\n)[-−] ))?\$?(?=\.?[0-9])"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+)?"
)


def final_answer(transcript: list[Message]) -> str:
    """Text of the last assistant message; empty where there is none."""
    return next((m.get("content") or "" for m in reversed(transcript) if m["role"] == "assistant"), "")


def last_number(text: str) -> Decimal | None:
    """The last number in a text, all its digits, thousands commas and currency signs aside; None where there is none.

    The number behind the last ``####`` (GSM8K's mark of the final answer) goes before all others.
    """
    before, mark, behind = text.rpartition("####")
    if mark and (first := _NUMBER.search(behind)):
        return _value(first[0])
    found = _NUMBER.findall(before or text)
    return _value(found[-1]) if found else None


def _value(number: str) -> Decimal:
    return Decimal(re.sub(r"[$,\s]", "", number).replace("−", "-"))


def answer_of(task: Task) -> str:
    """The task's ``answer`` as text.

    Raises:
        RewardError: it has none.
    """
    if "answer" not in task.meta:
        raise RewardError(f"task {task.id} has no answer")
    return str(task.meta["answer"])


def exact(task: Task, transcript: list[Message]) -> float:
    """1 where the final answer is the task's ``answer``, surrounding white space and case aside."""
    return float(final_answer(transcript).strip().casefold() == answer_of(task).strip().casefold())


def contains(task: Task, transcript: list[Message]) -> float:
    """1 where the final answer holds the task's ``answer``, case aside."""
    wanted = answer_of(task).strip().casefold()
    if not wanted:
        raise RewardError(f"task {task.id}: its answer is empty, and every text holds that")
    return float(wanted in final_answer(transcript).casefold())


def number(task: Task, transcript: list[Message]) -> float:
    """1 where the last number of the final answer (or the one behind ``####``) equals the task's ``answer``.

    Whole answers must be met to 1e-6, however large they are; others to 5e-6 of themselves (six digits).
    """
    wanted, found = last_number(answer_of(task)), last_number(final_answer(transcript))
    if wanted is None:
        raise RewardError(f"task {task.id}: its answer {answer_of(task)!r} holds no number")
    whole = wanted == wanted.to_integral_value()
    allowed = Decimal("1e-6") if whole else Decimal("5e-6") * abs(wanted)
    return float(found is not None and abs(found - wanted) <= allowed)


def math(task: Task, transcript: list[Message]) -> float:
    """1 where the final answer is a mathematical equal of the ``answer``, LaTeX included (extra: math-verify)."""
    from .environments.math_judge import judge

    verdict = judge(answer_of(task), final_answer(transcript))
    if verdict == "bad gold":
        raise RewardError(f"task {task.id}: its answer {answer_of(task)!r} is no mathematics that math-verify can read")
    return float(verdict == "right")


BUILT_IN: dict[str, Reward] = {"exact": exact, "contains": contains, "number": number, "math": math}


def import_function(path: str, what: str) -> Callable[..., Any]:
    """A function by its import path, ``package.module.name``.

    Args:
        path: the import path.
        what: what it is for, for the error.

    Raises:
        UserError: it cannot be imported, or is not callable.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{what} {path!r} cannot be imported ({reason}); give package.module.name") from error
    if not callable(found):
        raise UserError(f"{what} {path!r} is a {type(found).__name__}, not a function")
    return found


def resolve_reward(reward: "str | Reward") -> Reward:
    """A reward by its name or import path.

    Raises:
        UserError: no such built-in, nothing to import there, no function, one that is async, or a missing extra.
    """
    if not isinstance(reward, str):
        if not callable(reward):
            raise UserError(f"reward {reward!r} is neither a name, an import path nor a function")
        refuse_async(reward, f"the reward {getattr(reward, '__name__', type(reward).__name__)}")
        return reward
    if reward == "math":
        require_extra("math_verify")
    if reward in BUILT_IN:
        return BUILT_IN[reward]
    if "." not in reward:
        raise UserError(f"reward {reward!r} is neither built in ({', '.join(BUILT_IN)}) nor an import path")
    function = import_function(reward, "reward")
    refuse_async(function, f"reward {reward!r}")
    return function


def reward_of(task: Task, default: "str | Reward | None") -> Reward:
    """The reward that scores a task: the one its meta names, else the default.

    Raises:
        UserError: there is neither, or it cannot be resolved; names the task.
    """
    reward = task.meta.get("reward")
    if reward is None:
        reward = default
    if reward is None:
        raise UserError(
            f"task {task.id}: nothing says how it is scored; give the task a reward ({', '.join(BUILT_IN)} or an "
            "import path), or the environment"
        )
    try:
        return resolve_reward(reward)
    except UserError as error:
        raise UserError(f"task {task.id}: {error}") from None


def check_reward(task: Task, default: "str | Reward | None") -> None:
    """Look at whether a task can be scored, before any training.

    Raises:
        UserError: no reward, or a built-in one that cannot use the task's answer; names the task.
    """
    reward = reward_of(task, default)
    try:
        if reward is math:  # whether math-verify can read the answer is seen when it scores
            answer_of(task)
        elif reward in BUILT_IN.values():
            reward(task, [])
    except RewardError as error:
        raise UserError(str(error)) from None


def evaluate(reward: Reward, task: Task, transcript: list[Message]) -> tuple[float, dict[str, float]]:
    """Score a transcript.

    Returns:
        The reward and its parts, all finite.

    Raises:
        RewardError: the reward raised, or gave something else.
    """
    try:
        found = reward(task, transcript)
    except RewardError:
        raise
    except (Exception, SystemExit, GeneratorExit) as error:  # a reward may not end the process either
        raise RewardError(f"task {task.id}: the reward raised {type(error).__name__}: {as_text(error)}") from error
    if isinstance(found, Mapping):
        parts = {str(name): _finite(value, task, f"{name} = ") for name, value in found.items()}
        return _finite(sum(parts.values()), task, "the sum "), parts
    return _finite(found, task, ""), {}


def _finite(value: Any, task: Task, name: str) -> float:
    try:
        number = float("nan" if isinstance(value, str | bytes) else value)
    except Exception:  # a tensor of two elements, an integer beyond all floats, ...
        number = float("nan")
    if not isfinite(number):
        shown = repr(value)[:80] if isinstance(value, float | str | None) else f"a {type(value).__name__}"
        raise RewardError(f"task {task.id}: the reward gave {name}{shown}, expected a finite number")
    return number


@dataclass(frozen=True)
class OverlongPenalty:
    """What a rollout's reward loses for its length (DAPO's soft overlong punishment, arXiv 2503.14476).

    factor x min(1, max(0, (sampled tokens - expected) / buffer)): nothing up to ``expected`` tokens, all of ``factor``
    from expected + buffer on. The paper has 16384 and 4096, which together are its longest response.

    Args:
        expected: sampled tokens, over all turns, up to which nothing is lost.
        buffer: tokens over which the penalty grows.
        factor: the whole penalty, in units of the reward.

    Raises:
        UserError: a value out of range.
    """

    expected: int
    buffer: int
    factor: float = 1.0

    def __post_init__(self):
        if not (self.expected >= 0 and self.buffer >= 1 and 0 < self.factor < inf):
            raise UserError(
                f"overlong.expected={self.expected} must be at least 0, overlong.buffer={self.buffer} at least 1 and "
                f"overlong.factor={self.factor} above 0 and finite"
            )

    def __call__(self, tokens: int) -> float:
        """The penalty of a rollout with so many sampled tokens: between 0 and ``factor``."""
        return self.factor * min(1.0, max(0.0, (tokens - self.expected) / self.buffer))
