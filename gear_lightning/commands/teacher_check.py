"""``gear-lightning teacher-check``: check before training that a recipe's teacher is informative."""

from functools import partial
from typing import Any

from ..errors import UserError
from ..probes.teacher_check import FILE, CheckTeacher, table
from ..teacher import SHOWN
from .probe import ProbeCLI, probe_command


class TeacherCheckCLI(ProbeCLI):
    """``gear-lightning teacher-check``."""

    command, file = "teacher-check", FILE

    def make_probe(self, options: Any) -> CheckTeacher:
        return CheckTeacher()

    def before_instantiate_classes(self) -> None:
        config = self.config["fit"]
        if config["tasks"] is not None:
            config["data"]["tasks_per_iteration"] = config["tasks"]
        if (tasks := config["data"]["tasks_per_iteration"]) < 2:
            raise UserError(f"tasks={tasks}: must be at least 2, so that another task's reference can be shown")
        super().before_instantiate_classes()

    def before_fit(self) -> None:
        if (shows := self.model.teacher_options.shows) not in SHOWN:
            raise UserError(
                f"model.teacher.shows={shows} shows no text of the task, but this check compares a task's text with "
                "that of another task: use --model.teacher.shows reference or answer"
            )
        super().before_fit()

    def describe(self, result: dict[str, Any]) -> str:
        return table(result)


teacher_check_command = partial(probe_command, TeacherCheckCLI)
