"""Verifiable rewards: functions that score a finished transcript with a number."""

import importlib
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from math import inf, isfinite
from typing import Any

from .environments.awaiting import awaited
from .environments.base import Message, RewardError, Task
from .environments.checks import as_text, refuse_generator
from .errors import UserError, require_extra

Reward = Callable[[Task, list[Message]], "float | Mapping[str, float] | Awaitable[float | Mapping[str, float]]"]
"""``reward(task, transcript)``: the transcript has the messages after the prompt; the last one is the final answer.
Returns a number, or a mapping of named parts, which are summed and also recorded separately. May be ``async``."""

RewardChoice = str | dict[str, float] | Reward
"""A reward by name or import path; several of them with their weights, which are summed; or a function."""

# a minus followed by a space is also a sign, unless it subtracts (`12 - 5`) or starts a list item
_NUMBER = re.compile(
    r"(?:(?<![\w)])(?:[-−]|(?<![0-9)%}] )(?<!\n)[-−] ))?\$?(?=\.?[0-9])"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+)?"
)


def final_answer(transcript: list[Message]) -> str:
    """Return the text of the last assistant message; empty if there is none."""
    return next((m.get("content") or "" for m in reversed(transcript) if m["role"] == "assistant"), "")


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text with all its digits, without thousands commas and currency signs; None if there
    is none.

    A number after the last ``####`` (GSM8K's mark of the final answer) takes precedence.
    """
    before, mark, behind = text.rpartition("####")
    if mark and (first := _NUMBER.search(behind)):
        return _value(first[0])
    found = _NUMBER.findall(before or text)
    return _value(found[-1]) if found else None


def _value(number: str) -> Decimal:
    return Decimal(re.sub(r"[$,\s]", "", number).replace("−", "-"))


def answers_of(task: Task) -> list[str]:
    """Return the answers that the task accepts, as text: those of a list, or the only one.

    Raises:
        RewardError: the task has no answer.
    """
    found = task.meta.get("answer", [])
    found = found if isinstance(found, list | tuple) else [found]
    if not found:
        raise RewardError(f"task {task.id} has no answer")
    return [str(one).lower() if isinstance(one, bool) else str(one) for one in found]


def exact(task: Task, transcript: list[Message]) -> float:
    """Return 1 if the final answer equals an ``answer`` of the task, ignoring case and surrounding white space, else
    0."""
    found = final_answer(transcript).strip().casefold()
    return float(any(found == answer.strip().casefold() for answer in answers_of(task)))


def contains(task: Task, transcript: list[Message]) -> float:
    """Return 1 if the final answer contains an ``answer`` of the task, ignoring case, else 0."""
    wanted = [answer.strip().casefold() for answer in answers_of(task)]
    if not all(wanted):
        raise RewardError(f"task {task.id}: its answer is empty, which every text contains")
    found = final_answer(transcript).casefold()
    return float(any(answer in found for answer in wanted))


def number(task: Task, transcript: list[Message]) -> float:
    """Return 1 if the last number in the final answer (or the one after ``####``) equals an ``answer`` of the task,
    else 0.

    The tolerance is 1e-6 (absolute) for integer answers of any size, and 5e-6 (relative, six digits) for all others.
    """
    found, right = last_number(final_answer(transcript)), False
    for answer in answers_of(task):
        wanted = last_number(answer)
        if wanted is None:
            raise RewardError(f"task {task.id}: its answer {answer!r} contains no number")
        whole = wanted == wanted.to_integral_value()
        allowed = Decimal("1e-6") if whole else Decimal("5e-6") * abs(wanted)
        right = right or (found is not None and abs(found - wanted) <= allowed)
    return float(right)


def math(task: Task, transcript: list[Message]) -> float:
    """Return 1 if the final answer is mathematically equal to an ``answer`` of the task, else 0. Supports LaTeX
    (extra: math-verify)."""
    from .environments.math_judge import judge

    for answer in answers_of(task):
        verdict = judge(answer, final_answer(transcript))
        if verdict == "bad gold":
            raise RewardError(f"task {task.id}: math-verify cannot read its answer {answer!r} as mathematics")
        if verdict == "right":
            return 1.0
    return 0.0


def format(task: Task, transcript: list[Message]) -> float:
    """Return 1 if the policy kept to the form of a turn, else 0.

    No assistant message ends inside of its reasoning, and each has an answer (``content``) or tool calls; the last one
    has an answer. A message without reasoning keeps to the form, and so does one whose reasoning the budget closed.
    """
    said = [m for m in transcript if m["role"] == "assistant"]
    kept = (not m.get("unfinished") and ((m.get("content") or "").strip() or m.get("tool_calls")) for m in said)
    return float(all(kept) and bool(final_answer(transcript).strip()))


BUILT_IN: dict[str, Reward] = {
    "exact": exact,
    "contains": contains,
    "number": number,
    "math": math,
    "format": format,
}


@dataclass(frozen=True)
class WeightedSum:
    """The sum of several rewards, each times its weight; the terms are the parts of the reward.

    Args:
        rewards: name -> (weight, reward).
    """

    rewards: dict[str, tuple[float, Reward]]

    def __call__(self, task: Task, transcript: list[Message]) -> dict[str, float]:
        return {name: weight * evaluate(reward, task, transcript)[0] for name, (weight, reward) in self.rewards.items()}


def _weighted(weights: Mapping[str, float]) -> WeightedSum:
    """Return the reward that a mapping describes.

    Raises:
        UserError: it is empty, a weight is not a finite number or 0, or a reward cannot be resolved.
    """
    if not weights:
        raise UserError("reward {} names no reward; give weights by name, such as {number: 1.0, format: 0.2}")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not isfinite(weight) or weight == 0:
            raise UserError(f"reward {name!r} has the weight {weight!r}; weights must be finite numbers, and not 0")
    return WeightedSum({str(name): (float(weight), resolve_reward(name)) for name, weight in weights.items()})


def import_function(path: str, what: str) -> Callable[..., Any]:
    """Return a function by its import path, ``package.module.name``.

    Args:
        path: the import path.
        what: kind of function, for the error message.

    Raises:
        UserError: it cannot be imported, or is not callable.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing a module can raise any exception
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{what} {path!r} cannot be imported ({reason}); use package.module.name") from error
    if not callable(found):
        raise UserError(f"{what} {path!r} is a {type(found).__name__}, not a function")
    return found


def resolve_reward(reward: RewardChoice) -> Reward:
    """Return a reward by its name or import path, or the weighted sum of several.

    Raises:
        UserError: it is not a built-in reward and cannot be imported, is not callable, yields, or an extra is missing.
    """
    if isinstance(reward, Mapping):
        return _weighted(reward)
    if not isinstance(reward, str):
        if not callable(reward):
            raise UserError(f"reward {reward!r} is not a name, an import path or a function")
        refuse_generator(reward, f"the reward {getattr(reward, '__name__', type(reward).__name__)}")
        return reward
    if reward == "math":
        require_extra("math_verify")
    if reward in BUILT_IN:
        return BUILT_IN[reward]
    if "." not in reward:
        raise UserError(f"reward {reward!r} is neither built in ({', '.join(BUILT_IN)}) nor an import path")
    function = import_function(reward, "reward")
    refuse_generator(function, f"reward {reward!r}")
    return function


def reward_of(task: Task, default: RewardChoice | None) -> Reward:
    """Return the reward that scores a task: the one in its meta, else the default.

    Raises:
        UserError: there is neither, or it cannot be resolved; names the task.
    """
    reward = task.meta.get("reward")
    if reward is None:
        reward = default
    if reward is None:
        raise UserError(
            f"task {task.id}: no reward is set; set one ({', '.join(BUILT_IN)} or an import path) in the task or in "
            "the environment"
        )
    try:
        return resolve_reward(reward)
    except UserError as error:
        raise UserError(f"task {task.id}: {error}") from None


def check_reward(task: Task, default: RewardChoice | None) -> None:
    """Check before training that a task can be scored.

    Raises:
        UserError: there is no reward, or a built-in reward cannot use the task's answer; names the task.
    """
    reward = reward_of(task, default)
    terms = [term for _, term in reward.rewards.values()] if isinstance(reward, WeightedSum) else [reward]
    try:
        for term in terms:
            if term is math:  # math-verify itself only reads the answer when it scores
                answers_of(task)
            elif term in BUILT_IN.values():
                term(task, [])
    except RewardError as error:
        raise UserError(str(error)) from None


def evaluate(reward: Reward, task: Task, transcript: list[Message]) -> tuple[float, dict[str, float]]:
    """Score a transcript.

    Returns:
        The reward and its parts, all finite.

    Raises:
        RewardError: the reward raised, or returned something else.
    """
    try:
        found = awaited(reward(task, transcript))
    except RewardError:
        raise
    except (Exception, SystemExit, GeneratorExit) as error:  # a reward must not end the process
        raise RewardError(f"task {task.id}: the reward raised {type(error).__name__}: {as_text(error)}") from error
    if isinstance(found, Mapping):
        parts = {str(name): _finite(value, task, f"{name} = ") for name, value in found.items()}
        return _finite(sum(parts.values()), task, "the sum "), parts
    return _finite(found, task, ""), {}


def _finite(value: Any, task: Task, name: str) -> float:
    try:
        number = float("nan" if isinstance(value, str | bytes) else value)
    except Exception:  # a tensor of two elements, an integer too large for a float, ...
        number = float("nan")
    if not isfinite(number):
        shown = repr(value)[:80] if isinstance(value, float | str | None) else f"a {type(value).__name__}"
        raise RewardError(f"task {task.id}: the reward returned {name}{shown}, expected a finite number")
    return number


@dataclass(frozen=True)
class OverlongPenalty:
    """Penalty on a rollout's reward for its length (DAPO's soft overlong punishment, arXiv 2503.14476).

    factor x min(1, max(0, (sampled tokens - expected) / buffer)): 0 up to ``expected`` tokens, ``factor`` from
    expected + buffer on. The paper uses 16384 and 4096, whose sum is its maximum response length.

    Args:
        expected: number of sampled tokens over all turns up to which the penalty is 0.
        buffer: number of tokens over which the penalty grows.
        factor: the full penalty, in units of the reward.

    Raises:
        UserError: a value out of range.
    """

    expected: int
    buffer: int
    factor: float = 1.0

    def __post_init__(self):
        if not (self.expected >= 0 and self.buffer >= 1 and 0 < self.factor < inf):
            raise UserError(
                f"overlong.expected={self.expected}, overlong.buffer={self.buffer}, overlong.factor={self.factor}: "
                "expected must be at least 0, buffer at least 1, and factor above 0 and finite"
            )

    def __call__(self, tokens: int) -> float:
        """Return the penalty of a rollout with ``tokens`` sampled tokens: between 0 and ``factor``."""
        return self.factor * min(1.0, max(0.0, (tokens - self.expected) / self.buffer))
