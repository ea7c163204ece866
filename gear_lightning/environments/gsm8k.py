"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168) as a tool task: word problems with a calculator.

The package contains a sample of the data set under its MIT license; use ``path`` for the full files.
"""

import random
import re
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any, Literal

from ..errors import UserError
from ..rewards import last_number
from ..runs.identity import file_digest
from . import lines
from .arithmetic import CalculatorError, calculate
from .base import Demonstration, Demonstrations, Message, Task, tool_call, tool_result
from .calculator import CALCULATOR
from .lines import IndexedLines, LineTasks, index_lines

INSTRUCTION = (
    "Solve the problem step by step. Use the calculator for every calculation. "
    "End with #### and the answer as a plain number."
)
_MARK = re.compile(r"<<([^<>=]*)=([^<>]*)>>")


Problem = tuple[str, str, str]  # id, question, worked solution


def load(path: str | None, split: str, min_marks: int, max_marks: int | None) -> IndexedLines:
    """Return the problems of a GSM8K file whose number of calculator marks is within the limits. `problem` reads one.

    Raises:
        UserError: the file or a line cannot be read, or no problem is within the limits.
    """
    source = path or str(files("gear_lightning").joinpath(f"environments/assets/gsm8k/{split}.jsonl"))

    def look(number: int, line: dict[str, Any]) -> str | None:
        name, _, answer = _problem(split, number, line, f"{source}:{number}")
        marks = len(_MARK.findall(answer))
        return name if min_marks <= marks and (max_marks is None or marks <= max_marks) else None

    key = repr([split, min_marks, max_marks, file_digest(__file__), file_digest(lines.__file__)])
    found = index_lines(source, key, look, {})
    if not len(found):
        raise UserError(f"{source}: no problem has between {min_marks} and {max_marks} calculator marks")
    return found


def _problem(split: str, number: int, line: dict[str, Any], where: str) -> Problem:
    question, answer = line.get("question"), line.get("answer")
    solution, _, final = answer.rpartition("####") if isinstance(answer, str) else ("", "", "")
    if not (isinstance(question, str) and isinstance(answer, str) and solution and last_number(final) is not None):
        raise UserError(f"{where}: expected the keys question and answer, with #### before the final number")
    return f"gsm8k-{split}-{line.get('number', number)}", question, answer


def problem(found: IndexedLines, index: int, split: str) -> Problem:
    """Return one problem of a file.

    Raises:
        UserError: the file was changed after it was indexed.
    """
    number, line = found[index]
    return _problem(split, number, line, f"{found.path}:{number}")


def _task(name: str, question: str, answer: str, instruction: str, calculator: bool) -> Task:
    messages = [{"role": "system", "content": instruction}, {"role": "user", "content": question}]
    meta = {"answer": answer.rpartition("####")[2].strip(), "reward": "number"}
    return Task(name, messages, (CALCULATOR,) if calculator else (), _MARK.sub("", answer), meta)


@dataclass(frozen=True)
class GSM8KTasks(LineTasks):
    """Problems of GSM8K. The worked solution is the reference.

    Args:
        path: a .jsonl or .jsonl.gz file in the data set's own format. Null: the sample in the package (64 training and
            16 test problems with one or two calculator marks).
        split: which sample to use if ``path`` is null; also part of the tasks' ids.
        min_marks: minimum number of calculator marks in the worked solution.
        max_marks: maximum number of calculator marks. Null: no maximum.
        calculator: list the calculator in the task's tools; requires `Calculator` as the environment.
        instruction: the system message.
    """

    path: str | None = None
    split: Literal["train", "test"] = "train"
    min_marks: int = 0
    max_marks: int | None = None
    calculator: bool = True
    instruction: str = INSTRUCTION

    def __post_init__(self):
        object.__setattr__(self, "_lines", load(self.path, self.split, self.min_marks, self.max_marks))

    def __getitem__(self, index: int) -> Task:
        name, question, answer = problem(self._lines, index, self.split)  # type: ignore[attr-defined]
        return _task(name, question, answer, self.instruction, self.calculator)

    @property
    def fingerprint(self) -> str:
        return repr([self._lines.digest, self])  # type: ignore[attr-defined]


def transcript(answer: str) -> list[Message] | None:
    """Return a worked solution as the conversation of an agent that calls the calculator at every mark.

    Returns:
        The messages; None if the calculator's result differs from the value in a mark.
    """
    messages: list[Message] = []
    place = 0
    for mark in _MARK.finditer(answer):
        try:
            value = calculate(mark[1])
            if float(value) != float(mark[2].replace(",", "")):
                return None
        except (CalculatorError, ValueError):
            return None
        messages += [
            tool_call("calculator", {"expression": mark[1]}, answer[place : mark.start()].strip()),
            tool_result("calculator", value),
        ]
        place = mark.end()
    return [*messages, {"role": "assistant", "content": answer[place:].strip()}]


@dataclass(frozen=True)
class GSM8KDemonstrations(Demonstrations):
    """Worked solutions with their calculator marks as tool calls, in a seeded endless order.

    Args:
        path: as in `GSM8KTasks`; training problems.
        min_marks: minimum number of calculator marks.
        max_marks: maximum number of calculator marks. Null: no maximum.
        privileged_fraction: fraction of demonstrations with the reference in the prompt, as the teacher sees it.
        instruction: the system message; use the same as for the tasks.
        seed: seed of the order.
    """

    path: str | None = None
    min_marks: int = 1
    max_marks: int | None = None
    privileged_fraction: float = 0.25
    instruction: str = INSTRUCTION
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.privileged_fraction <= 1:
            raise UserError(f"privileged_fraction={self.privileged_fraction}: must be in [0, 1]")
        problems = load(self.path, "train", self.min_marks, self.max_marks)
        usable = [i for i in range(len(problems)) if transcript(problem(problems, i, "train")[2]) is not None]
        if not usable:
            raise UserError("no problem has calculator marks whose values the calculator reproduces")
        object.__setattr__(self, "_problems", problems)
        object.__setattr__(self, "_usable", usable)

    def __reduce__(self):
        return type(self), tuple(getattr(self, f.name) for f in fields(self))

    def __getitem__(self, index: int) -> Demonstration:
        usable = self._usable  # type: ignore[attr-defined]
        epoch, place = divmod(index, len(usable))
        order = random.Random(f"gsm8k-{self.seed}-{epoch}").sample(range(len(usable)), len(usable))
        name, question, answer = problem(self._problems, usable[order[place]], "train")  # type: ignore[attr-defined]
        messages = transcript(answer)
        assert messages is not None
        privileged = random.Random(f"gsm8k-{self.seed}-{index}-view").random() < self.privileged_fraction
        return Demonstration(_task(name, question, answer, self.instruction, True), messages, privileged)
