"""What the data module expects of a generator of rollouts."""

from abc import abstractmethod
from collections.abc import Callable

from ..environments.base import Task
from ..environments.task_check import TaskChecker
from ..rollout import Rollout

Job = tuple[Task, tuple[int, ...]]  # a task and a seed
Enough = Callable[[int, Rollout], bool]  # takes the index of a job and its rollout, see `RolloutGenerator.generate`


class RolloutGenerator(TaskChecker):
    """Generates rollouts for the data module. Implemented by `callbacks.generation.GenerationCallback`.

    Attributes:
        ahead: number of iterations whose rollouts are generated before they are needed, while the policy is updated.
    """

    temperature: float
    ahead: int = 0

    @abstractmethod
    def generate(self, jobs: list[Job], stage: str, enough: Enough | None = None) -> list[Rollout]:
        """Generate one rollout per job.

        Args:
            jobs: tasks and seeds.
            stage: ``fit``, or one of an evaluation.
            enough: called with the index of its job and the rollout when one has ended. If it returns True, the others
                are not finished: their status is ``stopped``. Null: all are finished.
        """

    def begin(self, jobs: list[Job], enough: Enough | None = None) -> Callable[[], list[Rollout]]:
        """Begin to generate the rollouts of a round of training, and return a function that waits for them. By default
        they are finished when this function returns."""
        rollouts = self.generate(jobs, "fit") if enough is None else self.generate(jobs, "fit", enough)
        return lambda: rollouts

    @abstractmethod
    def teacher_prompt(self, rollout: Rollout, peer: Rollout | None) -> tuple[list[int], bool]:
        """Return the ids of the privileged prompt, and whether its privileged text was dropped for its length.
        ``peer``: another successful rollout of the same group; None if there is none."""
