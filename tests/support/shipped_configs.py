"""The configs under configs/, parsed as on the command line."""

import contextlib
import io
from pathlib import Path

import pytest
import yaml
from checkout import ROOT

from gear_lightning.recipes.cli import GearCLI

CONFIGS = ROOT / "configs"


PLANS = sorted(p for p in CONFIGS.glob("study/*.yaml") if "arms" in yaml.safe_load(p.read_text()))


RECIPES = sorted([*CONFIGS.glob("*.yaml"), *(set(CONFIGS.glob("study/*.yaml")) - set(PLANS))])


QUICKSTART = CONFIGS / "quickstart.yaml"


class Parsed(GearCLI):
    """Parses the command line, and creates nothing."""

    def instantiate_classes(self) -> None:
        self.datamodule = self.model = self.trainer = None

    def _run_subcommand(self, subcommand: str) -> None:
        """Train nothing."""


class Built(GearCLI):
    """Creates all objects that the command line requests, and does not train."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Train nothing."""


def arguments(*files: Path, command: str = "fit") -> list[str]:
    return [command, *(part for file in files for part in ("--config", str(file)))]


def printed(*args: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as done:
        Parsed([*args, "--print_config"])
    assert not done.value.code
    return out.getvalue()
