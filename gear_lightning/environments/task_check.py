"""Checks tasks before training: a sample of a large source, and only tasks that have not passed the check before."""

import hashlib
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from ..distributed.collective import check_same, place, run_on_all_ranks
from ..errors import UserError
from ..runs.files import cache_dir, replace_text, try_to_write
from .base import Task, TaskSource

ENDLESS = 16  # number of tasks of an endless source that are checked
LONGEST = 100  # maximum number of tasks in a sample that are chosen for their long prompts
VIEWS = 64  # number of tasks that are searched for one whose privileged prompt fits
REMEMBERED = 1000  # number of tasks from which on a passed check is cached


class TaskChecker(ABC):
    """Checks whether single tasks can be used."""

    @abstractmethod
    def check_task(self, task: Task) -> None:
        """Raise `UserError` if the task cannot be used for training."""

    def check_key(self) -> str | None:
        """Return a text that identifies everything `check_task` depends on besides the task; None if unknown (a passed
        check is then not cached)."""
        return None


def chosen(source: TaskSource, count: int, limit: int | None) -> Sequence[int]:
    """Return the indices of the tasks to check: the same at every start.

    Args:
        source: the tasks.
        count: number of tasks that are used, from the first one on.
        limit: maximum number of tasks to check. None: all.
    """
    if limit is None or count <= limit:
        return range(count)
    longest = [i for i in source.longest(min(LONGEST, -(-limit // 10))) if i < count]
    rest = random.Random(0).sample(range(count), min(count, limit))
    return sorted(list(dict.fromkeys([*longest, *rest]))[:limit])


def check_source(name: str, source: TaskSource, used: int | None, limit: int | None, checker: TaskChecker) -> None:
    """Check a source's tasks. All ranks must call it: each checks a part, and all ranks fail if one does.

    Args:
        name: name of the option that sets the source.
        source: the tasks.
        used: number of tasks that are used, from the first one on. None: all.
        limit: see `chosen`.
        checker: checks one task.

    Raises:
        UserError: there are no tasks, or one cannot be used (names the task, and its file and row if these are known),
            or the ranks have different tasks.
    """
    rank, ranks = place()
    digest = run_on_all_ranks(lambda: source.digest)
    advice = "give all machines the same files; a build function must return the same on all of them"
    check_same({name: "unknown" if digest is None else digest[:12]}, "other tasks", advice)

    def check() -> tuple[int, int, Path | None, bool]:
        size = ENDLESS if source.size is None else source.size
        if not size:
            raise UserError(f"{name}: {type(source).__name__} has no tasks")
        count = size if used is None else min(size, used)
        indices = chosen(source, count, limit)
        stamp = _stamp(source, indices, checker)
        known = stamp is not None and stamp.exists()
        mine = [] if known else indices[rank::ranks]
        for index in mine or indices[:1]:  # at least one: something may be missing on this machine only
            _check(checker, source, index)
        return len(indices), count, stamp, known

    checked, count, stamp, known = run_on_all_ranks(check)
    if stamp is not None and not known:
        text = f"{name}: {checked} tasks can be used\n"
        try_to_write("result of the check of the tasks", lambda: replace_text(stamp, text))
    if checked < count:
        when = " at an earlier start" if known else ""
        rank_zero_info(
            f"{name}: checked {checked:,} of {count:,} tasks{when}: a sample, and those with the longest lines. If an "
            "unchecked task turns out invalid, its rollouts fail (data.check_limit)"
        )


def _check(checker: TaskChecker, source: TaskSource, index: int) -> None:
    try:
        checker.check_task(source[index])
    except UserError as error:
        raise _placed(error, source, index) from error


def _placed(error: UserError, source: TaskSource, index: int) -> UserError:
    """Return an error about a task that names the file and the row, if these are known."""
    place = source.place_of(index)
    return error if place is None or place in str(error) else UserError(f"{place}: {error}")


def check_calls(credit: Any, source: TaskSource) -> None:
    """Check that tasks have tools if a credit rule weighs only tool calls.

    Args:
        credit: a `gear_lightning.credit.CreditAssigner`.
        source: the tasks to train on; a sample is searched for one with tools.

    Raises:
        UserError: no task of the sample has tools.
    """
    if credit.where != "actions":
        return
    size = ENDLESS if source.size is None else source.size
    indices = list(dict.fromkeys(i * size // VIEWS for i in range(VIEWS)))
    if not any(source[index].tools for index in indices):
        raise UserError(
            f"model.credit.where=actions weighs only tool calls, and none of {len(indices)} tasks of data.train_tasks "
            "has tools: all weights would be 1. Leave it out, or use where=answer"
        )


def check_teacher_views(module: Any, source: TaskSource) -> None:
    """Check that at least one task's privileged prompt leaves the model space for a response.

    Args:
        module: a `gear_lightning.module.GearModule`.
        source: the tasks to train on; a sample is tried until one fits.

    Raises:
        UserError: none fits, so the teacher would never see privileged text.
    """
    options = replace(module.teacher_options, overlong="error", max_prompt=sys.maxsize)
    if not module.needs_teacher or options.shows not in ("reference", "answer") or module.longest is None:
        return  # the other privileged texts come from rollouts
    size, refused = ENDLESS if source.size is None else source.size, []
    for index in dict.fromkeys(i * size // VIEWS for i in range(VIEWS)):
        try:
            task = source[index]
            module.privileged_prompt(task, task.messages, options=options)
            return
        except UserError as error:
            refused.append(str(_placed(error, source, index)))
    raise UserError(
        f"the privileged prompt leaves no space for a response in any of {len(refused)} tasks, so the teacher would "
        f"see no privileged text: {refused[0]}. Shorten the {options.shows}s or model.teacher.template, use another "
        "model.teacher.shows, or use a model with a longer context"
    )


def _stamp(source: TaskSource, indices: Sequence[int], checker: TaskChecker) -> Path | None:
    """Return the path of the cache file that marks these tasks as checked; None if tasks or check cannot be identified,
    or if there are too few tasks to cache."""
    if len(indices) < REMEMBERED or (content := source.fingerprint) is None or (key := checker.check_key()) is None:
        return None
    identity = repr([content, key, list(indices)]).encode("utf-8", "surrogatepass")
    return cache_dir() / "tasks" / f"{hashlib.sha256(identity).hexdigest()[:32]}.checked"
