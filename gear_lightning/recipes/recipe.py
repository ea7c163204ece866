"""A recipe as ``fit`` reads it, and nothing of it started: for those who look at recipes before they run."""

import sys
from dataclasses import dataclass
from typing import Any

import torch

from ..callbacks.checkpoint import IterationCheckpoint
from ..callbacks.generation import GenerationCallback
from ..data import RolloutDataModule
from ..errors import UserError
from ..module import GearModule
from .cli import GearCLI
from .idle_options import idle_options
from .refusals import refusals


@dataclass(frozen=True)
class Recipe:
    """The parts of a recipe that decide what it needs.

    Args:
        module: with policy, teacher and optimizer; no weights are loaded.
        data: batch sizes.
        generation: budgets and engine.
        trainer: the ``trainer`` section as given, nothing of it made.
        checkpoint: when checkpoints are written.
        options: all sections as given.
    """

    module: GearModule
    data: RolloutDataModule
    generation: GenerationCallback
    trainer: Any
    checkpoint: IterationCheckpoint
    options: Any


class _Reader(GearCLI):
    """Reads a recipe as ``fit`` does, and stops before the Trainer: no device is touched, no directory made."""

    def _set_seed(self) -> None:
        self._follow_seed()  # and seed nothing here

    def instantiate_classes(self) -> None:
        self.asked = self.config["fit"].clone()
        trainer = self.config["fit"]["trainer"]
        # what may need a GPU, a package or an account that is not here
        for name, value in {"strategy": "auto", "logger": False, "callbacks": None, "plugins": None}.items():
            trainer[name] = value
        self.config["fit"]["warm_start"] = None
        self.config_init = self.parser.instantiate_classes(self.config)
        self.model, self.datamodule = self._get(self.config_init, "model"), self._get(self.config_init, "data")

    def _run_subcommand(self, subcommand: str) -> None:
        """No."""


def read_recipe(args: list[str]) -> Recipe:
    """What ``fit`` with these options would use.

    Raises:
        UserError: a class of the recipe cannot be made.
        SystemExit: an option is unknown or malformed; the parser has said so.
    """
    argv, sys.argv = sys.argv, sys.argv[:1]  # LightningCLI warns of arguments that come from two places
    try:
        cli = _Reader(["fit", *args])
    finally:
        sys.argv = argv
    generation, checkpoint = (cli._get(cli.config_init, name) for name in ("generation", "checkpoint"))
    return Recipe(cli.model, cli.datamodule, generation, cli.asked["trainer"], checkpoint, cli.asked)


def refused(recipe: Recipe, model: Any, gpus: int) -> list[str]:
    """Why ``fit`` would stop at the recipe on so many processes.

    Args:
        recipe: what is to be run.
        model: the policy on the meta device, without adapters.
        gpus: processes.
    """
    parts = recipe.module, recipe.data, recipe.generation, recipe.trainer
    return list(refusals(*parts, gpus, model, checkpoint=recipe.checkpoint))


def idle(recipe: Recipe) -> list[str]:
    """What the recipe gives that does nothing; nothing of one whose chat template is refused."""
    try:
        return idle_options(recipe.options, recipe.module, recipe.data, recipe.generation)
    except UserError:
        return []


def configured_gpus(trainer: Any) -> int:
    """Processes that the recipe asks for; with ``devices: auto``, one for each GPU here."""
    devices, nodes = trainer["devices"], trainer["num_nodes"] or 1
    if isinstance(devices, str) and devices.lstrip("-").isdecimal():
        devices = int(devices)
    if isinstance(devices, str) and devices != "auto":
        devices = [part for part in devices.split(",") if part]
    if isinstance(devices, list | tuple):
        return max(1, len(devices)) * nodes
    here = torch.cuda.device_count() if trainer["accelerator"] not in ("cpu",) else 1
    return (devices if isinstance(devices, int) and devices > 0 else max(1, here)) * nodes
