"""Checkpoints written in the background: the same files, in the same order; links only to complete files."""

import os
import re
import subprocess
import sys
import threading
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from damaged_checkpoints import flip
from deadlines import seconds
from tiny_runs import data, generation, module, trainer

from gear_lightning.callbacks import background_saves
from gear_lightning.callbacks.checkpoint import IterationCheckpoint
from gear_lightning.errors import UserError
from gear_lightning.runs import background, checkpoints
from gear_lightning.runs.background import WRITER, nbytes, snapshot
from gear_lightning.runs.checkpoints import (
    CompleteCheckpoints,
    UnwrittenCheckpoint,
    damage,
    known_checkpoints,
    newest_complete,
    read_checkpoint,
)
from gear_lightning.runs.loggers import MetricsFile

DEADLINE = seconds(60)  # for waits that should be short


def run(folder: Path, epochs: int, *callbacks: L.Callback, resume: bool = False, **options: Any) -> L.Trainer:
    options = {"save_last": "link", "filename": "{epoch}", "save_on_train_epoch_end": True, **options}
    kept = IterationCheckpoint(dirpath=folder / "c", **options)
    mine = trainer(
        folder, generation(), *callbacks, kept, max_epochs=epochs, enable_checkpointing=True,
        plugins=[CompleteCheckpoints()],
    )  # fmt: skip
    torch.manual_seed(0)
    mine.fit(module(), datamodule=data(), ckpt_path=folder / "c" if resume else None, weights_only=True)
    return mine


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "c").iterdir())


@pytest.fixture
def gate(monkeypatch):
    """An event that blocks the writing of checkpoints while it is cleared."""
    opened, write = threading.Event(), checkpoints.write_checkpoint
    opened.set()

    def gated(*args: Any) -> None:
        assert opened.wait(DEADLINE)
        write(*args)

    monkeypatch.setattr(checkpoints, "write_checkpoint", gated)
    yield opened
    opened.set()
    WRITER.wait()
    WRITER.take_error()


@pytest.fixture
def done(monkeypatch):
    """A list of file events (replaced, linked, removed), in order."""
    events: list[str] = []
    replace, unlink = os.replace, Path.unlink

    def replaced(source: Any, target: Any) -> None:
        replace(source, target)
        if ".ckpt" in str(target):
            pointed = f" -> {os.readlink(target)}" if os.path.islink(target) else ""
            events.append(f"{Path(target).name}{pointed}")

    def unlinked(path: Path, **options: Any) -> None:
        events.append(f"{path.name} removed") if path.exists() and ".ckpt" in path.name else None
        unlink(path, **options)

    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(Path, "unlink", unlinked)
    return events


def same(one: Any, other: Any, name: str = "") -> None:
    """Assert that two values are equal except for times."""
    assert type(one) is type(other), name
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            if "time" not in str(key) and "seconds" not in str(key) and not str(key).startswith("perf/"):
                same(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), name
        for i, parts in enumerate(zip(one, other, strict=True)):
            same(*parts, f"{name}.{i}")
    elif not isinstance(one, str):  # paths differ
        assert one == other, name


def test_background_saves_write_the_same_files_as_blocking_saves(tmp_path, done):
    events = []
    for name, beside in (("beside", True), ("waiting", False)):
        done.clear()
        run(tmp_path / name, 4, background=beside)
        events.append(list(done))
    assert events[0] == events[1]
    assert events[0][-5:] == [
        "epoch=3.ckpt", "epoch=3.ckpt.json", "last.ckpt -> epoch=3.ckpt", "epoch=1.ckpt.json removed",
        "epoch=1.ckpt removed",
    ]  # fmt: skip
    assert names(tmp_path / "beside") == names(tmp_path / "waiting")
    for name in ("epoch=2.ckpt", "epoch=3.ckpt"):
        one, other = (tmp_path / folder / "c" / name for folder in ("beside", "waiting"))
        assert damage(one) is None
        assert abs(one.stat().st_size - other.stat().st_size) < 4096, "tied weights are written once"
        assert list(read_checkpoint(one)) == list(read_checkpoint(other))
        same(read_checkpoint(one), read_checkpoint(other), name)


def test_training_continues_and_links_wait_until_a_file_is_complete(tmp_path, gate):
    class Look(L.Callback):
        """Blocks writing before the second iteration's checkpoint, and unblocks it after the third optimizer step."""

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                WRITER.wait()
                gate.clear()

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
            if trainer.global_step == 3 and not gate.is_set():
                assert WRITER.busy
                assert names(tmp_path) == ["epoch=0.ckpt", "epoch=0.ckpt.json", "last.ckpt"]
                assert os.readlink(tmp_path / "c" / "last.ckpt") == "epoch=0.ckpt"
                gate.set()

    run(tmp_path, 3, Look())
    assert gate.is_set()
    assert os.readlink(tmp_path / "c" / "last.ckpt") == "epoch=2.ckpt"
    assert [path.name for path, _ in known_checkpoints(tmp_path / "c")] == ["epoch=2.ckpt", "epoch=1.ckpt"]
    run(tmp_path / "again", 2)
    one, other = (read_checkpoint(folder / "c" / "epoch=1.ckpt") for folder in (tmp_path, tmp_path / "again"))
    same(one["state_dict"], other["state_dict"])
    same(one["optimizer_states"], other["optimizer_states"])


def test_loggers_are_notified_after_the_file_is_complete(tmp_path, monkeypatch):
    told: list[bool] = []

    def after(self: Any, callback: Any) -> None:
        told.append(damage(Path(callback._last_checkpoint_saved)) is None)

    monkeypatch.setattr(MetricsFile, "after_save_checkpoint", after)
    run(tmp_path, 3)
    assert told == [True] * 3


@pytest.mark.parametrize("last", [False, True])
def test_an_error_in_the_thread_ends_the_run_and_keeps_the_previous_file(tmp_path, monkeypatch, last):
    fsync = os.fsync

    def full(place: int) -> None:
        if "epoch=1.ckpt.partial" in os.readlink(f"/proc/self/fd/{place}"):
            raise OSError(28, "No space left on device")
        fsync(place)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UnwrittenCheckpoint, match=r"No space left on device .*; the run can resume from epoch=0.ckpt"):
        run(tmp_path, 2 if last else 9)
    assert names(tmp_path) == ["epoch=0.ckpt", "epoch=0.ckpt.json", "last.ckpt"]
    assert os.readlink(tmp_path / "c" / "last.ckpt") == "epoch=0.ckpt"
    assert not WRITER.busy
    run(tmp_path / "next", 1)  # the error does not affect the next run


def test_an_exception_waits_for_the_file_that_is_being_written(tmp_path, gate):
    class Fail(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("something else")

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            gate.clear()

        def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
            assert WRITER.busy
            threading.Timer(0.3, gate.set).start()

    with pytest.raises(RuntimeError, match="something else"):
        run(tmp_path, 3, Fail())
    assert newest_complete(tmp_path / "c") == tmp_path / "c" / "epoch=0.ckpt"
    assert os.readlink(tmp_path / "c" / "last.ckpt") == "epoch=0.ckpt"


def test_the_interpreter_waits_for_the_thread(tmp_path):
    program = (
        "import sys, time, pathlib; from gear_lightning.runs.background import WRITER\n"
        f"WRITER.add(lambda: (time.sleep(0.5), pathlib.Path({str(tmp_path / 'written')!r}).touch()))\n"
        "sys.exit(3)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=DEADLINE, check=False).returncode == 3
    assert (tmp_path / "written").exists()


def test_no_copy_is_made_if_memory_is_short(tmp_path, monkeypatch):
    threads, write = set(), checkpoints.write_checkpoint

    def written(*args: Any) -> None:
        threads.add(threading.current_thread() is threading.main_thread())
        write(*args)

    monkeypatch.setattr(checkpoints, "write_checkpoint", written)
    monkeypatch.setattr(checkpoints, "free_memory", lambda: 1000)
    monkeypatch.setattr(WRITER, "complained", False)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run(tmp_path, 2)
    (said,) = (str(w.message) for w in warned if "Training waits" in str(w.message))
    assert re.search(r"a copy of epoch=0.ckpt needs .* are free", said)
    assert threads == {True}
    assert damage(tmp_path / "c" / "epoch=1.ckpt") is None
    threads.clear()
    monkeypatch.setattr(checkpoints, "free_memory", background.free_memory)
    run(tmp_path / "enough", 1)
    assert threads == {False}


def test_free_memory_is_at_most_the_memory_of_the_machine():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < background.free_memory() <= total


def test_a_snapshot_is_complete_and_independent():
    tied = torch.arange(6.0).reshape(2, 3)
    state = OrderedDict(a=tied, b=tied[:], view=tied[1], empty=torch.zeros(0))
    state._metadata = {"": {"version": 1}}  # pyright: ignore[reportAttributeAccessIssue]
    given = {"state": state, "lists": [1, [2.5, "x"], (True, None)], "kind": torch.bfloat16, "set": {1}}
    made = snapshot(given)
    same(made["state"], state)
    assert made["state"]._metadata == state._metadata
    assert made["state"]["a"] is made["state"]["b"]
    assert nbytes(given) == (6 + 3) * 4
    tied.zero_()
    given["lists"][1][0] = 0
    given["set"].add(2)
    assert made["state"]["view"].tolist() == [3, 4, 5]
    assert (made["lists"], made["kind"], made["set"]) == ([1, [2.5, "x"], (True, None)], torch.bfloat16, {1})
    assert snapshot({"there": torch.zeros(2, device="meta").new_zeros(2, device="cpu")})["there"].device.type == "cpu"


def test_partial_files_of_a_kill_are_removed_at_the_next_start(tmp_path):
    (tmp_path / "c").mkdir()
    for name in ("epoch=7.ckpt.partial", "epoch=7.ckpt.json.partial"):
        (tmp_path / "c" / name).write_bytes(b"half")
    run(tmp_path, 1)
    assert names(tmp_path) == ["epoch=0.ckpt", "epoch=0.ckpt.json", "last.ckpt"]


# -- how often --------------------------------------------------------------------------------------------------------


def test_min_interval_skips_checkpoints_but_not_the_last_one(tmp_path):
    run(tmp_path, 4, min_interval=3600, save_top_k=-1)
    assert [path.name for path, _ in known_checkpoints(tmp_path / "c")] == ["epoch=3.ckpt", "epoch=0.ckpt"]
    assert os.readlink(tmp_path / "c" / "last.ckpt") == "epoch=3.ckpt"


def test_a_run_resumes_exactly_from_a_checkpoint_of_several_iterations_ago(tmp_path):
    whole = run(tmp_path / "whole", 5)
    run(tmp_path / "parts", 4, min_interval=3600)
    flip(tmp_path / "parts" / "c" / "epoch=3.ckpt", 5000)
    again = run(tmp_path / "parts", 5, resume=True, min_interval=0)
    same(whole.lightning_module.state_dict(), again.lightning_module.state_dict())
    left, right = (MetricsFile(str(tmp_path / name))._read() for name in ("whole", "parts"))
    timed = ("time/", "perf/")
    assert [{k: v for k, v in row.items() if not k.startswith(timed)} for row in left] == [
        {k: v for k, v in row.items() if not k.startswith(timed)} for row in right
    ]


@pytest.mark.parametrize(
    ("options", "size", "blocked", "seconds", "since", "soon"),
    [
        ({}, 2**20, 50.0, 50.0, 1.0, False),  # a small checkpoint
        ({}, 2**30, 2.0, 0.0, 39.0, True),  # training has waited for 2 s: 40 s from save to save
        ({}, 2**30, 2.0, 0.0, 41.0, False),
        ({}, 2**30, 0.1, 60.0, 239.0, True),  # writing took 60 s: 240 s from save to save
        ({}, 2**30, 0.1, 60.0, 241.0, False),
        ({"every_n_epochs": 1}, 2**30, 50.0, 50.0, 1.0, False),  # the interval is given
        ({"min_interval": 0}, 2**30, 50.0, 50.0, 1.0, False),
        ({"min_interval": 600}, 2**20, 0.0, 0.0, 599.0, True),
        ({"min_interval": 600}, 2**30, 50.0, 50.0, 601.0, False),
    ],
)
def test_saves_take_at_most_a_small_share_of_the_time(monkeypatch, options, size, blocked, seconds, since, soon):
    writer = background.Writer()
    monkeypatch.setattr(background_saves, "WRITER", writer)
    callback = IterationCheckpoint(**options)
    writer.size, writer.seconds = size, seconds
    assert not callback._too_soon(0.0), "the first one of a process"
    callback._began, callback._blocked = 1000.0, blocked
    assert callback._too_soon(1000.0 + since) == soon


def test_a_large_checkpoint_is_postponed_while_another_is_written(monkeypatch):
    writer, go = background.Writer(), threading.Event()
    monkeypatch.setattr(background_saves, "WRITER", writer)
    callback = IterationCheckpoint()
    callback._began, writer.size = 0.0, 2**30
    writer.add(lambda: go.wait(DEADLINE))
    assert callback._too_soon(1e9)
    go.set()
    assert writer.wait()
    assert not callback._too_soon(1e9)


def test_min_interval_does_not_skip_the_best_checkpoints(tmp_path):
    class Log(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            pl_module.log("mine", float([5, 7, 6, 8, 4, 3][trainer.current_epoch]), batch_size=1)

    options = {"monitor": "mine", "mode": "max", "save_top_k": 2, "min_interval": 3600}
    run(tmp_path, 6, Log(), **options)
    kept = [path.name for path, _ in known_checkpoints(tmp_path / "c")]
    # 5 and 7 are the first best two, 8 replaces 5; 6 and 4 are skipped; 3 is saved at the end of the run
    assert kept == ["epoch=5.ckpt", "epoch=3.ckpt", "epoch=1.ckpt"]


def test_a_negative_min_interval_is_refused():
    with pytest.raises(UserError, match=r"checkpoint\.min_interval=-1"):
        IterationCheckpoint(min_interval=-1)


def test_wait_ends_if_there_is_no_progress():
    writer, go = background.Writer(), threading.Event()
    writer.add(lambda: go.wait(DEADLINE))
    assert not writer.wait(patience=0.1)
    go.set()
    assert writer.wait()
