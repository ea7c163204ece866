"""Faults of a job on a cluster: a node goes down, a process is killed, a process is stopped."""

import os
import signal
import time

import pytest
from deadlines import seconds, until
from slurm_cluster import alive, run
from slurm_jobs import send

from gear_lightning.parity.compare import compare

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
DDP = ("--config", "configs/strategy/ddp.yaml")
ENDLESS = (*DDP, "--trainer.max_epochs=1000000")


@pytest.fixture(scope="module")
def whole(cluster, tmp_path_factory):
    """An undisturbed run, on the node that stays up."""
    folder = tmp_path_factory.mktemp("whole")
    return send(folder / "run", *DDP, "--trainer.max_epochs=8", "--sbatch=--nodelist=n1", nodes=1, tasks=2)


@pytest.fixture(scope="module")
def killed(whole, tmp_path_factory):
    """An endless job whose process of rank 1 was killed, and the seconds until both processes had ended."""
    job = send(tmp_path_factory.mktemp("killed") / "run", *ENDLESS)
    job.has_rows(2)
    ranks = job.ranks()
    assert ranks.keys() == {0, 1}
    os.kill(ranks[1], signal.SIGKILL)
    begun = time.monotonic()
    until(lambda: not any(map(alive, ranks.values())), "the end of both processes", pause=0.1)
    return job, time.monotonic() - begun


def test_a_killed_process_ends_the_others(killed, row):
    job, took = killed
    assert job.end() == "FAILED"
    assert job.restarts == 0, "a crashed job must not be requeued"
    row("process of rank 1 killed", "the other one has ended, job FAILED", took)


def test_the_crash_report_names_phase_and_progress(killed):
    job, _ = killed
    job.end()
    report = (job.run / "crash" / "rank_0.txt").read_text()
    for word in ("rank 0", "step", "phase", "rollout"):
        assert word in report.lower(), report


def test_a_job_whose_node_goes_down_resumes_from_its_last_checkpoint(whole, tmp_path, row):
    job = send(tmp_path / "run", *DDP, "--trainer.max_epochs=8")
    job.has_rows(3)
    begun, rows = time.monotonic(), job.rows()
    run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    job.comes_back(1)
    back = time.monotonic() - begun
    whole.succeeds()
    job.succeeds()
    assert whole.restarts == 0
    found = compare(whole.run, job.run)
    worst = max(found.worst.values())
    row(f"node down after {rows} rows", f"requeued, {found.verdict}, largest difference {worst:.1e}", back)
    assert found.verdict == "equal", found


def test_a_stopped_process_ends_the_job_at_the_deadline(cluster, tmp_path, row):
    job = send(tmp_path / "run", *ENDLESS, f"--timeout={seconds(15):.0f}")
    job.has_rows(2)
    ranks = job.ranks()
    os.kill(ranks[1], signal.SIGSTOP)
    begun = time.monotonic()
    assert job.end() == "FAILED"
    took = time.monotonic() - begun
    assert not any(map(alive, ranks.values())), "the stopped process must end too"
    report = (job.run / "crash" / "rank_0.txt").read_text()
    assert "no process has made progress" in report
    assert "rank 1: " in report
    row(f"process of rank 1 stopped, --timeout {seconds(15):.0f}", "watchdog ends the job, both processes gone", took)
