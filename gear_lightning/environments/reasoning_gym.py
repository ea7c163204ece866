"""Single-turn tasks from the generators of reasoning-gym (extra: reasoning-gym)."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from ..errors import UserError, require_extra
from ..rewards import final_answer, last_number
from .base import Environment, Message, Step, Task, TaskSource

# Scorers that evaluate the answer as Python (eval, sympy's parser, which uses eval, or a Fraction of 1e999999999).
# They only get answers that match this pattern; all other answers score 0 ...
_SHAPES = {
    **dict.fromkeys(["countdown", "puzzle24"], re.compile(r"(?!.*\*\s*\*)[0-9\s()+*/.-]{0,500}", re.DOTALL)),
    **dict.fromkeys(["binary_matrix", "n_queens", "spiral_matrix", "string_insertion"], re.compile(r"[\w\s]*")),
    "coin_flip": re.compile(r"[0-9\s./+-]*(?:[eE][+-]?[0-9]{1,2})?\s*"),
}
# ... and scorers for which no pattern of right answers is safe
_UNSAFE = {"intermediate_integration", "polynomial_multiplication", "simple_integration"}


def _dataset(name: str, size: int, seed: int, options: dict[str, Any]) -> Any:
    require_extra("reasoning_gym")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        close = [n for n in DATASETS if name in n or n in name]
        raise UserError(f"reasoning-gym has no data set {name!r}; use one of {', '.join(close or sorted(DATASETS))}")
    if name == "composite":
        raise UserError(
            "reasoning-gym: composite needs objects that a config file cannot contain; choose a single data set"
        )
    try:
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
    except Exception as error:  # reasoning-gym raises exceptions of various types for invalid options
        raise UserError(f"reasoning-gym: {name} does not accept {options} ({error})") from None


@lru_cache(maxsize=16)
def _scorer(name: str, size: int, seed: int, options: str) -> Any:
    return _dataset(name, size, seed, json.loads(options))


@dataclass(frozen=True)
class ReasoningGymTasks(TaskSource):
    """Tasks of one reasoning-gym generator, for the environment `ReasoningGym`.

    The reference is the worked solution if the generator provides one (``answer_cot``), else ``expression = answer``,
    else the answer.

    Args:
        dataset: name of the generator, such as ``chain_sum``.
        options: the generator's own settings.
        size: number of tasks.
        seed: seed of the generator; two sources with different seeds share tasks only by chance.
        instruction: the system message. Null: none.
    """

    dataset: str
    options: dict[str, Any] = field(default_factory=dict)
    size: int = 10_000  # type: ignore[assignment]  # pyright: ignore[reportIncompatibleMethodOverride]
    seed: int = 0
    instruction: str | None = None

    def __post_init__(self):
        if self.size < 1:
            raise UserError(f"size={self.size}: must be at least 1")
        object.__setattr__(self, "_items", _dataset(self.dataset, self.size, self.seed, self.options))
        if self._items[0]["answer"] is None:  # type: ignore[attr-defined]
            raise UserError(
                f"reasoning-gym: {self.dataset} provides no answers, so there is no reference for the teacher"
            )

    def __getitem__(self, index: int) -> Task:
        item = self._items[index]  # type: ignore[attr-defined]
        metadata, answer = item["metadata"], item["answer"]
        reference = metadata.get("answer_cot")
        if not isinstance(reference, str):
            expression = metadata.get("expression")
            reference = f"{expression} = {answer}" if isinstance(expression, str) else answer
        messages: list[Message] = [{"role": "user", "content": item["question"]}]
        if self.instruction is not None:
            messages.insert(0, {"role": "system", "content": self.instruction})
        meta = {"answer": answer, "dataset": self.dataset, "options": dict(self.options)}
        meta |= {"size": self.size, "seed": self.seed, "index": index}
        return Task(f"{self.dataset}-{self.seed}-{index}", messages, (), reference, meta)


class ReasoningGym(Environment):
    """Scores an answer with its generator's own scorer. An answer on which the scorer raises gets 0.

    Some scorers run the answer as Python code. Answers to ``countdown``, ``puzzle24`` and ``coin_flip`` must be plain
    arithmetic, and answers to ``binary_matrix``, ``n_queens``, ``spiral_matrix`` and ``string_insertion`` must be words
    and numbers; all other answers score 0. The data sets of polynomials and integrals are rejected: use `SingleTurn`
    for them.

    Args:
        answer: the part of the reply that is the answer: ``all`` of it, its ``last_number``, or the text between the
            last ``<answer>`` and ``</answer>`` (``tag``).
        partial_credit: use the scorer's value as the reward. Many scorers give 0.01 to 0.25 for any text, so by default
            the reward is 1 for a full score, else 0.
    """

    def __init__(self, answer: Literal["all", "last_number", "tag"] = "all", partial_credit: bool = False):
        self.answer = answer
        self.partial_credit = partial_credit

    def check(self, task: Task) -> None:
        if "dataset" not in task.meta:
            raise UserError(f"task {task.id} does not come from ReasoningGymTasks, so ReasoningGym cannot score it")
        if (name := task.meta["dataset"]) in _UNSAFE:
            raise UserError(
                f"task {task.id}: reasoning-gym's scorer of {name} runs the policy's text as Python code; use the "
                "environment SingleTurn with a reward (exact, math or an import path)"
            )

    def reset(self, task: Task, *, seed: int) -> list[Message]:
        self.check(task)
        return super().reset(task, seed=seed)

    def step(self, message: Message) -> Step:
        meta = self.task.meta
        scorer = _scorer(meta["dataset"], meta["size"], meta["seed"], json.dumps(meta["options"]))
        entry = scorer[meta["index"]]
        answer = self._extract(final_answer([message]))
        shape = _SHAPES.get(meta["dataset"])
        score = 0.0
        if shape is None or shape.fullmatch(answer):
            with suppress(Exception):
                score = float(scorer.score_answer(answer=answer, entry=entry))
        reward = score if self.partial_credit else float(score >= 1)
        return Step(reward=reward, done=True, info={"success": score >= 1, "reward_parts": {"score": score}})

    def _extract(self, text: str) -> str:
        if self.answer == "last_number":
            found = last_number(text)
            digits = "" if found is None else f"{found:f}"
            return digits.rstrip("0").rstrip(".") if "." in digits else digits
        if self.answer == "tag":
            found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
            return found[-1].strip() if found else ""
        return text.strip()
