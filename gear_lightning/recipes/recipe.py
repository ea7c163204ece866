"""Read a recipe as ``fit`` does, without starting it: for commands that check recipes before they run."""

import sys
from dataclasses import dataclass
from typing import Any

import torch

from gear_lightning.callbacks.checkpoint import IterationCheckpoint
from gear_lightning.callbacks.generation import GenerationCallback

from ..data import RolloutDataModule
from ..errors import UserError
from ..module import GearModule
from .cli import GearCLI
from .idle_options import idle_options
from .refusals import refusals


@dataclass(frozen=True)
class Recipe:
    """The parts of a recipe that determine its needs.

    Args:
        module: the module with policy, teacher and optimizer; no weights are loaded.
        data: the data module, with batch sizes.
        generation: the generation callback, with budgets and engine.
        trainer: the ``trainer`` section as given, not instantiated.
        checkpoint: the checkpoint callback.
        options: all sections as given.
    """

    module: GearModule
    data: RolloutDataModule
    generation: GenerationCallback
    trainer: Any
    checkpoint: IterationCheckpoint
    options: Any


class _Reader(GearCLI):
    """Reads a recipe as ``fit`` does, and stops before the Trainer: it uses no device and creates no directory."""

    def _set_seed(self) -> None:
        self._follow_seed()  # without seeding this process

    def instantiate_classes(self) -> None:
        self.asked = self.config["fit"].clone()
        trainer = self.config["fit"]["trainer"]
        # these may need a GPU, a package or an account that this machine lacks
        for name, value in {"strategy": "auto", "logger": False, "callbacks": None, "plugins": None}.items():
            trainer[name] = value
        self.config["fit"]["warm_start"] = None
        self.config_init = self.parser.instantiate_classes(self.config)
        self.model, self.datamodule = self._get(self.config_init, "model"), self._get(self.config_init, "data")

    def _run_subcommand(self, subcommand: str) -> None:
        """Do not run the subcommand."""


def read_recipe(args: list[str]) -> Recipe:
    """Return the recipe that ``fit`` would use with these options.

    Raises:
        UserError: a class of the recipe cannot be created.
        SystemExit: an option is unknown or malformed; the parser has reported it.
    """
    argv, sys.argv = sys.argv, sys.argv[:1]  # LightningCLI warns if arguments come from two places
    try:
        cli = _Reader(["fit", *args])
    finally:
        sys.argv = argv
    generation, checkpoint = (cli._get(cli.config_init, name) for name in ("generation", "checkpoint"))
    return Recipe(cli.model, cli.datamodule, generation, cli.asked["trainer"], checkpoint, cli.asked)


def refused(recipe: Recipe, model: Any, gpus: int) -> list[str]:
    """Return why ``fit`` would reject the recipe on this number of processes.

    Args:
        recipe: the recipe.
        model: the policy on the meta device, without adapters.
        gpus: number of processes.
    """
    parts = recipe.module, recipe.data, recipe.generation, recipe.trainer
    return list(refusals(*parts, gpus, model, checkpoint=recipe.checkpoint))


def idle(recipe: Recipe) -> list[str]:
    """Return the options of the recipe that have no effect; empty if its chat template is rejected."""
    try:
        return idle_options(recipe.options, recipe.module, recipe.data, recipe.generation)
    except UserError:
        return []


def configured_gpus(trainer: Any) -> int:
    """Return the number of processes that the recipe asks for; with ``devices: auto``, one per GPU of this machine."""
    devices, nodes = trainer["devices"], trainer["num_nodes"] or 1
    if isinstance(devices, str) and devices.lstrip("-").isdecimal():
        devices = int(devices)
    if isinstance(devices, str) and devices != "auto":
        devices = [part for part in devices.split(",") if part]
    if isinstance(devices, list | tuple):
        return max(1, len(devices)) * nodes
    here = torch.cuda.device_count() if trainer["accelerator"] not in ("cpu",) else 1
    return (devices if isinstance(devices, int) and devices > 0 else max(1, here)) * nodes
