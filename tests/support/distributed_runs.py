"""Helpers for tests with several processes: a policy with turns of different length, and runs through the command
line."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkout import ROOT, SUPPORT
from deadlines import seconds
from every_rule import Talk
from tiny_runs import WORDS

from gear_lightning.models import FromScratch

RECIPE = "tests/distributed/run.yaml"
DEADLINE = seconds(300)  # for one run


@dataclass(frozen=True)
class Opinions(FromScratch):
    """A tiny Llama with a distribution far from uniform, which samples a stop token about every tenth token.

    The first element of its hidden states is constant, so that the head's first column is a bias.
    """

    words: str = WORDS
    hidden_size: int = 32
    layers: int = 2
    heads: int = 2
    max_length: int = 128

    def model(self) -> Any:
        model = super().model()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4 if p.dim() == 2 else 1)
            model.lm_head.weight.mul_(4)
            model.model.embed_tokens.weight[:, 0] = 0.3
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
            model.lm_head.weight[:, 0] = 0
            model.lm_head.weight[model.config.eos_token_id, 0] = 2.0
        return model


class Chatter(Talk):
    """Answers every turn with some words, and rewards words that start with "e"."""

    def step(self, message: dict) -> Any:
        step, words = super().step(message), message["content"].split()
        step.reward = sum(word.startswith("e") for word in words) / max(1, len(words))
        return step


PYTHON = sys.executable  # during tests, sys.executable may be that of `quick_start`


def strategy(name: str, processes: int = 2) -> list[str]:
    """Return the options of ``fit`` for a strategy of configs/strategy; ``one`` means a single process."""
    if name == "one":
        return []
    return ["--config", f"configs/strategy/{name}.yaml", f"--trainer.devices={processes}"]


def environment() -> dict[str, str]:
    """Return the environment of runs: this checkout's code, and one thread per process."""
    paths = os.pathsep.join([str(ROOT), str(SUPPORT)])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def fit_command(run: Path, *options: str, python: str | None = None) -> list[str]:
    """Return the command of ``fit`` with the recipe of these tests; with ``python=PYTHON``, without quick start."""
    command = [python or sys.executable, "-m", "gear_lightning", "fit", "--config", RECIPE, *options]
    return [*command, f"--trainer.default_root_dir={run}"]


def start(command: list[str], log: Path) -> subprocess.Popen:
    """Start a command in a new process group, to which its children belong."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def members(group: int) -> list[int]:
    """Return the processes of a process group that are not zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, leader = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # the process has just ended
            continue
        if int(leader) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def finish(process: subprocess.Popen, log: Path, deadline: float = DEADLINE) -> int:
    """Wait for the end, and return the exit status. After the deadline, kill the process group and fail the test."""
    try:
        return process.wait(timeout=deadline)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"did not finish within {deadline} s: {log.read_text()[-3000:]}") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()


def fit(run: Path, *options: str, deadline: float = DEADLINE) -> str:
    """Train, and return the output."""
    log = run / "log.txt"
    status = finish(start(fit_command(run, *options), log), log, deadline)
    assert status == 0, log.read_text()[-3000:]
    return log.read_text()


def side_by_side(jobs: dict[str, Any]) -> dict[str, Any]:
    """Call functions two at a time, because a run of several processes often waits for one of them."""
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items()}
        return {name: future.result() for name, future in futures.items()}
