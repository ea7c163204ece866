"""A ``fit`` that stops before its first step, to measure something: what such commands share."""

from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningCLI

from ..callbacks.generation import GenerationCallback
from ..callbacks.progress import PhaseProgress
from ..callbacks.startup import StartupCheck
from ..errors import UserError
from ..recipes.cli import GearCLI

MEASURING = {  # one device, nothing written, and no limit of the recipe that ends the fit before it has begun
    **{"strategy": "auto", "devices": 1, "num_nodes": 1, "logger": False, "callbacks": None},
    **{"enable_checkpointing": False, "fast_dev_run": False, "limit_train_batches": None, "overfit_batches": 0.0},
    **{"max_epochs": -1, "max_steps": -1, "min_epochs": None, "min_steps": None, "max_time": None},
}


class ProbeCLI(GearCLI):
    """Measures with a callback before the first step, and leaves the run as it was."""

    tells_idle = False

    def subcommands(self) -> dict[str, set[str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return {"fit": LightningCLI.subcommands()["fit"]}

    def make_probe(self, options: Any) -> L.Callback:
        """The callback that measures, with the command line's options of ``fit``."""
        raise NotImplementedError

    def before_instantiate_classes(self) -> None:
        self.save_config_callback = None
        for key, value in MEASURING.items():
            self.config["fit"]["trainer"][key] = value

    def _lock(self) -> None:
        """A run may go on meanwhile: nothing of it is written."""

    def _set_aside_earlier_run(self) -> None:
        """It stays where it is."""

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        kept = [c for c in callbacks if isinstance(c, GenerationCallback | PhaseProgress)]
        self.probe: Any = self.make_probe(self.config["fit"])
        return super()._instantiate_trainer(config, [*kept, self.probe])

    def _unasked(self) -> list[L.Callback]:
        return [StartupCheck()]  # the run's status is not this one's to write

    def before_fit(self) -> None:
        rule, data = self.model.credit, self.datamodule
        if not rule.needs_teacher:
            other = "" if self.model.distillation is None else " (that of model.distillation gives no credit)"
            raise UserError(
                f"model.credit={type(rule).__name__} has no teacher{other}, so there is no divergence to measure; "
                "add --config configs/credit/gear.yaml"
            )
        data.zero_spread = "keep"  # what is measured needs no spread of rewards
        data.val_tasks = None  # nothing is evaluated
        super().before_fit()
