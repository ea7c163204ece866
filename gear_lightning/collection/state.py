"""The data module's part of a checkpoint: the tasks drawn, and the rollouts of an unfinished iteration."""

from abc import abstractmethod
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from ..distributed.collective import gather_on_first
from ..errors import UserError
from ..generation.iteration_stats import IterationStats
from ..rollout import Rollout, RolloutGroup
from ..runs.resume import random_state, restore_random_state
from .rounds import Rounds


class CollectionState(Rounds):
    """Mixin of the data module: saves and restores what it has collected."""

    evaluation_due: bool

    def __init__(self) -> None:
        super().__init__()
        self.position = 0  # micro-batches of the current iteration yielded so far
        self._restored: dict[str, Any] | None = None  # this rank's state from a checkpoint, until it is restored

    @property
    @abstractmethod
    def micro_batches(self) -> int:
        """Micro-batches of one optimizer step on one process."""

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

    def state_dict(self) -> dict[str, Any]:
        mine: dict[str, Any] = {"random": self._before_rollouts or random_state(), "position": 0, "groups": None}
        if 0 < self.position < self.micro_batches * self.inner_epochs:
            mine["position"] = self.done
            mine["groups"] = [
                {"group_id": group.group_id, "rollouts": [r.state_dict() for r in group.rollouts]}
                for group in self.groups
            ]
        cursor, due = self.undrawn()  # rollouts made ahead are made again
        # gathered on rank 0, which writes the checkpoint
        return {
            "cursor": cursor,
            "due": due,
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
        self.cursor, self._due = state_dict["cursor"], list(state_dict.get("due", []))
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
