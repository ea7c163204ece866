"""Rounds of rollouts: an iteration collects the groups of one or more of them, begun now or ahead."""

import math
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch

from ..distributed.collective import run_on_all_ranks
from ..environments.base import Task
from ..errors import Stopped
from ..generation.iteration_stats import IterationStats
from ..rollout import Rollout, RolloutGroup
from ..runs.resume import random_state
from .generator import RolloutGenerator
from .groups import Signal, spread

ZeroSpread = Literal["keep", "drop", "resample"]


@dataclass(frozen=True)
class Round:
    """Rollouts that have been begun.

    Attributes:
        positions: places of the tasks in the order of training, of all ranks.
        tasks: this rank's places and tasks.
        rollouts: waits for this rank's rollouts, those of a task one after another.
    """

    positions: list[int]
    tasks: list[tuple[int, Task]]
    rollouts: Callable[[], list[Rollout]]


class Rounds(L.LightningDataModule):
    """Mixin of the data module: collects the groups of an iteration. See `RolloutDataModule` for the options."""

    tasks_per_iteration: int
    group_size: int
    inner_epochs: int
    zero_spread: ZeroSpread
    resample_rounds: int
    oversample: float
    seed: int
    generator: RolloutGenerator | None
    stop: Callable[[], bool]

    def __init__(self) -> None:
        super().__init__()
        self.cursor = 0  # tasks drawn so far, over all processes
        self.groups: list[RolloutGroup] = []  # of the current iteration, on this rank
        self.stats = IterationStats()
        self._due: list[int] = []  # places of tasks drawn before `cursor`, whose rollouts were lost when the run ended
        self._begun: deque[Round] = deque()  # rounds of later iterations
        self._taken: list[int] = []  # places of the tasks of an iteration that is being generated
        self._before_rollouts: dict[str, Any] | None = None  # random state before the rollouts, during generation

    @property
    @abstractmethod
    def _trainer(self) -> L.Trainer: ...

    @property
    def _device(self) -> torch.device:
        return self._trainer.strategy.root_device

    @abstractmethod
    def train_task(self, position: int) -> Task:
        """Return the task at a position of the order of training."""

    @property
    @abstractmethod
    def _signal(self) -> Signal: ...

    @property
    def in_rollouts(self) -> bool:
        """Whether an iteration has begun and its rollouts are not complete."""
        return self._before_rollouts is not None

    # -- tasks ----------------------------------------------------------------------------------------------------

    def _next_positions(self, number: int) -> list[int]:
        """Draw places in the order of training."""
        found, self._due = self._due[:number], self._due[number:]
        rest = number - len(found)
        self.cursor += rest
        return [*found, *range(self.cursor - rest, self.cursor)]

    def undrawn(self) -> tuple[int, list[int]]:
        """Return ``cursor``, and the places before it, as if the rollouts that are not complete had not been begun."""
        taken = self._taken if self.in_rollouts else []
        cursor, due = self.cursor, [*taken, *(p for round in self._begun for p in round.positions), *self._due]
        while due and due[-1] == cursor - 1:
            cursor -= 1
            due.pop()
        return cursor, due

    def _fetch(self, get: Callable[[int], Task], places: Sequence[int]) -> list[Task]:
        """Return this rank's tasks. Raise on all ranks if the source fails on one."""
        return run_on_all_ranks(lambda: [get(place) for place in places])

    # -- rounds ---------------------------------------------------------------------------------------------------

    def _begin_round(self, wanted: int | None = None) -> Round:
        """Begin the rollouts of the next tasks.

        Args:
            wanted: number of groups with which this rank has enough. Null: its share.
        """
        assert self.generator is not None
        world, rank = self._trainer.world_size, self._trainer.global_rank
        share = self.tasks_per_iteration // world
        mine = math.ceil(share * (1 + self.oversample))
        positions = self._next_positions(mine * world)
        own = positions[rank * mine : (rank + 1) * mine]
        tasks = list(zip(own, self._fetch(self.train_task, own), strict=True))
        jobs = [(task, (self.seed, 0, position, r)) for position, task in tasks for r in range(self.group_size)]
        enough = Quorum(self, tasks, share if wanted is None else wanted) if mine > share else None
        return Round(positions, tasks, self.generator.begin(jobs, enough))

    def _begin_ahead(self) -> None:
        """Begin the rollouts of later iterations, but none after the run's last one."""
        assert self.generator is not None
        trainer = self._trainer
        left = math.inf
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            left = trainer.max_epochs - trainer.current_epoch - 1
        if trainer.max_steps >= 0:
            left = min(left, math.ceil((trainer.max_steps - trainer.global_step) / self.inner_epochs) - 1)
        while len(self._begun) < min(self.generator.ahead, left):
            self._begun.append(self._begin_round())

    def _generate(self) -> None:
        """Fill `groups` with this rank's rollouts of the iteration."""
        started = time.perf_counter()
        share = self.tasks_per_iteration // self._trainer.world_size
        self.groups, self.stats, self._taken = [], IterationStats(), []
        self._before_rollouts = random_state()
        useful = 0
        for _ in range(self.resample_rounds if self.zero_spread == "resample" else 1):
            begun = self._begun.popleft() if self._begun else self._begin_round(max(share - useful, 1))
            self._taken += begun.positions
            rollouts = begun.rollouts()
            if self.stop():  # some rollouts are incomplete; all are generated again, identically, after the resume
                self.cursor, self._due = self.undrawn()
                self.groups = []
                self._taken.clear()
                self._begun.clear()
                raise Stopped
            self._add(begun.tasks, rollouts)
            useful = sum(map(self._signal, self.groups))
            total = torch.tensor(useful, device=self._device)
            if self._trainer.strategy.reduce(total, reduce_op="sum").item() >= self.tasks_per_iteration:
                break
        self._before_rollouts = None
        self._count(time.perf_counter() - started)
        if self.zero_spread == "resample":  # prefer groups with a signal, also those of other ranks
            without = [group for group in self.groups if not self._signal(group)]
            with_signal = [group for group in self.groups if self._signal(group)]
            self.groups = [*spread(with_signal, share, self.train_task), *without]
        self.groups = self.groups[:share]  # no more than the micro-batches hold

    def _add(self, tasks: Iterable[tuple[int, Task]], rollouts: list[Rollout]) -> None:
        """Add the complete groups of a round."""
        for i, (position, task) in enumerate(tasks):
            mine = rollouts[i * self.group_size : (i + 1) * self.group_size]
            if any(rollout.status == "stopped" for rollout in mine):
                self.stats.statuses["stopped"] += len(mine)
            else:
                self.groups.append(RolloutGroup(task, position, mine))

    def _count(self, seconds: float) -> None:
        self.stats.seconds = seconds
        for group in self.groups:
            self.stats.add(group, signal=self._signal(group), masked=self._signal.masked)


class Quorum:
    """Decides when enough groups of a round are complete.

    Args:
        data: the data module.
        tasks: the round's tasks on this rank.
        wanted: number of groups that are needed; with a signal, if groups without one are replaced.
    """

    def __init__(self, data: Rounds, tasks: list[tuple[int, Task]], wanted: int):
        self.data, self.tasks, self.wanted = data, tasks, wanted
        self.ended: dict[int, dict[int, Rollout]] = {}
        self.complete = 0

    def __call__(self, job: int, rollout: Rollout) -> bool:
        """Note the rollout of a job. Return whether enough groups are complete."""
        place, number = divmod(job, self.data.group_size)
        group = self.ended.setdefault(place, {})
        group[number] = rollout
        if len(group) == self.data.group_size:
            position, task = self.tasks[place]
            whole = RolloutGroup(task, position, [group[n] for n in sorted(group)])
            self.complete += self.data.zero_spread != "resample" or self.data._signal(whole)
        return self.complete >= self.wanted
