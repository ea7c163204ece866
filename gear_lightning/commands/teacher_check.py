"""``gear-lightning teacher-check``: check before training that a recipe's teacher is informative."""

from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from ..errors import UserError
from ..probes.noise_floor import write_result
from ..probes.teacher_check import FILE, CheckTeacher, table
from ..recipes.cli import main
from ..teacher import SHOWN
from .probe import ProbeCLI


class TeacherCheckCLI(ProbeCLI):
    """``gear-lightning teacher-check``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--tasks",
            type=int | None,
            default=None,
            help="Number of tasks, with data.group_size rollouts each. Null: data.tasks_per_iteration.",
        )
        parser.add_argument(
            "--out", type=str | None, default=None, help=f"File for the result. Null: {FILE} in the run directory."
        )

    def make_probe(self, options: Any) -> CheckTeacher:
        return CheckTeacher()

    def before_instantiate_classes(self) -> None:
        config = self.config["fit"]
        if config["tasks"] is not None:
            config["data"]["tasks_per_iteration"] = config["tasks"]
        if (tasks := config["data"]["tasks_per_iteration"]) < 2:
            raise UserError(f"tasks={tasks}: must be at least 2, so that another task's reference can be shown")
        if config["out"] is not None and Path(config["out"]).is_dir():
            raise UserError(f"out={config['out']} is a directory; give a file")
        super().before_instantiate_classes()

    def before_fit(self) -> None:
        if (shows := self.model.teacher_options.shows) not in SHOWN:
            raise UserError(
                f"model.teacher.shows={shows} shows no text of the task, but this check compares a task's text with "
                "that of another task: use --model.teacher.shows reference or answer"
            )
        super().before_fit()

    def after_fit(self) -> None:
        out = Path(self.config["fit"]["out"] or self.run_dir / FILE)
        write_result(out, self.probe.result)
        print(f"\n{table(self.probe.result)}\n\n{out}: the result as JSON")


def teacher_check_command(argv: list[str]) -> int:
    """Run ``gear-lightning teacher-check``.

    Args:
        argv: the arguments after ``teacher-check``: those of ``fit``, and its own.

    Returns:
        The exit status.
    """
    main(["fit", *argv], TeacherCheckCLI)
    return 0
