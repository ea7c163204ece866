"""A run that is asked to stop ends soon, with one complete checkpoint and a distinct exit status."""

import json
import os
import re
import stat

import pytest
from quickstart_runs import metrics, strike
from restart_runs import play, said

from gear_lightning.commands.status import status_of
from gear_lightning.runs.checkpoints import newest_complete


def test_an_interrupted_last_evaluation_is_repeated_at_a_resume(tmp_path):
    """Lightning alone would not start the loop if no iteration is left."""
    run = tmp_path / "run"
    options = ("--trainer.check_val_every_n_epoch", "3", "--first_evaluation.enabled", "false")
    life, again = strike(run, "evaluation", 2, "SIGTERM", *options, "--data.eval_batch_size", "2")
    assert play(tmp_path / "first", [life]) == [[75]]
    last = metrics(run)[-1]
    assert last["step"] == 3
    assert "val/success" not in last, "a mean over a part of the tasks was logged"
    assert status_of(run)["state"] == "stopped"
    assert play(tmp_path / "second", [again]) == [[0]]
    assert "val/success" in metrics(run)[-1]
    assert "train/entropy" in metrics(run)[-1]
    found = status_of(run)
    assert (found["state"], found["starts"], found["ends"]) == ("finished", 2, ["stopped", "finished"])


def test_a_stop_writes_one_checkpoint_and_later_ones_replace_it(tmp_path):
    run = tmp_path / "run"
    life, again = strike(run, "tool call", 20, "SIGUSR2")
    play(tmp_path / "lives", [life])
    assert newest_complete(run / "checkpoints").name == "stopped.ckpt"
    assert "SIGUSR2: stopping at the next safe place" in said(tmp_path / "lives", 0)
    assert "to resume: run the same command with --ckpt_path last" in said(tmp_path / "lives", 0)
    assert not (run / "crash").exists(), "a stop is not a crash"
    assert play(tmp_path / "lives", [again]) == [[0]]
    assert not (run / "checkpoints" / "stopped.ckpt").exists()


def test_a_slow_stop_leaves_no_crash_report(tmp_path):
    """A report is written in case the process is killed while it waits, and removed after the stop."""
    run = tmp_path / "run"
    life, _ = strike(run, "tool call", 2, "SIGTERM", "--generation.environment", "send_signal_at.Slow")
    assert play(tmp_path / "lives", [life]) == [[75]]
    assert not list((run / "crash").glob("*")), "a stop is not a crash"


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A fake ``scontrol`` that records its arguments."""
    asked = tmp_path / "asked"
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\nexit ${{REFUSE:-0}}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")  # so that Lightning does not use SLURM's ranks
    return asked


@pytest.mark.parametrize(
    ("number", "options", "asked"),
    [("SIGUSR1", (), "requeue 41\n"), ("SIGTERM", (), None), ("SIGUSR1", ("--preemption.requeue", "false"), None)],
)
def test_the_usr_signals_requeue_the_job(tmp_path, scontrol, number, options, asked):
    life, _ = strike(tmp_path / "run", "update", 2, number, *options)
    assert play(tmp_path / "lives", [life]) == [[75]]
    assert (scontrol.read_text() if scontrol.exists() else None) == asked


def test_an_array_task_requeues_only_itself(tmp_path, scontrol, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    life, _ = strike(tmp_path / "run", "rollout", 2, "SIGUSR1")
    assert play(tmp_path / "lives", [life]) == [[75]]
    assert scontrol.read_text() == "requeue 40_3\n"


def test_a_refused_requeue_is_reported_and_the_checkpoint_is_written(tmp_path, scontrol, monkeypatch):
    monkeypatch.setenv("REFUSE", "1")
    life, _ = strike(tmp_path / "run", "update", 2, "SIGUSR1")
    assert play(tmp_path / "lives", [life]) == [[75]]
    assert "SLURM does not put job 41 back into the queue" in said(tmp_path / "lives", 0)
    assert newest_complete(tmp_path / "run" / "checkpoints") is not None


def test_a_run_without_checkpoints_reports_that_nothing_was_saved(tmp_path):
    options = ("--trainer.enable_checkpointing", "false")
    life, _ = strike(tmp_path / "run", "update", 2, "SIGTERM", *options)
    assert play(tmp_path / "lives", [life]) == [[143]]
    assert "nothing was saved" in said(tmp_path / "lives", 0)


def test_the_second_ctrl_c_stops_at_once(tmp_path):
    options = ["--trainer.callbacks+=send_signal_at.Strike", "--trainer.callbacks.place", "tool call"]
    options += ["--trainer.callbacks.count", "3", "--trainer.callbacks.number", "SIGINT"]
    options += ["--trainer.callbacks.name", "again"]
    life, _ = strike(
        tmp_path / "run", "tool call", 2, "SIGINT", *options, "--generation.environment", "send_signal_at.Deaf"
    )
    assert play(tmp_path / "lives", [life]) == [[130]]
    assert "Ctrl-C again to stop at once" in said(tmp_path / "lives", 0)


@pytest.mark.parametrize("place", ["tool call", "update", "evaluation"])
def test_a_signal_to_one_process_stops_all(tmp_path, place):
    run = tmp_path / "run"
    life, again = strike(run, place, 2, "SIGUSR1", "--trainer.strategy", "ddp", processes=2, rank=1)
    assert play(tmp_path / "lives", [life]) == [[75, 75]]
    assert play(tmp_path / "lives", [again]) == [[0, 0]]


def test_the_other_processes_of_a_killed_process_write_reports(tmp_path):
    run = tmp_path / "run"
    life, _ = strike(run, "update", 2, "SIGKILL", "--trainer.strategy", "ddp", processes=2, rank=1)
    ((first, second),) = play(tmp_path / "lives", [life])
    assert second == -9
    assert first not in (0, 75)
    assert said(tmp_path / "lives", 0).rstrip().endswith("to resume: run the same command with --ckpt_path last")
    report = (run / "crash" / "rank_0.txt").read_text()
    assert "rank 0 of 2" in report
    assert "iteration 0, after 0 optimizer steps" in report
    assert "phase: update in iteration 0" in report
    assert re.search(r"rank 1: \w+", report), "the last known phase of the killed process is missing"
    found = status_of(run)
    assert found["state"] == "failed"
    assert list(found["crashes"]) == [str(run / "crash" / "rank_0.txt")]
    json.dumps(found)
