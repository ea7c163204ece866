"""Single-turn tasks from reasoning-gym's generators (extra: reasoning-gym)."""

import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from ..errors import UserError, require_extra
from ..rewards import final_answer, last_number
from .base import Environment, Message, Step, Task, TaskSource


def _dataset(name: str, size: int, seed: int, options: dict[str, Any]) -> Any:
    require_extra("reasoning_gym", "reasoning-gym")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        close = [n for n in DATASETS if name in n or n in name]
        raise UserError(f"reasoning-gym has no data set {name!r}; there are {', '.join(close or sorted(DATASETS))}")
    try:
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"reasoning-gym: {name} does not take {options} ({error})") from None


@lru_cache(maxsize=16)
def _scorer(name: str, size: int, seed: int, options: str) -> Any:
    return _dataset(name, size, seed, json.loads(options))


@dataclass(frozen=True)
class ReasoningGymTasks(TaskSource):
    """Tasks of one reasoning-gym generator, to be played in `ReasoningGym`.

    The reference is the worked solution where the generator gives one (``answer_cot``), else ``expression = answer``,
    else the answer.

    Args:
        dataset: name of the generator, such as ``chain_sum``.
        options: the generator's own settings.
        size: number of tasks.
        seed: of the generator; two sources with different seeds share tasks only by chance.
        instruction: the system message. Null: none.
    """

    dataset: str
    options: dict[str, Any] = field(default_factory=dict)
    size: int = 10_000  # type: ignore[assignment]  # pyright: ignore[reportIncompatibleMethodOverride]
    seed: int = 0
    instruction: str | None = None

    def __post_init__(self):
        if self.size < 1:
            raise UserError(f"size={self.size} must be at least 1")
        object.__setattr__(self, "_items", _dataset(self.dataset, self.size, self.seed, self.options))
        if self._items[0]["answer"] is None:  # type: ignore[attr-defined]
            raise UserError(f"reasoning-gym: {self.dataset} gives no answers, so that no teacher can see one")

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
    """Scores an answer with its generator's own scorer. A scorer that raises on an answer gives it 0.

    Args:
        answer: what of the reply is the answer: ``all`` of it, its ``last_number``, or what stands between the last
            ``<answer>`` and ``</answer>`` (``tag``).
        partial_credit: reward the scorer's value as it is. Many scorers give 0.01 to 0.25 for any text, so that by
            default only a full score counts: 1, else 0.
    """

    def __init__(self, answer: Literal["all", "last_number", "tag"] = "all", partial_credit: bool = False):
        self.answer = answer
        self.partial_credit = partial_credit

    def check(self, task: Task) -> None:
        if "dataset" not in task.meta:
            raise UserError(f"task {task.id} does not come from ReasoningGymTasks, and ReasoningGym cannot score it")

    def step(self, message: Message) -> Step:
        meta = self.task.meta
        scorer = _scorer(meta["dataset"], meta["size"], meta["seed"], json.dumps(meta["options"]))
        try:
            score = float(
                scorer.score_answer(answer=self._extract(final_answer([message])), entry=scorer[meta["index"]])
            )
        except Exception:
            score = 0.0
        reward = score if self.partial_credit else float(score >= 1)
        return Step(reward=reward, done=True, info={"success": score >= 1, "reward_parts": {"score": score}})

    def _extract(self, text: str) -> str:
        if self.answer == "last_number":
            found = last_number(text)
            return "" if found is None else f"{found:.15g}"
        if self.answer == "tag":
            found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
            return found[-1].strip() if found else ""
        return text.strip()
