"""Short runs of the quick start's recipe, without warm start, through the command line, and their files."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import torch
from checkout import SUPPORT
from deadlines import seconds

from gear_lightning.parity.steps import compare_steps
from gear_lightning.runs.step_records import RECORDER

DEADLINE = seconds(300)


def command_line(run: Path, *options: str) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of a short version of the quickstart without warm start."""
    command = [sys.executable, "-m", "gear_lightning", "fit", "--config", "configs/quickstart.yaml"]
    command += [
        "--warm_start=null", "--trainer.default_root_dir", str(run), "--trainer.check_val_every_n_epoch", "2",
        "--model.policy.hidden_size", "32", "--model.policy.layers", "2", "--model.optimizer.lr", "0.01",
        "--data.tasks_per_iteration", "2", "--data.group_size", "4", "--data.micro_batch_size", "2",
        "--data.val_limit", "6", "--data.eval_batch_size", "6", "--generation.environment", "tiny_runs.AnyCall",
        "--trainer.max_epochs", "4", "--checkpoint.save_top_k", "-1", *options,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(SUPPORT),
    }
    return command, environment


ITERATIONS = 20  # of `lives`
RECORD = f"--trainer.callbacks+={RECORDER}"


def assert_same_steps(one: Path, other: Path, steps: int) -> None:
    """Assert that two runs took the same optimizer steps except for rounding.

    Weights cannot be compared, because Adam turns rounding of small gradients into steps of full size.
    """
    found = compare_steps(one, other)
    assert not found.faults, found
    assert 0 < found.steps <= steps


def launch(run: Path, *options: str, repository: Path) -> None:
    command, environment = command_line(run, RECORD, *options)
    done = subprocess.run(
        command, cwd=repository, env=environment, timeout=DEADLINE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def metrics(run: Path) -> list[dict[str, float]]:
    timing = ("time/", "perf/rollout_", "perf/update_", "perf/padding", "perf/seconds")
    with (run / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v and not k.startswith(timing)} for row in csv.DictReader(file)]


def checkpoint(run: Path, name: str = "last") -> dict:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def lives(run: Path, strikes: list[tuple[str, int, str, int]], processes: int, *options: str) -> list[list[list[str]]]:
    """Return the commands of a run that is restarted after each signal, and finally runs without one.

    Args:
        run: the run directory.
        strikes: for each start, where and when to send which signal: (place, occurrence, signal, rank).
        processes: number of processes.
        options: more options of ``fit``.

    Returns:
        For each start, the arguments of every rank.
    """
    command, _ = command_line(
        run, RECORD, "--ckpt_path", "last", "--trainer.max_epochs", str(ITERATIONS), "--generation.environment",
        "send_signal_at.Struck", "--trainer.devices", str(processes), *options,
    )  # fmt: skip
    arguments = [command[3:]] * processes
    made = []
    for number, (place, count, signal, rank) in enumerate(strikes):
        strike = ["--trainer.callbacks+=send_signal_at.Strike", "--trainer.callbacks.place", place]
        strike += ["--trainer.callbacks.count", str(count), "--trainer.callbacks.number", signal]
        strike += ["--trainer.callbacks.rank", str(rank), "--trainer.callbacks.name", f"struck-{number}"]
        made.append([[*one, *strike] for one in arguments])
    return [*made, arguments]


SHORT = ("--trainer.max_epochs", "3")


def strike(run: Path, place: str, count: int, number: str, *options: str, processes: int = 1, rank: int = 0) -> list:
    return lives(run, [(place, count, number, rank)], processes, *SHORT, *options)
