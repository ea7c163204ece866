"""Base class of commands that measure something in a ``fit`` that stops before its first step."""

from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningCLI

from ..callbacks.generation import GenerationCallback
from ..callbacks.progress import PhaseProgress
from ..callbacks.startup import StartupCheck
from ..errors import UserError
from ..recipes.cli import GearCLI

MEASURING = {  # one device, no files, and no limit that could end the fit before it starts
    **{"strategy": "auto", "devices": 1, "num_nodes": 1, "logger": False, "callbacks": None},
    **{"enable_checkpointing": False, "fast_dev_run": False, "limit_train_batches": None, "overfit_batches": 0.0},
    **{"max_epochs": -1, "max_steps": -1, "min_epochs": None, "min_steps": None, "max_time": None},
}


class ProbeCLI(GearCLI):
    """Measures with a callback before the first step, and does not change the run directory."""

    tells_idle = False

    def subcommands(self) -> dict[str, set[str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return {"fit": LightningCLI.subcommands()["fit"]}

    def make_probe(self, options: Any) -> L.Callback:
        """Return the callback that measures.

        Args:
            options: the command line's options of ``fit``.
        """
        raise NotImplementedError

    def before_instantiate_classes(self) -> None:
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
