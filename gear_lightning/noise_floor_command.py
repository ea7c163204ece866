"""``gear-lightning noise-floor``: what rounding does to credit, from a ``fit`` that stops before its first step."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from .callbacks.generation import GenerationCallback
from .callbacks.progress import PhaseProgress
from .callbacks.startup import StartupCheck
from .cli import GearCLI, main
from .errors import UserError
from .noise_floor import FILE, MeasureNoise, recorded_batches, table, write_floor

MEASURING = {  # one device, nothing written, and no limit of the recipe that ends the fit before it has begun
    **{"strategy": "auto", "devices": 1, "num_nodes": 1, "logger": False, "callbacks": None},
    **{"enable_checkpointing": False, "fast_dev_run": False, "limit_train_batches": None, "overfit_batches": 0.0},
    **{"max_epochs": -1, "max_steps": -1, "min_epochs": None, "min_steps": None, "max_time": None},
}


class NoiseFloorCLI(GearCLI):
    """``gear-lightning noise-floor``: a ``fit`` that measures before its first step and leaves the run as it was."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": LightningCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--rollouts",
            type=str | None,
            default=None,
            help="Run directory with recorded rollouts. Null: make new ones.",
        )
        parser.add_argument("--micro_batches", type=int, default=2, help="Micro-batches to measure, at most.")
        parser.add_argument(
            "--out", type=str | None, default=None, help=f"File for the result. Null: {FILE} in the run directory."
        )

    def before_instantiate_classes(self) -> None:
        self.save_config_callback = None
        if self.config["fit"]["micro_batches"] < 1:
            raise UserError(f"micro_batches={self.config['fit']['micro_batches']} must be at least 1")
        strategy = self.config["fit"]["trainer"]["strategy"]
        if not isinstance(strategy, str) and self.config["fit"]["trainer"]["precision"] not in (None, "32-true"):
            print(
                "This measures in one process without the recipe's strategy. A run under FSDP2 with bf16-mixed rounds "
                "more, and measures its own floor (callback noise_floor).",
                file=sys.stderr,
            )
        for key, value in MEASURING.items():
            self.config["fit"]["trainer"][key] = value

    def _lock(self) -> None:
        """A run may go on meanwhile: nothing of it is written."""

    def _set_aside_earlier_run(self) -> None:
        """It stays where it is."""

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        kept = [c for c in callbacks if isinstance(c, GenerationCallback | PhaseProgress)]
        self.probe = MeasureNoise(self.config["fit"]["micro_batches"])
        return super()._instantiate_trainer(config, [*kept, self.probe])

    def _unasked(self) -> list[L.Callback]:
        return [StartupCheck()]  # the run's status is not this one's to write

    def before_fit(self) -> None:
        rule, data = self.model.credit, self.datamodule
        if not rule.needs_teacher:
            raise UserError(
                f"model.credit={type(rule).__name__} has no teacher, so there is no divergence to measure; "
                "add --config configs/credit/gear.yaml"
            )
        run = self.config["fit"]["rollouts"]
        if run is not None:
            self.probe.recorded = recorded_batches(
                Path(run),
                micro_batch_size=data.micro_batch_size,
                temperature=self._get(self.config_init, "generation").temperature,
                vocabulary=len(self.model.chat_format.tokenizer),
            )
        wanted = -(-self.probe.micro_batches * data.micro_batch_size // data.group_size)
        data.tasks_per_iteration = min(data.tasks_per_iteration, wanted)
        data.zero_spread = "keep"  # noise needs no spread of rewards
        data.val_tasks = None  # nothing is evaluated
        super().before_fit()

    def after_fit(self) -> None:
        out = Path(self.config["fit"]["out"] or self.run_dir / FILE)
        source = self.config["fit"]["rollouts"]
        write_floor(out, {**self.probe.result, "rollouts_from": source or "generated for this measurement"})
        print(f"\n{table(self.probe.result, self.model.credit)}\n\n{out}: the same, for programs and for the run")


def noise_floor_command(argv: list[str]) -> int:
    """``gear-lightning noise-floor``.

    Args:
        argv: the arguments after ``noise-floor``: those of ``fit``, and its own.

    Returns:
        The exit status.
    """
    main(["fit", *argv], NoiseFloorCLI)
    return 0
