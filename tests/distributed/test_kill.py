"""A run that is killed without warning and restarted with the same command equals an uninterrupted run."""

import os
import random
import signal
import subprocess
import time

import pytest
from deadlines import until
from quickstart_runs import DEADLINE, RECORD, assert_same_steps, checkpoint, command_line, metrics

from gear_lightning.runs.records import read_records

ITERATIONS = 8


def play(run, repository, *options: str, kills: list[tuple[int, float]] = ()) -> None:
    """Restart the run until it finishes; kill it ``delay`` seconds after its metrics file has ``rows`` rows."""
    command, environment = command_line(run, "--trainer.max_epochs", str(ITERATIONS), "--ckpt_path", "last", *options)
    for rows, delay in [*kills, (None, 0.0)]:
        process = subprocess.Popen(
            command, cwd=repository, env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if rows is None:
            _, err = process.communicate(timeout=DEADLINE)
            assert process.returncode == 0, err[-3000:]
            return

        def far_enough(process=process, rows=rows) -> bool:
            assert process.poll() is None, f"ended before it had {rows} rows: {process.stderr.read()[-3000:]}"
            return has_rows(run, rows)

        until(far_enough, f"{rows} rows", pause=0.005)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def has_rows(run, count: int) -> bool:
    try:
        return len(metrics(run)) >= count
    except FileNotFoundError:  # not written yet, or just moved away by a start without checkpoint
        return False


def ledger(run) -> list[tuple[int, int, int, str]]:
    return sorted(
        (r["iteration"], r["group_id"], r["rollout"], str(r["messages"])) for x in read_records(run) for r in x.rollouts
    )


# one process: test_kill_anywhere.py, too
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_run_equals_an_uninterrupted_one(tmp_path, repository, processes):
    options = [RECORD, "--trainer.devices", str(processes)] + ["--trainer.strategy", "ddp"] * (processes > 1)
    rng, kills = random.Random(processes), (1, 3, 5) if processes == 1 else (2, 5)
    play(tmp_path / "whole", repository, *options)
    play(tmp_path / "killed", repository, *options, kills=[(rows, rng.uniform(0, 0.4)) for rows in kills])
    assert ledger(tmp_path / "killed") == ledger(tmp_path / "whole"), "tasks or rollouts differ"
    left, right = metrics(tmp_path / "whole"), metrics(tmp_path / "killed")
    assert [row["step"] for row in right] == [row["step"] for row in left] == list(range(ITERATIONS + 1))
    # DDP rebuilds its gradient buckets after a process's first step: equal except for rounding
    tolerance = {"rel": 0, "abs": 0} if processes == 1 else {"rel": 1e-3, "abs": 1e-5}
    for a, b in zip(left, right, strict=True):
        assert b == pytest.approx(a, **tolerance)
    one, other = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "killed")
    if processes > 1:
        assert_same_steps(tmp_path / "whole", tmp_path / "killed", ITERATIONS)
    else:
        assert all(value.equal(other["state_dict"][name]) for name, value in one["state_dict"].items())


def test_a_terminated_run_exits_with_status_75_and_can_be_resumed(tmp_path, repository):
    command, environment = command_line(tmp_path, "--trainer.max_epochs", "500", "--ckpt_path", "last")
    process = subprocess.Popen(command, cwd=repository, env=environment, stderr=subprocess.PIPE, text=True)
    until(lambda: has_rows(tmp_path, 3), "three rows")
    process.terminate()
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 75, err[-2000:]
    assert "to resume: run the same command with --ckpt_path last" in err
    done = int(metrics(tmp_path)[-1]["step"])
    play(tmp_path, repository, "--trainer.max_epochs", str(done + 2))
    assert [row["step"] for row in metrics(tmp_path)][-1] == done + 2
