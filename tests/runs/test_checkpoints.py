"""Incomplete checkpoints are detected, reported and skipped; a full disk leaves no incomplete files."""

import json
import math
import os
import random
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from damaged_checkpoints import flip, write
from small_disks import fill
from tiny_runs import data, generation, module, trainer

from gear_lightning.callbacks.checkpoint import IterationCheckpoint
from gear_lightning.errors import UserError
from gear_lightning.runs import checkpoints
from gear_lightning.runs.checkpoints import (
    CompleteCheckpoints,
    damage,
    known_checkpoints,
    manifest_path,
    newest_complete,
    remove_checkpoint,
    resolve,
    write_checkpoint,
)
from gear_lightning.runs.files import replace_file, try_to_write
from gear_lightning.runs.loggers import Board, MetricsFile


def test_a_checkpoint_is_written_completely_and_read_back(tmp_path):
    path = write(tmp_path, 3)
    assert damage(path) is None
    assert torch.load(path, weights_only=True)["values"][0] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3.ckpt", "3.ckpt.json"]
    remove_checkpoint(path)
    assert not list(tmp_path.iterdir())


def test_any_flipped_byte_and_any_truncation_is_detected(tmp_path):
    path, rng = write(tmp_path, 3), random.Random(0)
    whole = path.read_bytes()
    for place in [0, len(whole) - 1, *rng.sample(range(len(whole)), 200)]:
        flip(path, place)
        assert "content has changed" in damage(path)
        path.write_bytes(whole[:place])
        assert "bytes of" in damage(path)
        path.write_bytes(whole)
    assert damage(path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": 1}', '{"format": 9, "size": 1}', "\x00"])
def test_an_invalid_manifest_is_detected(tmp_path, content):
    path = write(tmp_path, 3)
    manifest_path(path).write_text(content)
    assert "ckpt.json" in damage(path)


def test_the_newest_checkpoint_is_the_latest_in_training_not_in_file_time(tmp_path):
    far = write(tmp_path, 9)
    write(tmp_path, 5)
    os.utime(far, (0, 0))
    assert newest_complete(tmp_path) == far
    later = write(tmp_path, 9, "stopped")  # as many steps, written later
    assert newest_complete(tmp_path) == later
    assert [path for path, _ in known_checkpoints(tmp_path)][:2] == [later, far]


def test_damaged_checkpoints_are_reported_and_skipped(tmp_path, capsys):
    kept = write(tmp_path, 1)
    flip(write(tmp_path, 2), 100)
    cut = write(tmp_path, 3)
    cut.write_bytes(cut.read_bytes()[:500])
    manifest_path(write(tmp_path, 4)).unlink()
    (tmp_path / "5.ckpt").write_bytes(b"no checkpoint at all")
    (tmp_path / "6.ckpt.partial").write_bytes(b"half")
    (tmp_path / "last.ckpt").symlink_to("7.ckpt")  # gone
    assert newest_complete(tmp_path) == kept
    said = capsys.readouterr().err
    for name, why in (("2", "has changed"), ("3", "500 bytes of"), ("4", "4.ckpt.json is"), ("5", "5.ckpt.json is")):
        assert any(f"/{name}.ckpt is skipped" in line and why in line for line in said.splitlines()), said
    assert len(list(tmp_path.iterdir())) == 10, "nothing was removed"


def test_without_a_complete_checkpoint_resolve_raises(tmp_path):
    flip(write(tmp_path, 2), 100)
    with pytest.raises(UserError, match="no complete checkpoint"):
        resolve(tmp_path)


def test_a_checkpoint_given_by_name_is_checked(tmp_path, capsys):
    path = write(tmp_path, 2)
    link = tmp_path / "last.ckpt"
    link.symlink_to(path.name)
    assert resolve(link) == link
    flip(path, 200)
    for name in (path, link):
        with pytest.raises(UserError, match="damaged: its content has changed"):
            resolve(name)
    manifest_path(path).unlink()
    assert resolve(path) == path
    assert "has no manifest" in capsys.readouterr().err


def non_finite_checkpoint(part: str, value: float = math.nan) -> dict:
    """Return a checkpoint with one non-finite number."""
    whole = {"global_step": 2, "epoch": 2, "state_dict": {"policy.a": torch.zeros(3), "policy.b": torch.zeros(3)}}
    whole["optimizer_states"] = [{"state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(1.0)}}}]
    whole["teacher_shadow"] = [torch.zeros(3)]
    place = {"optimizer_states": lambda: whole["optimizer_states"][0]["state"][0]["exp_avg"]}
    place["state_dict"] = lambda: whole["state_dict"]["policy.b"]
    place["teacher_shadow"] = lambda: whole["teacher_shadow"][0]
    place[part]()[1] = value
    return whole


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("state_dict", "state_dict.policy.b"),
        ("optimizer_states", "optimizer_states.0.state.0.exp_avg"),
        ("teacher_shadow", "teacher_shadow.0"),
    ],
)
def test_non_finite_numbers_are_never_written(tmp_path, part, name, value):
    before = write(tmp_path, 1)
    with pytest.raises(UserError, match=rf"2.ckpt is not written: {name} holds .*after 2 optimizer steps; .* 1.ckpt"):
        write_checkpoint(non_finite_checkpoint(part, value), tmp_path / "2.ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.ckpt", "1.ckpt.json"]
    assert newest_complete(tmp_path) == before


@pytest.mark.parametrize("part", ["state_dict", "optimizer_states", "teacher_shadow"])
@pytest.mark.parametrize("manifest", ["an earlier version's", None])
def test_a_non_finite_checkpoint_of_an_earlier_version_is_refused(tmp_path, monkeypatch, capsys, part, manifest):
    before, path = write(tmp_path, 1), tmp_path / "2.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "non_finite", lambda _: None)
        write_checkpoint(non_finite_checkpoint(part), path)
    if manifest is None:
        manifest_path(path).unlink()
    else:
        told = json.loads(manifest_path(path).read_text())
        del told["finite"]
        manifest_path(path).write_text(json.dumps(told))
        assert damage(path) is None
    assert resolve(tmp_path) == before
    assert "2.ckpt is skipped" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"2.ckpt is not used: {part}.* not finite; give an earlier checkpoint"):
        resolve(path)


def test_a_run_does_not_save_non_finite_weights(tmp_path):
    class Break(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                with torch.no_grad():
                    pl_module.teacher.model.lm_head.weight[0, 0] = math.inf

    save = IterationCheckpoint(tmp_path / "c", "{epoch}", save_last="link", save_on_train_epoch_end=True)
    run = trainer(
        tmp_path, generation(), Break(), save, max_epochs=3, enable_checkpointing=True, plugins=[CompleteCheckpoints()]
    )
    with pytest.raises(UserError, match=r"epoch=1.* is not written: state_dict.teacher.model.lm_head.* epoch=0"):
        run.fit(module(), datamodule=data())
    assert newest_complete(tmp_path / "c").name == (tmp_path / "c" / "last.ckpt").resolve().name


def test_a_checkpoint_that_does_not_fit_leaves_no_file_and_damages_none(disk):
    before = write(disk, 1)
    (disk / "filler").write_bytes(bytes(300_000))
    big = {"global_step": 2, "epoch": 2, "values": torch.zeros(100_000)}
    with pytest.raises(
        UserError, match=r"cannot be written: No space left on device after .* MiB; the run can resume from 1.ckpt"
    ):
        write_checkpoint(big, disk / "2.ckpt")
    assert sorted(p.name for p in disk.iterdir()) == ["1.ckpt", "1.ckpt.json", "filler"]
    assert newest_complete(disk) == before
    fill(disk / "filler")
    with pytest.raises(UserError, match="MiB are needed"):  # raised before writing
        write_checkpoint({**big, "values": torch.zeros(1)}, disk / "3.ckpt")


def test_training_continues_on_a_full_disk_and_records_again_when_space_is_free(disk, tmp_path):
    filler = disk / "filler"

    class Fill(IterationCheckpoint):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                fill(filler)
            if trainer.current_epoch == 3:
                filler.unlink()

    kept = Fill(dirpath=tmp_path / "elsewhere")
    run = trainer(disk, generation(), kept, max_epochs=5, enable_checkpointing=True)
    run.loggers = [*run.loggers, Board(disk, name="", version="tensorboard")]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run.fit(module(), datamodule=data())
    said = [str(w.message) for w in warned]
    assert sum("rollout records cannot be written" in text for text in said) == 1
    assert sum("rollout records are written again" in text for text in said) == 1
    assert [len(list((disk / "rollouts").glob(f"iter_00000{i}*.jsonl"))) for i in range(5)] == [1, 0, 0, 1, 1]
    assert not list(disk.rglob("*.partial"))
    assert len((disk / "metrics.csv").read_text().splitlines()) == 6, "the metrics have caught up"


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    replace_file(path, lambda file: file.write(b"old"))

    def broken(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.warns(UserWarning, match="The pages cannot be written: No space left"):
        assert not try_to_write("pages", lambda: replace_file(path, broken))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.warns(UserWarning, match="The pages are written again"):
        assert try_to_write("pages", lambda: replace_file(path, lambda file: file.write(b"new")))


def fit(folder: Path, epochs: int, resume: bool = False) -> None:
    kept = IterationCheckpoint(dirpath=folder / "checkpoints", filename="{epoch}", save_on_train_epoch_end=True)
    options = {"enable_checkpointing": True, "plugins": [CompleteCheckpoints()]}
    run = trainer(folder, generation(), kept, max_epochs=epochs, **options)
    run.fit(module(), datamodule=data(), ckpt_path=folder / "checkpoints" if resume else None, weights_only=True)


def test_a_run_with_a_damaged_newest_checkpoint_resumes_from_the_previous_one(tmp_path, capsys):
    fit(tmp_path / "whole", 5)
    fit(tmp_path / "hurt", 4)
    folder = tmp_path / "hurt" / "checkpoints"
    assert sorted(p.name for p in folder.glob("*.ckpt")) == ["epoch=2.ckpt", "epoch=3.ckpt"], "one is kept to spare"
    flip(folder / "epoch=3.ckpt", 5000)
    fit(tmp_path / "hurt", 5, resume=True)
    assert "epoch=3.ckpt is skipped" in capsys.readouterr().err
    paths = [tmp_path / name / "checkpoints" / "epoch=4.ckpt" for name in ("whole", "hurt")]
    ends = [torch.load(path, weights_only=True) for path in paths]
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name]), name


def test_a_checkpoint_holds_the_row_of_metrics_that_is_logged_after_it(tmp_path):
    fit(tmp_path, 2)
    before = MetricsFile(str(tmp_path))._read()
    rows = (tmp_path / "metrics.csv").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.csv").write_text("".join(rows[:-1]))  # killed between the checkpoint and the row
    fit(tmp_path, 3, resume=True)
    steps = [line.split(",")[0] for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == ["1", "2", "3"]
    after = MetricsFile(str(tmp_path))._read()
    timed = ("time/", "perf/")
    for row in (0, 1):
        lost = {key for key in before[row] if before[row][key] != after[row].get(key) and not key.startswith(timed)}
        assert not lost, lost
