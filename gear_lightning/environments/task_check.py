"""The check of tasks before training: a sample of a large source, and nothing that passed it before."""

import hashlib
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from ..distributed.collective import place, run_on_all_ranks
from ..errors import UserError
from ..runs.files import cache_dir, replace_text, try_to_write
from .base import Task, TaskSource

ENDLESS = 16  # tasks that are checked of a source without end
LONGEST = 100  # of a sample, at most, are the tasks with the longest prompts
VIEWS = 64  # tasks of which one must leave the teacher its text
REMEMBERED = 1000  # tasks from which on a check is worth remembering


class TaskChecker(ABC):
    """Whoever knows what a task is needed for."""

    @abstractmethod
    def check_task(self, task: Task) -> None:
        """Raise `UserError` where the task cannot be trained on."""

    def check_key(self) -> str | None:
        """All that `check_task` depends on beside the task; None: unknown, so that no check is remembered."""
        return None


def chosen(source: TaskSource, count: int, limit: int | None) -> Sequence[int]:
    """Indices of the tasks to check: the same ones at every start.

    Args:
        source: the tasks.
        count: how many of them are used, the first ones.
        limit: check no more. None: all.
    """
    if limit is None or count <= limit:
        return range(count)
    longest = [i for i in source.longest(min(LONGEST, -(-limit // 10))) if i < count]
    rest = random.Random(0).sample(range(count), min(count, limit))
    return sorted(list(dict.fromkeys([*longest, *rest]))[:limit])


def check_source(name: str, source: TaskSource, used: int | None, limit: int | None, checker: TaskChecker) -> None:
    """Check a source's tasks. All ranks must call it: each takes a part of them, and all fail where one does.

    Args:
        name: the option that the source is given by.
        source: the tasks.
        used: the first so many are used. None: all.
        limit: see `chosen`.
        checker: checks one.

    Raises:
        UserError: there are no tasks, or one cannot be used; names it.
    """
    rank, ranks = place()

    def check() -> tuple[int, int, Path | None, bool]:
        size = ENDLESS if source.size is None else source.size
        if not size:
            raise UserError(f"{name}: {type(source).__name__} has no tasks")
        count = size if used is None else min(size, used)
        indices = chosen(source, count, limit)
        stamp = _stamp(source, indices, checker)
        known = stamp is not None and stamp.exists()
        mine = [] if known else indices[rank::ranks]
        for index in mine or indices[:1]:  # one at least: this machine may lack what others have
            checker.check_task(source[index])
        return len(indices), count, stamp, known

    checked, count, stamp, known = run_on_all_ranks(check)
    if stamp is not None and not known:
        text = f"{name}: {checked} tasks can be used\n"
        try_to_write("result of the check of the tasks", lambda: replace_text(stamp, text))
    if checked < count:
        when = " at an earlier start" if known else ""
        rank_zero_info(
            f"{name}: checked {checked:,} of {count:,} tasks{when}: a sample, and those with the longest lines. A task "
            "that turns out bad costs its rollouts (data.check_limit)"
        )


def check_teacher_views(module: Any, source: TaskSource) -> None:
    """Look for a task whose privileged prompt leaves the model a position for a response.

    Args:
        module: a `gear_lightning.module.GearModule`.
        source: the tasks to train on; some of them are looked at until one is found.

    Raises:
        UserError: there is none, so that the teacher would be shown nothing.
    """
    options = replace(module.teacher_options, overlong="error", max_prompt=sys.maxsize)
    if not module.needs_teacher or options.shows not in ("reference", "answer") or module.longest is None:
        return  # the other texts come from rollouts
    size, refused = ENDLESS if source.size is None else source.size, []
    for index in dict.fromkeys(i * size // VIEWS for i in range(VIEWS)):
        try:
            task = source[index]
            module.privileged_prompt(task, task.messages, options=options)
            return
        except UserError as error:
            refused.append(str(error))
    raise UserError(
        f"the privileged prompt leaves room for a response in none of {len(refused)} tasks, so that the teacher would "
        f"be shown nothing: {refused[0]}. Shorten the {options.shows}s or model.teacher.template, use another "
        "model.teacher.shows, or a model with more positions"
    )


def _stamp(source: TaskSource, indices: Sequence[int], checker: TaskChecker) -> Path | None:
    """The file that says that these tasks passed; None where that cannot be known, or is checked faster."""
    if len(indices) < REMEMBERED or (content := source.fingerprint) is None or (key := checker.check_key()) is None:
        return None
    told = repr([content, key, list(indices)]).encode("utf-8", "surrogatepass")
    return cache_dir() / "tasks" / f"{hashlib.sha256(told).hexdigest()[:32]}.checked"
