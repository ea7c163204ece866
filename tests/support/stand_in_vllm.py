"""Runs in the place of vLLM's Python: starts the server of `stand_in_server` with the options of vLLM's server."""

import argparse
import sys
import threading
from pathlib import Path

import stand_in_server
import torch


def write(folder: Path, code: str = "") -> Path:
    """Write a program that ``gear-lightning serve --python`` takes, and return its path.

    Args:
        folder: where.
        code: a line of the shell to run first.
    """
    made = folder / "python"
    made.write_text(f'#!/bin/bash\n{code}\nexec {sys.executable} {__file__} "$@"\n')
    made.chmod(0o755)
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    for option in ("host", "model", "logprobs-mode"):
        parser.add_argument(f"--{option}")
    for option in ("port", "max-model-len"):
        parser.add_argument(f"--{option}", type=int)
    given, _ = parser.parse_known_args()
    made = stand_in_server.StandIn(Path(given.model), given.max_model_len, given.logprobs_mode)
    stand_in_server.serve(made, given.port, given.host)
    threading.Event().wait()
