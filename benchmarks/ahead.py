"""Optimizer steps per second with rollouts ahead of the update (``generation.ahead``), on two cores.

Used by `rollout.py`. The vLLM server may use only one core and training the other. Training of a small Llama is run in
turn with each value of ``generation.ahead``; rollouts and update take about equally long, as in a balanced setup.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import yaml
from vllm_server import serving

from gear_lightning.runs.metrics_file import read_columns

HERE = Path(__file__).parent
SERVER, TRAINER = "0", "1"  # cores
STEADY = 3  # the first iterations are not counted
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)}
RECIPE: dict[str, Any] = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu", "enable_checkpointing": False, "limit_val_batches": 0, "gradient_clip_val": 1.0,
        "callbacks": [{"class_path": "ahead.Clock"}],
    },
    "model": {
        "policy": {
            "class_path": "gear_lightning.models.FromScratch",
            "init_args": {
                "words": "gear_lightning.environments.lookup_chain.WORDS", "hidden_size": 256, "layers": 8,
                "heads": 8, "max_length": 128,
            },
        },
        "credit": {"class_path": "gear_lightning.credit.GEAR"},
        "teacher": {"template": " <ref> {reference}"},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6}},
    },
    "data": {
        "train_tasks": {"class_path": "doctor_check.Talks"}, "tasks_per_iteration": 2, "group_size": 8,
        "micro_batch_size": 8,
    },
    "generation": {
        "engine": {"class_path": "gear_lightning.generation.VLLMEngine"},
        "environment": "doctor_check.Talk",
        "budgets": {"turns": 200, "tokens": 120, "context": 128},
    },
    "warm_start": None,
}  # fmt: skip
OPTIONS = ["--model.objective.sampler_cap=2.0"]  # what `ahead` needs: older rollouts are corrected for


class Clock(L.Callback):
    """Logs the seconds since the start of training, so that ``metrics.csv`` has them for each iteration."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("time/elapsed_s", time.perf_counter() - self.started, batch_size=1)


def train(ahead: int, iterations: int, recipe: Path, url: str, run: Path) -> dict[str, float]:
    """Train, and return medians over the steady iterations.

    Raises:
        SystemExit: training failed.
    """
    given = ["--generation.ahead", str(ahead), *OPTIONS] if ahead else []
    command = [
        "taskset", "-c", TRAINER, sys.executable, "-m", "gear_lightning", "fit", "--config", str(recipe),
        "--generation.engine.servers", json.dumps([url]), "--trainer.max_epochs", str(iterations),
        "--trainer.default_root_dir", str(run), *given,
    ]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"generation.ahead={ahead} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    columns = {name: values for name, (_, values) in read_columns(run / "metrics.csv").items()}
    seconds = columns["time/elapsed_s"][STEADY:] - columns["time/elapsed_s"][STEADY - 1 : -1]
    step = float(np.median(seconds))
    phases = {name: float(np.median(columns[name][STEADY:])) for name in ("time/rollout_s", "time/update_s")}
    return {"steps_per_s": 1 / step, "step_s": step, **phases, "steady": len(seconds)}


def measure_ahead(values: list[int], iterations: int, rounds: int, vllm: Path) -> dict[str, Any]:
    """Train with each value in turn, and return steps per second and ratios to the first value.

    Args:
        values: of ``generation.ahead``.
        iterations: of a run; more than `STEADY`.
        rounds: number of runs with each value.
        vllm: the Python of vLLM's environment.
    """
    if iterations <= STEADY:
        sys.exit(f"--iterations {iterations}: must be more than {STEADY}")
    found: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(RECIPE))
        with serving(vllm, ["--config", str(recipe)], folder, SERVER, **ENVIRONMENT) as url:
            for number in range(rounds):
                found.append({})
                for ahead in values:
                    found[-1][str(ahead)] = train(ahead, iterations, recipe, url, folder / f"{number}-{ahead}")
                print(
                    f"ahead, round {number + 1}", {a: round(r["step_s"], 2) for a, r in found[-1].items()}, flush=True
                )
    first = str(values[0])
    speeds = {str(a): statistics.median([r[str(a)]["steps_per_s"] for r in found]) for a in values}
    ratios = {str(a): [r[str(a)]["steps_per_s"] / r[first]["steps_per_s"] for r in found] for a in values[1:]}
    return {
        "what": "optimizer steps per second by generation.ahead; vLLM server on one core, training on the other",
        "recipe": RECIPE,
        "iterations": iterations,
        "steps_per_s": speeds,
        "ratios": {f"{a} / {first}": {"min": min(r), "median": statistics.median(r)} for a, r in ratios.items()},
        "rounds": found,
    }
