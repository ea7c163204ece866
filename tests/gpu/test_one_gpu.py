"""What needs a GPU: `make test-gpu`. One device is enough."""

import csv
import subprocess
import sys

import pytest
import torch
from deadlines import seconds
from quickstart_runs import command_line, lives
from restart_runs import play

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEADLINE = seconds(540)
GPU = ("--trainer.accelerator", "gpu", "--trainer.devices", "1")


def rows(run) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def run(command, environment, repository) -> str:
    done = subprocess.run(
        command, cwd=repository, env=environment, timeout=DEADLINE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload"])
def test_every_strategy_trains_on_one_gpu(tmp_path, repository, strategy, precision):
    options = [*GPU, "--config", f"configs/strategy/{strategy}.yaml", "--trainer.precision", precision]
    run(*command_line(tmp_path, *options), repository)
    last = rows(tmp_path)[-1]
    assert float(last["memory/update_gib"]) > 0
    assert float(last["train/sampler_gap_max"]) < (1e-3 if precision == "32-true" else 0.5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_strategies_agree_on_one_gpu(tmp_path, repository, precision):
    command, environment = command_line(tmp_path)
    fit = command[command.index("fit") + 1 :]
    place = fit.index("--trainer.default_root_dir")
    fit = fit[:place] + fit[place + 2 :] + ["--trainer.accelerator", "gpu", "--trainer.precision", precision]
    fit += ["--model.optimizer.lr", "0.001"]
    parity = [sys.executable, "-m", "gear_lightning", "parity", "--devices", "1", "--out", str(tmp_path / "out")]
    said = run([*parity, "--strategies", "fsdp,zero1,zero2,zero3", *fit], environment, repository)
    assert "All equal" in said


def test_the_cpu_and_the_gpu_agree(tmp_path, repository):
    run(*command_line(tmp_path / "cpu", "--trainer.accelerator", "cpu"), repository)
    run(*command_line(tmp_path / "gpu", *GPU), repository)
    for a, b in zip(rows(tmp_path / "cpu"), rows(tmp_path / "gpu"), strict=True):
        for name in ("train/loss", "train/grad_norm", "train/reward", "credit/divergence_p95"):
            if a.get(name):
                assert float(b[name]) == pytest.approx(float(a[name]), rel=2e-2, abs=1e-3), name


def test_a_parked_teacher_leaves_the_gpu_between_uses(tmp_path, repository):
    large = ["--model.policy.hidden_size", "1024", "--model.policy.layers", "8", "--trainer.max_epochs", "2"]
    for name, park in (("there", "false"), ("parked", "true")):
        options = [*GPU, *large, "--model.teacher.park", park, "--trainer.enable_checkpointing", "false"]
        run(*command_line(tmp_path / name, *options), repository)
    there, parked = rows(tmp_path / "there")[-1], rows(tmp_path / "parked")[-1]
    assert parked["train/grad_norm"] == there["train/grad_norm"]
    assert float(parked["memory/rollout_gib"]) < 0.85 * float(there["memory/rollout_gib"])


def test_8_bit_adamw_and_activation_checkpointing_save_memory(tmp_path, repository):
    large = ["--model.policy.hidden_size", "1024", "--model.policy.layers", "8", "--trainer.max_epochs", "2"]
    large += ["--trainer.enable_checkpointing", "false"]
    run(*command_line(tmp_path / "plain", *GPU, *large), repository)
    saving = ["--config", "configs/optimizer/adamw_8bit.yaml", "--model.activation_checkpointing", "true"]
    command, environment = command_line(tmp_path / "saving", *GPU, *large)
    place = command.index("--warm_start=null")
    run([*command[:place], *saving, *command[place:]], environment, repository)
    plain, less = rows(tmp_path / "plain")[-1], rows(tmp_path / "saving")[-1]
    assert float(less["memory/update_gib"]) < 0.8 * float(plain["memory/update_gib"])


def test_a_run_stopped_in_a_later_inner_epoch_goes_on(tmp_path):
    """What was kept of the first one lies in CPU memory, and meets tensors on the GPU."""
    options = (*GPU, "--data.inner_epochs", "2", "--trainer.max_epochs", "2")
    stop = ("update", 7, "SIGTERM", 0)  # of 4 micro-batches x 2 inner epochs
    assert play(tmp_path / "one", lives(tmp_path / "whole", [], 1, *options))[-1] == [0]
    assert play(tmp_path / "two", lives(tmp_path / "parts", [stop], 1, *options)) == [[75], [0]]
    whole, parts = rows(tmp_path / "whole")[-1], rows(tmp_path / "parts")[-1]
    for name in ("train/loss", "train/grad_norm", "train/reward"):
        assert float(parts[name]) == pytest.approx(float(whole[name]), rel=2e-2, abs=1e-3), name
