"""Runs the commands that measure a recipe before training, in separate processes."""

import os
import subprocess
import sys


def command(repository, *args: object) -> tuple[int, str, str]:
    """Run ``gear-lightning`` in a separate process. Return exit status, stdout and stderr."""
    line = [sys.executable, "-m", "gear_lightning", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(repository), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(line, cwd=repository, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr
