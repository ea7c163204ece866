"""Turns tasks into micro-batches of rollouts: `RolloutDataModule`, and the sized stream that Lightning iterates."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from .advantage import GRPO, GroupAdvantage
from .batch import RolloutBatch, RolloutRow, Sealed, collate
from .collection.generator import Job, RolloutGenerator
from .collection.groups import Signal, Truncated, advantage_inputs, make_row
from .collection.rounds import ZeroSpread
from .collection.state import CollectionState
from .distributed.collective import check_same, run_on_all_ranks
from .environments.base import Task, TaskSource
from .environments.task_check import check_source
from .errors import Stopped, UserError
from .generation.packing import balanced_split
from .rollout import RolloutGroup
from .runs.limits import check_callbacks, check_limits, keep_iterations_whole, option_of

__all__ = ["RolloutDataModule", "RolloutGenerator", "RolloutStream", "make_row"]


class RolloutDataModule(CollectionState):
    """Streams rollouts: one Lightning epoch is one RL iteration.

    Args:
        train_tasks: tasks for training.
        val_tasks: tasks for evaluation. Null: no evaluation.
        tasks_per_iteration: number of tasks with rollouts before each update, over all processes.
        group_size: number of rollouts of each task.
        micro_batch_size: average number of rollouts in one forward and backward pass on one process. It determines the
            number of micro-batches of a step. A micro-batch takes fewer long rollouts or more short ones, so that all
            have about the same number of tokens.
        inner_epochs: number of optimizer steps on the same rollouts; old log-probs and credit are those of the first.
        advantage: the group advantage, of rollouts or of turns.
        zero_spread: what to do with groups without a signal, whose rewards are all equal (with an advantage for each
            turn: whose turns all have the advantage 0): ``keep`` them (no gradient, but their tokens count in the
            loss's denominator), ``drop`` them (not counted), or ``resample``: replace them with other tasks (a process
            with too few groups gets some of those with more).
        resample_rounds: maximum number of generation rounds in an iteration. Null: 4 with ``resample``.
        oversample: share of further tasks that are begun (0.25: a quarter more). A process that has as many complete
            groups as it needs ends the other rollouts: the slowest are not waited for. They are counted
            (``rollouts/stopped``), and their tasks are not repeated. Which groups are the first to be complete depends
            on the machine, so a resumed run is not exactly an uninterrupted one; tasks with long rollouts are seen less
            often.
        truncated: what to do with rollouts that a budget cut short (``rollouts/truncated``): ``learn`` from them with
            the reward so far, or ``mask`` them: their tokens count in no loss and no denominator, and
            ``rollouts/masked`` counts them (DAPO's overlong filtering, arXiv 2503.14476). A masked rollout's reward
            still counts in the group's baseline, as in TRL's ``mask_truncated_completions``, after its
            ``generation.overlong`` penalty; a group has a signal only if a rollout that is not masked has a nonzero
            advantage.
        check_limit: number of tasks of each source that are checked before training (prompts are rendered, rewards
            resolved): a fixed sample, and those with the longest lines. If a task turns out invalid later, its rollouts
            fail but the run continues. Null: all. A passed check is not repeated for the same tasks, model and
            environment.
        val_limit: number of validation tasks.
        val_rollouts: number of rollouts of each validation task.
        eval_batch_size: number of rollouts that are generated together in evaluation, per process.
        seed: seed of the order of tasks and of all sampling, 0 to 2^32 - 1. Null: ``seed_everything`` on the command
            line, 0 in Python. The other seeds are described in docs/slurm.md.
    """

    def __init__(
        self,
        train_tasks: TaskSource,
        val_tasks: TaskSource | None = None,
        tasks_per_iteration: int = 8,
        group_size: int = 8,
        micro_batch_size: int = 8,
        inner_epochs: int = 1,
        advantage: GroupAdvantage = GRPO(),
        zero_spread: ZeroSpread = "keep",
        resample_rounds: int | None = None,
        oversample: float = 0.0,
        truncated: Truncated = "learn",
        check_limit: int | None = 2000,
        val_limit: int = 200,
        val_rollouts: int = 1,
        eval_batch_size: int = 128,
        seed: int | None = None,
    ):
        super().__init__()
        for name in (
            "tasks_per_iteration",
            "group_size",
            "micro_batch_size",
            "inner_epochs",
            "resample_rounds",
            "check_limit",
            "val_limit",
            "val_rollouts",
            "eval_batch_size",
        ):
            if (value := locals()[name]) is not None and value < 1:
                raise UserError(f"data.{name}={value}: must be at least 1")
        if seed is not None and not 0 <= seed < 1 << 32:
            raise UserError(f"data.seed={seed}: must be at least 0 and below 2^32")
        if not 0 <= oversample < math.inf:
            raise UserError(f"data.oversample={oversample}: must be at least 0 and finite")
        advantage.check_group_size(group_size)
        if resample_rounds is not None and zero_spread != "resample":
            raise UserError(f"data.resample_rounds does nothing with data.zero_spread={zero_spread}; remove it")
        self.train_tasks = train_tasks
        self.val_tasks = val_tasks
        self.tasks_per_iteration = tasks_per_iteration
        self.group_size = group_size
        self.micro_batch_size = micro_batch_size
        self.inner_epochs = inner_epochs
        self.advantage = advantage
        self.zero_spread: ZeroSpread = zero_spread
        self.resample_rounds = 4 if resample_rounds is None else resample_rounds
        self.oversample = oversample
        self.truncated: Truncated = truncated
        self.check_limit = check_limit
        self.val_limit = val_limit
        self.val_rollouts = val_rollouts
        self.eval_batch_size = eval_batch_size
        self.seed = 0 if seed is None else seed
        self.generator: RolloutGenerator | None = None
        self.resolved_config: dict[str, str] = {}  # of the command line; must be equal on all processes
        self.rows: list[RolloutRow] = []  # of the current iteration's learnable rollouts
        self.stop: Callable[[], bool] = lambda: False  # whether the run must stop here; called on all ranks
        self._order: tuple[int, torch.Tensor] | None = None  # order of the tasks in the newest pass over them
        self._complained = False
        self.evaluation_due = False  # whether the newest evaluation is not finished

    # -- Lightning ------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        trainer = self._trainer
        check_same(self.resolved_config)  # here, because Lightning calls this first on all processes
        check_limits(option_of(trainer), self, trainer.world_size, stage)
        if stage == "fit":
            check_callbacks(map(type, trainer.callbacks))  # pyright: ignore[reportAttributeAccessIssue]
            keep_iterations_whole(trainer)
            self.check_processes(trainer.world_size, trainer.accumulate_grad_batches)
            trainer.accumulate_grad_batches = self.micro_batches

    def check_processes(self, processes: int, accumulate: int) -> None:
        """Check that the sizes of an iteration fit the number of processes.

        Args:
            processes: number of processes that share the tasks.
            accumulate: ``trainer.accumulate_grad_batches`` as given; 1 if it is not given.

        Raises:
            UserError: the tasks are not divisible by the processes, or ``accumulate`` contradicts the micro-batches.
        """
        if self.tasks_per_iteration % processes:
            raise UserError(
                f"data.tasks_per_iteration={self.tasks_per_iteration} is not divisible by {processes} processes: all "
                f"rollouts of a task stay on one process; use a multiple of {processes}"
            )
        if accumulate not in (1, self.micro_batches_of(processes)):
            raise UserError(
                "trainer.accumulate_grad_batches follows from data.micro_batch_size; remove it from the config"
            )

    def train_dataloader(self) -> "RolloutStream":
        return RolloutStream(self, "fit", self.micro_batches * self.inner_epochs)

    def val_dataloader(self) -> "RolloutStream | list":
        return self._eval_stream("validate")

    def test_dataloader(self) -> "RolloutStream | list":
        return self._eval_stream("test")

    def predict_dataloader(self) -> "RolloutStream | list":
        return self._eval_stream("predict")

    def _eval_stream(self, stage: str) -> "RolloutStream | list":
        if self.val_tasks is None:
            return []
        return RolloutStream(self, stage, self.evaluation_batches(self._trainer.world_size))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch.batch if isinstance(batch, Sealed) else batch

    @property
    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError("RolloutDataModule is not attached to a Trainer")
        return self.trainer

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one optimizer step on one process."""
        return self.micro_batches_of(self._trainer.world_size)

    def micro_batches_of(self, processes: int) -> int:
        """Return the micro-batches of one optimizer step on one process, if ``processes`` processes share the step."""
        return -(-(self.tasks_per_iteration // processes * self.group_size) // self.micro_batch_size)

    def evaluation_batches(self, processes: int) -> int:
        """Return the number of batches of an evaluation on each of ``processes`` processes."""
        per_rank = -(-len(self._eval_jobs()) // processes)
        return max(1, -(-per_rank // self.eval_batch_size))

    # -- tasks ----------------------------------------------------------------------------------------------------

    def train_task(self, position: int) -> Task:
        """Return the task at a position of the endless training order. Each pass over the source has a new order."""
        size = self.train_tasks.size
        if size is None:
            return self.train_tasks[position]
        epoch, place = divmod(position, size)
        if self._order is None or self._order[0] != epoch:
            seed = self.seed * 1_000_003 + epoch
            self._order = epoch, torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        return self.train_tasks[int(self._order[1][place])]

    def _eval_jobs(self) -> list[tuple[int, tuple[int, ...]]]:
        assert self.val_tasks is not None
        tasks = self.val_limit if self.val_tasks.size is None else min(self.val_limit, self.val_tasks.size)
        return [(t, (self.seed, 1, t, r)) for t in range(tasks) for r in range(self.val_rollouts)]

    def evaluation_jobs(self) -> list[Job]:
        """Return this process's tasks and seeds of an evaluation. All ranks must call it."""
        assert self.val_tasks is not None
        mine = self._eval_jobs()[self._trainer.global_rank :: self._trainer.world_size]
        tasks = self._fetch(self.val_tasks.__getitem__, [task for task, _ in mine])
        return [(task, seed) for task, (_, seed) in zip(tasks, mine, strict=True)]

    def check_tasks(self) -> None:
        """Check the tasks before training (see ``check_limit``). All ranks must call it.

        Raises:
            UserError: a task cannot be used; names the task.
        """
        assert self.generator is not None
        for name, source, used in (("train", self.train_tasks, None), ("val", self.val_tasks, self.val_limit)):
            if source is not None:
                check_source(f"data.{name}_tasks", source, used, self.check_limit, self.generator)

    @property
    def _signal(self) -> Signal:
        return Signal(self.advantage, self.truncated)

    # -- rollouts -------------------------------------------------------------------------------------------------

    def _iterate(self) -> Iterator[RolloutBatch]:
        """Run one RL iteration: generate rollouts, then yield the micro-batches of each inner epoch."""
        assert self.generator is not None
        first = self._restore()
        if first is None:
            self.rows, self.position = [], 0
            self._generate()
        rows = self.rows = run_on_all_ranks(self._rows)
        self._begin_ahead()
        counts = torch.tensor([sum(map(sum, (r.action_mask for r in rows))), len(rows)], device=self._device)
        tokens, rollouts = self._trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        order = sorted(rows, key=lambda r: (r.length + r.teacher_length, r.length, r.index))  # similar lengths together
        parts = balanced_split([(r.length, r.teacher_length) for r in order], self.micro_batches)
        batches = [[order[i] for i in part] for part in parts]
        plan = [(inner, batch) for inner in range(self.inner_epochs) for batch in batches]
        for self.position, (inner, batch) in list(enumerate(plan, 1))[first or 0 :]:
            yield collate(
                batch,
                step_tokens=tokens,
                step_rollouts=rollouts,
                temperature=self.generator.temperature,
                inner_epoch=inner,
                inner_epochs=self.inner_epochs,
            )
            if self.position < len(plan) and self.stop():
                raise Stopped

    def _rows(self) -> list[RolloutRow]:
        """Return the rows of the rollouts that count in the loss, with their advantages."""
        assert self.generator is not None
        rows, self.stats.overlong = [], 0
        if not self._complained:
            warning = self.advantage.complaint([turns for group in self.groups for turns in advantage_inputs(group)[1]])
            self._complained = warning is not None
            if warning is not None:
                rank_zero_warn(warning)
        for g, group in enumerate(self.groups):
            if self.zero_spread != "keep" and not self._signal(group):
                continue
            usable = [(i, r) for i, r in enumerate(group.rollouts) if r.learnable]
            inputs = advantage_inputs(group)
            of_turns = self.advantage.of_turns(*inputs) or [None] * len(usable)
            for (i, rollout), advantage, turns in zip(
                usable, self.advantage(inputs[0]).tolist(), of_turns, strict=True
            ):
                if self._signal.masked(rollout):
                    continue
                prompt, dropped = self.generator.teacher_prompt(rollout, group.peer(i))
                self.stats.overlong += dropped
                index = g * self.group_size + i
                rows.append(make_row(rollout, prompt, advantage, group.group_id, index, group.solved, turns))
        return rows

    def _evaluate(self, stage: str) -> Iterator[RolloutBatch]:
        assert self.generator is not None
        assert self.val_tasks is not None
        counts = not self._trainer.sanity_checking  # Lightning's sanity check does not count as an evaluation
        self.evaluation_due = counts
        jobs = self._eval_jobs()[self._trainer.global_rank :: self._trainer.world_size]
        batches = self._eval_stream(stage)
        for start in range(0, len(batches) * self.eval_batch_size, self.eval_batch_size):
            wanted = jobs[start : start + self.eval_batch_size]
            if self.stop():
                return
            tasks = self._fetch(self.val_tasks.__getitem__, [t for t, _ in wanted])
            rollouts = self.generator.generate([(t, s) for t, (_, s) in zip(tasks, wanted, strict=True)], stage)
            if self.stop():
                return
            if stage == "predict":
                self.groups = [RolloutGroup(r.task, job[0], [r]) for job, r in zip(wanted, rollouts, strict=True)]
            self.evaluation_due = counts and start + self.eval_batch_size < len(batches) * self.eval_batch_size
            rows = [
                make_row(rollout, rollout.tokens[: rollout.prompt_length] or [0], 0.0, job[0], start + i)
                for i, (job, rollout) in enumerate(zip(wanted, rollouts, strict=True))
            ]
            yield collate(rows, step_tokens=1, step_rollouts=1, temperature=self.generator.temperature)


class RolloutStream:
    """A sized iterable of micro-batches. The length is required: Lightning prefetches from iterables without one, and
    then every batch would come from the policy before last."""

    def __init__(self, data: RolloutDataModule, stage: str, length: int):
        self.data = data
        self.stage = stage
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Sealed]:
        return map(Sealed, self.data._iterate() if self.stage == "fit" else self.data._evaluate(self.stage))
