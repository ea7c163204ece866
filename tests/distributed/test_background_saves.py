"""A run that receives a signal while a checkpoint is being written in the background."""

import os

from quickstart_runs import strike
from restart_runs import play, said

from gear_lightning.runs.checkpoints import damage, known_checkpoints, newest_complete

HELD = ("--trainer.callbacks+=send_signal_at.HeldDisk",)


def names(run) -> list[str]:
    return [path.name for path, _ in known_checkpoints(run / "checkpoints")]


def test_a_kill_keeps_the_previous_checkpoint_and_a_restart_removes_the_partial_file(tmp_path):
    run = tmp_path / "run"
    killed, again = strike(run, "rollouts end", 3, "SIGKILL", *HELD)  # in the third iteration
    assert play(tmp_path / "first", [killed]) == [[-9]]
    folder = run / "checkpoints"
    assert names(run) == ["iteration=00000.ckpt"]
    assert damage(folder / "iteration=00000.ckpt") is None
    assert os.readlink(folder / "last.ckpt") == "iteration=00000.ckpt"
    assert (folder / "iteration=00001.ckpt.partial").exists()
    assert play(tmp_path / "second", [again]) == [[0]]
    assert names(run)[:2] == ["iteration=00002.ckpt", "iteration=00001.ckpt"]
    assert not list(folder.glob("*.partial"))


def test_a_stop_finishes_the_current_file_and_then_writes_its_own(tmp_path):
    """The process that does not write receives the signal."""
    run = tmp_path / "run"
    options = (*HELD, "--trainer.strategy", "ddp")
    stopped, again = strike(run, "rollouts end", 3, "SIGTERM", *options, processes=2, rank=1)
    assert play(tmp_path / "lives", [stopped]) == [[75, 75]]
    assert names(run) == ["stopped.ckpt", "iteration=00001.ckpt", "iteration=00000.ckpt"]
    assert newest_complete(run / "checkpoints").name == "stopped.ckpt"
    assert damage(run / "checkpoints" / "iteration=00001.ckpt") is None
    assert os.readlink(run / "checkpoints" / "last.ckpt") == "stopped.ckpt"
    assert "to resume: run the same command with --ckpt_path last" in said(tmp_path / "lives", 0)
    assert play(tmp_path / "again", [again]) == [[0, 0]]
    assert names(run)[:2] == ["iteration=00002.ckpt", "iteration=00001.ckpt"]
