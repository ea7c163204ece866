"""Two processes on CPU (gloo) do what one process does, through the command line."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pace import seconds

from gear_lightning.parity.steps import compare_steps
from gear_lightning.runs.step_records import RECORDER

DEADLINE = seconds(300)


def command_line(run: Path, *options: str) -> tuple[list[str], dict[str, str]]:
    """A short, untrained version of the quickstart: command and environment."""
    command = [sys.executable, "-m", "gear_lightning", "fit", "--config", "configs/quickstart.yaml"]
    command += [
        "--warm_start=null", "--trainer.default_root_dir", str(run), "--trainer.check_val_every_n_epoch", "2",
        "--model.policy.hidden_size", "32", "--model.policy.layers", "2", "--model.optimizer.lr", "0.01",
        "--data.tasks_per_iteration", "2", "--data.group_size", "4", "--data.micro_batch_size", "2",
        "--data.val_limit", "6", "--data.eval_batch_size", "6", "--generation.environment", "tiny.AnyCall",
        "--trainer.max_epochs", "4", "--checkpoint.save_top_k", "-1", *options,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    return command, environment


RECORD = f"--trainer.callbacks+={RECORDER}"


def assert_same_steps(one: Path, other: Path, steps: int) -> None:
    """Two runs took the same optimizer steps but for rounding; weights cannot tell it: Adam makes whole steps of it."""
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = Path(__file__).resolve().parents[2]
    folder = tmp_path_factory.mktemp("ddp")
    launch(folder / "one", repository=root)
    launch(folder / "two", "--trainer.devices", "2", "--trainer.strategy", "ddp", repository=root)
    return folder


def test_two_processes_equal_one(runs):
    one, two = checkpoint(runs / "one"), checkpoint(runs / "two")
    assert one["global_step"] == two["global_step"] == 4
    assert one["state_dict"].keys() == two["state_dict"].keys()
    assert_same_steps(runs / "one", runs / "two", 4)


def test_two_processes_log_the_same_metrics_and_record_the_same_rollouts(runs):
    from gear_lightning.runs.records import read_records

    for a, b in zip(metrics(runs / "one"), metrics(runs / "two"), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), name

    def transcripts(run: Path) -> list:
        rollouts = [r for record in read_records(run) for r in record.rollouts]
        return sorted((r["iteration"], r["group_id"], r["rollout"], str(r["messages"])) for r in rollouts)

    assert transcripts(runs / "one") == transcripts(runs / "two")


def test_two_processes_resume_exactly(runs, repository):
    for number in range(3):  # the steps that the checkpoint has behind it
        path = Path("steps", f"step_{number:06d}.safetensors")
        (runs / "resumed" / "steps").mkdir(parents=True, exist_ok=True)
        shutil.copy(runs / "two" / path, runs / "resumed" / path)
    cut = runs / "two" / "checkpoints" / "iteration=00001.ckpt"
    options = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--ckpt_path", str(cut))
    launch(runs / "resumed", *options, repository=repository)
    # to the last bit but for rounding: DDP lays its gradient buckets out anew after a process's first step
    assert_same_steps(runs / "two", runs / "resumed", 4)
    assert metrics(runs / "resumed")[-1] == pytest.approx(metrics(runs / "two")[-1], rel=1e-4)


def test_fewer_validation_rollouts_than_processes_are_evaluated(tmp_path, repository):
    options = (
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        "ddp",
        "--data.val_limit",
        "1",
        "--trainer.max_epochs",
        "2",
    )
    launch(tmp_path, *options, repository=repository)
    assert [row["step"] for row in metrics(tmp_path) if "val/success" in row] == [0, 2]


def test_two_processes_train_the_same_adapters_as_one(tmp_path, repository):
    lora = ("--config", "configs/model/lora.yaml", "--model.lora.rank", "4", "--trainer.max_epochs", "2")
    launch(tmp_path / "one", *lora, repository=repository)
    launch(tmp_path / "two", *lora, "--trainer.devices", "2", "--trainer.strategy", "ddp", repository=repository)
    one, two = (checkpoint(tmp_path / name)["state_dict"] for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert_same_steps(tmp_path / "one", tmp_path / "two", 2)
    for adapter in ("policy", "teacher"):
        assert all(one[name].any() for name in one if f".lora_B.{adapter}." in name), "nothing was trained"
    options = ("--trainer.max_epochs", "3", "--ckpt_path", "last", *lora[:-2])
    launch(tmp_path / "two", *options, "--trainer.devices", "2", "--trainer.strategy", "ddp", repository=repository)
    assert checkpoint(tmp_path / "two")["global_step"] == 3


def test_a_target_that_matches_nothing_stops_all_processes_before_the_warm_start(tmp_path, repository):
    command, environment = command_line(tmp_path, "--model.lora.targets", "[q_porj]")
    command.remove("--warm_start=null")
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run(
        command, cwd=repository, env=environment, timeout=DEADLINE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    message = "gear-lightning: error: lora.targets: q_porj matches no linear layer of LlamaForCausalLM; it has"
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "checkpoints").exists()
