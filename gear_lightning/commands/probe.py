"""Base class of commands that measure something in a ``fit`` that stops before its first step."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningCLI

from gear_lightning.callbacks.generation import GenerationCallback
from gear_lightning.callbacks.progress import PhaseProgress
from gear_lightning.callbacks.startup import StartupCheck

from ..errors import UserError
from ..probes.noise_floor import write_result
from ..recipes.cli import GearCLI, main

MEASURING = {  # one device, no files, and no limit that could end the fit before it starts
    **{"strategy": "auto", "devices": 1, "num_nodes": 1, "logger": False, "callbacks": None},
    **{"enable_checkpointing": False, "fast_dev_run": False, "limit_train_batches": None, "overfit_batches": 0.0},
    **{"max_epochs": -1, "max_steps": -1, "min_epochs": None, "min_steps": None, "max_time": None},
}


class ProbeCLI(GearCLI):
    """Measures with a callback before the first step. It only adds the result to the run directory.

    Attributes:
        file: name of the result in the run directory.
    """

    reports_idle = False
    file: str

    def subcommands(self) -> dict[str, set[str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return {"fit": LightningCLI.subcommands()["fit"]}

    def make_probe(self, options: Any) -> L.Callback:
        """Return the callback that measures; it puts the result into its attribute ``result``.

        Args:
            options: the command line's options of ``fit``.
        """
        raise NotImplementedError

    def describe(self, result: dict[str, Any]) -> str:
        """Return the result as text for the terminal."""
        raise NotImplementedError

    def before_instantiate_classes(self) -> None:
        if (out := self.config["fit"]["out"]) is not None and Path(out).is_dir():
            raise UserError(f"out={out} is a directory; give a file")
        self.save_config_callback = None
        for key, value in MEASURING.items():
            self.config["fit"]["trainer"][key] = value

    def _lock(self) -> None:
        """Do not lock the run directory: nothing is written there, and a run may be active."""

    def _set_aside_earlier_run(self) -> None:
        """Leave an earlier run in place."""

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        kept = [c for c in callbacks if isinstance(c, GenerationCallback | PhaseProgress)]
        self.probe: Any = self.make_probe(self.config["fit"])
        return super()._instantiate_trainer(config, [*kept, self.probe])

    def _unasked(self) -> list[L.Callback]:
        return [StartupCheck()]  # without RunStatus, which would overwrite the run's status

    def before_fit(self) -> None:
        rule, data = self.model.credit, self.datamodule
        if not rule.needs_teacher:
            other = "" if self.model.distillation is None else " (the teacher of model.distillation gives no credit)"
            raise UserError(
                f"model.credit={type(rule).__name__} has no teacher{other}, so there is no divergence to measure; "
                "add --config configs/credit/gear.yaml"
            )
        data.zero_spread = "keep"  # the measurement needs no spread of rewards
        data.val_tasks = None  # nothing is evaluated
        super().before_fit()

    def after_fit(self) -> None:
        out, result = Path(self.config["fit"]["out"] or self.run_dir / self.file), self.probe.result
        write_result(out, result)
        print(f"\n{self.describe(result)}\n\n{out}: the result as JSON")


def probe_command(cli: type[ProbeCLI], argv: list[str]) -> int:
    """Run a command that measures.

    Args:
        cli: its class.
        argv: the arguments after the command's name: those of ``fit``, and its own.

    Returns:
        The exit status.
    """
    main(["fit", *argv], cli)
    return 0
