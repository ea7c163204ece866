"""Two processes on CPU (gloo) give the results of one process, through the command line."""

import shutil
import subprocess
from pathlib import Path

import pytest
from quickstart_runs import DEADLINE, assert_same_steps, checkpoint, command_line, launch, metrics


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


def test_two_processes_log_the_metrics_and_record_the_rollouts_of_one(runs):
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
    for number in range(3):  # the records of the steps before the checkpoint
        path = Path("steps", f"step_{number:06d}.safetensors")
        (runs / "resumed" / "steps").mkdir(parents=True, exist_ok=True)
        shutil.copy(runs / "two" / path, runs / "resumed" / path)
    cut = runs / "two" / "checkpoints" / "iteration=00001.ckpt"
    options = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--ckpt_path", str(cut))
    launch(runs / "resumed", *options, repository=repository)
    # equal except for rounding: DDP rebuilds its gradient buckets after a process's first step
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


def test_a_lora_target_without_match_stops_all_processes_before_the_warm_start(tmp_path, repository):
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
