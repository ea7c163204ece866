"""A full disk does not damage existing files."""

import json
import os
import warnings

import pytest
import torch
from damaged_checkpoints import write
from small_disks import fill
from tiny_runs import data, generation, module, trainer

from gear_lightning.callbacks.run_status import _append
from gear_lightning.runs.checkpoints import UnwrittenCheckpoint, damage, newest_complete, write_checkpoint
from gear_lightning.runs.loggers import Board
from gear_lightning.runs.records import ledger


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_that_does_not_fit_keeps_the_old_file_of_the_same_name(disk):
    path = write(disk, 1, "stopped")
    (disk / "filler").write_bytes(bytes(300_000))
    big = {"global_step": 2, "epoch": 2, "values": torch.zeros(100_000)}
    with pytest.raises(UnwrittenCheckpoint, match=r"No space left on device .*; the run can resume from stopped.ckpt"):
        write_checkpoint(big, path)
    assert names(disk) == ["filler", "stopped.ckpt", "stopped.ckpt.json"]
    assert damage(path) is None
    assert torch.load(path, weights_only=True)["global_step"] == 1


def test_without_its_manifest_no_checkpoint_is_written(tmp_path, monkeypatch):
    before = write(tmp_path, 1)
    real = os.fsync

    def fsync(place):
        if os.readlink(f"/proc/self/fd/{place}").endswith(".json.partial"):
            raise OSError(28, "No space left on device")
        real(place)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UnwrittenCheckpoint, match="No space left on device"):
        write(tmp_path, 2)
    assert names(tmp_path) == ["1.ckpt", "1.ckpt.json"]
    assert newest_complete(tmp_path) == before


def test_only_a_complete_checkpoint_is_suggested_for_a_resume(disk):
    kept, damaged = write(disk, 1), write(disk, 2)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    fill(disk / "filler")
    with pytest.raises(UnwrittenCheckpoint, match=f"MiB are free; the run can resume from {kept.name}"):
        write(disk, 3)


def test_a_line_that_does_not_fit_keeps_the_earlier_lines(disk):
    path = disk / "attempts.jsonl"
    line = json.dumps({"what": "start"})
    _append(path, line)
    fill(disk / "filler")

    def append_until_full():  # the file's last block has space for some lines
        for _ in range(1000):
            _append(path, line)

    with pytest.raises(OSError, match="No space left"):
        append_until_full()
    assert all(json.loads(text) == {"what": "start"} for text in path.read_text().splitlines())
    assert path.read_text().endswith("}\n")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_run_that_starts_on_a_full_disk_trains_and_damages_no_file(disk, tmp_path):
    def run(epochs):
        options = {"max_epochs": epochs, "enable_checkpointing": False}
        mine = trainer(disk, generation(), **options)
        mine.loggers = [*mine.loggers, Board(disk, name="", version="tensorboard")]
        mine.fit(module(), datamodule=data())
        return mine

    run(1)
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file() and "tensorboard" not in path.parts}
    assert {path.parent.name for path in before} >= {"tokenizer", "rollouts"}
    fill(disk / "filler")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert run(2).global_step == 2
    for kind in ("tokenizer's files", "TensorBoard events", "metrics", "rollout records"):
        assert sum(f"The {kind} cannot be written" in str(w.message) for w in warned) == 1, kind
    for path, content in before.items():
        assert path.read_bytes() == content, path
    assert not list(disk.rglob("*.partial"))


def test_the_ledger_lists_the_groups_that_were_trained_on(tmp_path):
    run = trainer(tmp_path, generation(), max_epochs=3)
    run.fit(module(), datamodule=data())
    found = ledger(tmp_path)
    assert [iteration for iteration, _, _ in found] == [0, 0, 1, 1, 2, 2]
    assert [group for _, group, _ in found] == list(range(6)), "each group once"
    assert all(isinstance(task, str) for _, _, task in found)
