"""Turns tasks into micro-batches of rollouts: `RolloutDataModule`, and the sized stream that Lightning iterates."""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from .advantage import GRPO, GroupAdvantage
from .batch import RolloutBatch, RolloutRow, Sealed, collate
from .distributed.collective import check_same, gather_on_first, run_on_all_ranks
from .environments.base import Task, TaskSource
from .environments.task_check import TaskChecker, check_source
from .errors import Stopped, UserError
from .generation.iteration_stats import IterationStats
from .generation.packing import balanced_split
from .rollout import Rollout, RolloutGroup
from .runs.limits import check_callbacks, check_limits, keep_iterations_whole, option_of
from .runs.resume import random_state, restore_random_state

ZeroSpread = Literal["keep", "drop", "resample"]
Truncated = Literal["learn", "mask"]


class RolloutGenerator(TaskChecker):
    """Generates rollouts for the data module. Implemented by `callbacks.generation.GenerationCallback`."""

    temperature: float

    @abstractmethod
    def generate(self, jobs: list[tuple[Task, tuple[int, ...]]], stage: str) -> list[Rollout]:
        """Generate one rollout per (task, seed)."""

    @abstractmethod
    def teacher_prompt(self, rollout: Rollout, peer: Rollout | None) -> tuple[list[int], bool]:
        """Return the ids of the privileged prompt, and whether its privileged text was dropped for its length.
        ``peer``: another successful rollout of the same group; None if there is none."""


class RolloutDataModule(L.LightningDataModule):
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
            loss's denominator), ``drop`` them (not counted), or ``resample``: replace them with other tasks.
        resample_rounds: maximum number of generation rounds in an iteration. Null: 4 with ``resample``.
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
        self.zero_spread = zero_spread
        self.resample_rounds = 4 if resample_rounds is None else resample_rounds
        self.truncated = truncated
        self.check_limit = check_limit
        self.val_limit = val_limit
        self.val_rollouts = val_rollouts
        self.eval_batch_size = eval_batch_size
        self.seed = 0 if seed is None else seed
        self.generator: RolloutGenerator | None = None
        self.resolved_config: dict[str, str] = {}  # of the command line; must be equal on all processes
        self.cursor = 0  # tasks drawn so far, over all processes
        self.groups: list[RolloutGroup] = []  # of the current iteration, on this rank
        self.rows: list[RolloutRow] = []  # of the current iteration's learnable rollouts
        self.position = 0  # micro-batches of the current iteration yielded so far
        self.stop: Callable[[], bool] = lambda: False  # whether the run must stop here; called on all ranks
        self._order: tuple[int, torch.Tensor] | None = None  # order of the tasks in the newest pass over them
        self._complained = False
        self.evaluation_due = False  # whether the newest evaluation is not finished
        self._before_rollouts: dict[str, Any] | None = None  # random state before the rollouts, during generation
        self._restored: dict[str, Any] | None = None  # this rank's state from a checkpoint, until it is restored
        self.stats = IterationStats()

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

    def check_tasks(self) -> None:
        """Check the tasks before training (see ``check_limit``). All ranks must call it.

        Raises:
            UserError: a task cannot be used; names the task.
        """
        assert self.generator is not None
        for name, source, used in (("train", self.train_tasks, None), ("val", self.val_tasks, self.val_limit)):
            if source is not None:
                check_source(f"data.{name}_tasks", source, used, self.check_limit, self.generator)

    # -- rollouts -------------------------------------------------------------------------------------------------

    def _iterate(self) -> Iterator[RolloutBatch]:
        """Run one RL iteration: generate rollouts, then yield the micro-batches of each inner epoch."""
        assert self.generator is not None
        first = self._restore()
        if first is None:
            self._generate()
        rows = self.rows = run_on_all_ranks(self._rows)
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

    def _generate(self) -> None:
        """Fill `groups` with this rank's rollouts of the iteration."""
        assert self.generator is not None
        started = time.perf_counter()
        world, rank = self._trainer.world_size, self._trainer.global_rank
        share = self.tasks_per_iteration // world
        self.groups, self.rows, self.stats, self.position = [], [], IterationStats(), 0
        begun, self._before_rollouts = self.cursor, random_state()
        for _ in range(self.resample_rounds if self.zero_spread == "resample" else 1):
            first = self.cursor + rank * share
            positions = range(first, first + share)
            tasks = list(zip(positions, self._fetch(self.train_task, positions), strict=True))
            jobs = [(task, (self.seed, 0, position, r)) for position, task in tasks for r in range(self.group_size)]
            rollouts = self.generator.generate(jobs, "fit")
            if self.stop():  # some rollouts are incomplete; all are generated again, identically, after the resume
                self.groups, self.cursor = [], begun
                raise Stopped
            for i, (position, task) in enumerate(tasks):
                mine = rollouts[i * self.group_size : (i + 1) * self.group_size]
                self.groups.append(RolloutGroup(task, position, mine))
            self.cursor += self.tasks_per_iteration
            lacking = torch.tensor(max(0, share - sum(map(self._signal, self.groups))), device=self._device)
            if not self._trainer.strategy.reduce(lacking, reduce_op="sum").item():
                break
        self._before_rollouts = None
        self._count(time.perf_counter() - started)
        if self.zero_spread == "resample":  # prefer groups with a signal; keep no more than the micro-batches hold
            self.groups = sorted(self.groups, key=lambda g: not self._signal(g))[:share]

    def _fetch(self, get: Callable[[int], Task], places: Sequence[int]) -> list[Task]:
        """Return this rank's tasks. Raise on all ranks if the source fails on one."""
        return run_on_all_ranks(lambda: [get(place) for place in places])

    def _signal(self, group: RolloutGroup) -> bool:
        """Return whether the group has a learning signal."""
        inputs = _advantage_inputs(group)
        if not self.advantage.has_signal(*inputs):
            return False
        usable = [r for r in group.rollouts if r.learnable]
        if not any(map(self._masked, usable)):
            return True
        turns = self.advantage.of_turns(*inputs) or [[a] for a in self.advantage(inputs[0]).tolist()]
        return any(a != 0 for r, row in zip(usable, turns, strict=True) if not self._masked(r) for a in row)

    def _masked(self, rollout: Rollout) -> bool:
        return self.truncated == "mask" and rollout.status == "truncated"

    def _count(self, seconds: float) -> None:
        self.stats.seconds = seconds
        for group in self.groups:
            self.stats.add(group, signal=self._signal(group), masked=self._masked)

    def _rows(self) -> list[RolloutRow]:
        """Return the rows of the rollouts that count in the loss, with their advantages."""
        assert self.generator is not None
        rows, self.stats.overlong = [], 0
        if not self._complained:
            warning = self.advantage.complaint(
                [turns for group in self.groups for turns in _advantage_inputs(group)[1]]
            )
            self._complained = warning is not None
            if warning is not None:
                rank_zero_warn(warning)
        for g, group in enumerate(self.groups):
            if self.zero_spread != "keep" and not self._signal(group):
                continue
            usable = [(i, r) for i, r in enumerate(group.rollouts) if r.learnable]
            inputs = _advantage_inputs(group)
            of_turns = self.advantage.of_turns(*inputs) or [None] * len(usable)
            for (i, rollout), advantage, turns in zip(
                usable, self.advantage(inputs[0]).tolist(), of_turns, strict=True
            ):
                if self._masked(rollout):
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

    @property
    def _device(self) -> torch.device:
        return self._trainer.strategy.root_device

    # -- checkpoints ----------------------------------------------------------------------------------------------

    @property
    def unfinished(self) -> int:
        """Micro-batches yielded since the last optimizer step of an unfinished iteration; 0 between steps."""
        over = self.position >= self.micro_batches * self.inner_epochs
        return 0 if over else self.position % self.micro_batches

    @property
    def done(self) -> int:
        """Micro-batches of an unfinished iteration that a resume does not repeat; 0 between iterations."""
        over = self.position >= self.micro_batches * self.inner_epochs
        return 0 if over else self.position - self.unfinished

    @property
    def in_rollouts(self) -> bool:
        """Whether an iteration has begun and its rollouts are not complete."""
        return self._before_rollouts is not None

    def state_dict(self) -> dict[str, Any]:
        mine: dict[str, Any] = {"random": self._before_rollouts or random_state(), "position": 0, "groups": None}
        if 0 < self.position < self.micro_batches * self.inner_epochs:
            mine["position"] = self.done
            mine["groups"] = [
                {"group_id": group.group_id, "rollouts": [r.state_dict() for r in group.rollouts]}
                for group in self.groups
            ]
        # gathered on rank 0, which writes the checkpoint
        return {
            "cursor": self.cursor,
            "ranks": gather_on_first(mine),
            "evaluation_due": self.evaluation_due,
            "seed": self.seed,
            "plan": self._plan,
        }

    @property
    def _plan(self) -> dict[str, Any]:
        """Options that determine how the rollouts of an iteration are split into optimizer steps and micro-batches."""
        names = ("micro_batch_size", "inner_epochs", "tasks_per_iteration", "group_size", "truncated", "zero_spread")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.cursor = state_dict["cursor"]
        self.evaluation_due = state_dict.get("evaluation_due", False)
        ranks, trainer = state_dict["ranks"], self._trainer
        if trainer.state.fn == TrainerFn.FITTING:
            self._check_seed(state_dict.get("seed", self.seed), any(rank["groups"] is not None for rank in ranks))
            if any(rank["position"] for rank in ranks):
                self._check_plan(state_dict.get("plan", {}))
        if len(ranks) == trainer.world_size:
            self._restored = ranks[trainer.global_rank]
        elif any(rank["groups"] is not None for rank in ranks):
            raise UserError(
                f"this checkpoint was written by {len(ranks)} processes in the middle of an iteration; resume with "
                f"{len(ranks)} processes (now {trainer.world_size}), or from a checkpoint between iterations"
            )

    def _check_seed(self, before: int, within: bool) -> None:
        """Warn if the seed differs from that of the checkpoint's run.

        Raises:
            UserError: the checkpoint contains rollouts of an unfinished iteration; the new seed leads to other tasks.
        """
        if before == self.seed:
            return
        if within:
            raise UserError(
                f"this checkpoint was written in the middle of an iteration with data.seed={before}; resume with that "
                f"seed (now data.seed={self.seed}), or from a checkpoint between iterations"
            )
        rank_zero_warn(
            f"data.seed={self.seed} (default: the value of seed_everything), but the checkpoint's run used {before}: "
            f"from now on, tasks and rollouts are drawn with {self.seed}."
        )

    def _check_plan(self, before: dict[str, Any]) -> None:
        """Reject a different split of an iteration whose first optimizer steps were taken before the checkpoint: the
        position within the iteration is counted in micro-batches.

        Raises:
            UserError: an option differs.
        """
        for name, now in self._plan.items():
            if before.get(name, now) != now:
                raise UserError(
                    f"this checkpoint was written between two optimizer steps of an iteration with "
                    f"data.{name}={before[name]}; resume with that value (now data.{name}={now}), or from a checkpoint "
                    "between iterations"
                )

    def _restore(self) -> int | None:
        """Restore this rank's state from a checkpoint. Return the number of finished micro-batches; None if new
        rollouts must be generated."""
        state, self._restored = self._restored, None
        if state is None:
            return None
        restore_random_state(state["random"])
        if state["groups"] is None:
            return None
        self.groups = []
        for group in state["groups"]:
            task = self.train_task(group["group_id"])
            rollouts = [Rollout.from_state_dict(r, task) for r in group["rollouts"]]
            self.groups.append(RolloutGroup(task, group["group_id"], rollouts))
        self.stats = IterationStats()
        self._count(0.0)
        return state["position"]


def _advantage_inputs(group: RolloutGroup) -> tuple[torch.Tensor, list[list[float]], list[list[str]]]:
    """Return the inputs of an advantage: rewards, rewards of turns, and states of the learnable rollouts."""
    usable = [r for r in group.rollouts if r.learnable]
    rewards = torch.tensor([r.reward for r in usable], dtype=torch.float32)
    return rewards, [r.turn_rewards for r in usable], [r.states for r in usable]


def make_row(
    rollout: Rollout,
    teacher_prompt: list[int],
    advantage: float,
    group_id: int,
    index: int,
    solved: int = 0,
    turn_advantages: list[float] | None = None,
) -> RolloutRow:
    """Return a rollout as a row of a batch."""
    return RolloutRow(
        tokens=rollout.tokens or [0],
        action_mask=rollout.action_mask or [False],
        turn_ids=rollout.turn_ids or [-1],
        stop_mask=rollout.stop_mask or [False],
        sampler_logprobs=rollout.sampler_logprobs or [0.0],
        prompt_length=rollout.prompt_length,
        teacher_prompt=teacher_prompt,
        reward=rollout.reward,
        success=rollout.success and rollout.learnable,
        advantage=advantage,
        group_id=group_id,
        policy_version=rollout.policy_version,
        index=index,
        turn_advantages=turn_advantages,
        decisions=rollout.decisions or None,
        solved=solved,
        parts=rollout.parts or None,
    )


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
