"""Pieces of the tests with several processes: a policy that ends its turns early and late, and runs of it through the
command line."""

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
DEADLINE = seconds(300)  # of one run


@dataclass(frozen=True)
class Opinions(FromScratch):
    """A tiny Llama far from uniform, which ends about every tenth token. The first place of its hidden states is the
    same number everywhere, so that the head's first column is a bias."""

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
    """Answers every turn with some words, and pays for the words that it hears."""

    def step(self, message: dict) -> Any:
        step, words = super().step(message), message["content"].split()
        step.reward = sum(word.startswith("e") for word in words) / max(1, len(words))
        return step


PYTHON = sys.executable  # while the tests run, it may be that of `quick_start`


def strategy(name: str, processes: int = 2) -> list[str]:
    """Options of ``fit`` for a strategy of configs/strategy; ``one`` for a single process."""
    if name == "one":
        return []
    return ["--config", f"configs/strategy/{name}.yaml", f"--trainer.devices={processes}"]


def environment() -> dict[str, str]:
    """Of runs: this checkout's code, and one thread each."""
    paths = os.pathsep.join([str(ROOT), str(SUPPORT)])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def fit_command(run: Path, *options: str, python: str | None = None) -> list[str]:
    """``fit`` of the recipe of these tests; started as a user would with ``python=PYTHON``."""
    command = [python or sys.executable, "-m", "gear_lightning", "fit", "--config", RECIPE, *options]
    return [*command, f"--trainer.default_root_dir={run}"]


def start(command: list[str], log: Path) -> subprocess.Popen:
    """Start a command in a process group of its own, which its children belong to."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def members(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, leader = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(leader) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def finish(process: subprocess.Popen, log: Path, deadline: float = DEADLINE) -> int:
    """Wait for the end, and return the status. Past the deadline the whole group is killed, and the test fails."""
    try:
        return process.wait(timeout=deadline)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"not done within {deadline} s: {log.read_text()[-3000:]}") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()


def fit(run: Path, *options: str, deadline: float = DEADLINE) -> str:
    """Train, and return what was printed."""
    log = run / "log.txt"
    status = finish(start(fit_command(run, *options), log), log, deadline)
    assert status == 0, log.read_text()[-3000:]
    return log.read_text()


def side_by_side(jobs: dict[str, Any]) -> dict[str, Any]:
    """Call functions two at a time: a run of several processes waits for one of them half of the time."""
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items()}
        return {name: future.result() for name, future in futures.items()}
