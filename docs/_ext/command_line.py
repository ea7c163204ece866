"""Directive ``command-help``: what a command prints with ``--help``, taken from the command itself."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]


def help_of(arguments: list[str]) -> str:
    """Return what ``gear-lightning ARGUMENTS`` prints. A separate process runs it: autodoc imports modules twice, and
    the parser compares classes by identity.

    Raises:
        RuntimeError: the command fails.
    """
    command = [sys.executable, "-m", "gear_lightning", *arguments]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "COLUMNS": "100", "PYTHONPATH": paths, "NO_COLOR": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"gear-lightning {' '.join(arguments)}: {done.stderr[-2000:]}")
    return done.stdout.replace(f"{ROOT}/", "")


class CommandHelp(Directive):
    """``.. command-help:: fit --help``"""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        text = help_of(self.arguments[0].split())
        block = nodes.literal_block(text, text)
        block["language"] = "text"
        return [block]


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": False}
