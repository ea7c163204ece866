"""A disk that fills up, with one or two processes: the run ends with a message, and resumes when space is free."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from quickstart_runs import DEADLINE, checkpoint, command_line
from small_disks import small_disk

from gear_lightning.runs.checkpoints import damage, newest_complete
from gear_lightning.runs.records import ledger

STRATEGIES = {
    "one": (),
    "ddp": ("--trainer.devices", "2", "--trainer.strategy", "ddp"),
    "fsdp": ("--config", "configs/strategy/fsdp.yaml", "--trainer.devices", "2"),
}


def fit(run: Path, repository: Path, *options: str) -> tuple[int, str]:
    command, environment = command_line(run, "--trainer.max_epochs", "3", "--ckpt_path", "last", *options)
    done = subprocess.run(
        command, cwd=repository, env=environment, timeout=DEADLINE, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", "1200k") as folder:  # enough for one checkpoint of 700 kB
        yield folder


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_full_disk_ends_the_run_on_all_processes_and_it_resumes_when_space_is_free(disk, tmp_path, repository, name):
    run, kept, options = tmp_path / "run", disk / "checkpoints", STRATEGIES[name]
    options = (*options, "--checkpoint.dirpath", str(kept))
    status, said = fit(run, repository, *options)
    assert status == 2, said[-3000:]
    assert "Traceback" not in said
    assert "MiB are free; the run can resume from iteration=00000.ckpt" in said
    assert f"the checkpoint {kept / 'iteration=00001.ckpt'} cannot be written" in said
    assert newest_complete(kept) == kept / "iteration=00000.ckpt"
    assert sorted(p.name for p in kept.iterdir()) == ["iteration=00000.ckpt", "iteration=00000.ckpt.json", "last.ckpt"]
    assert not (run / "crash").exists(), "a full disk is not a crash"

    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    status, said = fit(run, repository, *options)
    assert status == 0, said[-3000:]
    end = kept / "iteration=00002.ckpt"
    assert newest_complete(kept) == end
    whole, trained_on = checkpoint(disk)["state_dict"], ledger(run)
    assert len(trained_on) == 6

    with end.open("r+b") as file:  # damage the checkpoint: the iteration is repeated
        file.truncate(os.path.getsize(end) - 1)
    status, said = fit(run, repository, *options)
    assert status == 0, said[-3000:]
    assert said.count(f"checkpoint {end} is skipped: it has") == 1, said[-3000:]
    assert damage(end) is None
    assert ledger(run) == trained_on
    for key, value in checkpoint(disk)["state_dict"].items():
        tolerance = {"rtol": 0, "atol": 0} if name == "one" else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(value, whole[key], **tolerance, msg=key)
