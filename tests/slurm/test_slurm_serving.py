"""One job with a node that trains and a node that serves: signals, resumes, and the death of a server."""

import os
import signal

import pytest
import stand_in_vllm
from deadlines import until
from slurm_cluster import alive, run
from slurm_jobs import Sent, send

from gear_lightning.parity.compare import compare

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
ENDLESS = "--trainer.max_epochs=1000000"


def serving(folder, *options: str, code: str = "") -> Sent:
    """Submit a job whose second node serves."""
    folder.mkdir()
    python = stand_in_vllm.write(folder, code)
    engine = ("--generation.engine", "gear_lightning.generation.VLLMEngine")
    return send(folder / "run", "--serve-nodes=1", f"--serve-options=--python {python}", *engine, *options, minutes=60)


@pytest.fixture(scope="module")
def jobs(cluster, tmp_path_factory):
    """All jobs, submitted at once."""
    folder, few = tmp_path_factory.mktemp("serving"), "--trainer.max_epochs=6"
    sent = {name: serving(folder / name, few) for name in ("signaled", "whole")}
    sent |= {name: serving(folder / name, ENDLESS) for name in ("canceled", "killed")}
    return sent | {"failed": serving(folder / "failed", code="echo no vLLM here >&2; exit 3")}


def test_a_job_that_is_asked_to_save_is_served_until_it_has_saved_and_resumes(jobs, row):
    job, whole = jobs["signaled"], jobs["whole"]
    job.has_rows(2)
    first = job.processes("--port")
    job.signal("USR1")  # reaches the server too
    took = job.until(lambda: job.restarts == 1, "requeue", pause=0.2)
    until(lambda: not any(map(alive, first.values())), "the end of the server")
    job.succeeds()
    whole.succeeds()
    assert whole.restarts == 0
    assert "cannot be reached" not in job.output()
    found = compare(whole.run, job.run)
    worst = max(found.worst.values())
    row("a serving node: USR1", f"came back, {found.verdict}, largest difference {worst:.1e}", took)
    assert found.verdict == "equal", found
    assert not list((job.run / "served_model").glob("gear-weights-*"))
    names = {path.name for path in (job.run / "slurm").glob("*.log")}
    assert names == {f"{job.number}_0.log", f"{job.number}_serve_0.log"}


@pytest.mark.slow
def test_a_canceled_job_saves_before_its_server_ends(jobs):
    job = jobs["canceled"]
    job.has_rows(2)
    servers = job.processes("--port")
    run("scancel", job.number)
    assert job.end() == "CANCELLED"
    until(lambda: not any(map(alive, servers.values())), "the end of the server")
    said = job.output()
    assert "SIGTERM: stopping at the next safe place" in said
    assert "to resume: run the same command with --ckpt_path last" in said
    assert "gear-lightning: error" not in said, said


def test_a_server_that_dies_ends_the_job_with_its_error(jobs, row):
    job = jobs["killed"]
    job.has_rows(2)
    (server,) = job.processes("--port").values()
    ranks = job.ranks()
    os.kill(server, signal.SIGKILL)
    assert job.end() == "FAILED"
    assert job.show()["ExitCode"] == "2:0"
    assert job.restarts == 0
    assert not any(map(alive, ranks.values()))
    said = job.output()
    assert "gear-lightning: error: the vLLM server http://127.0.1.2:" in said
    assert "Traceback" not in said
    row("a serving node: server killed", "job FAILED, one line")


@pytest.mark.slow
def test_a_server_that_does_not_start_ends_the_job(jobs):
    job = jobs["failed"]
    assert job.end() == "FAILED"
    said = job.output()
    assert "a vLLM server has ended before it answered; its log is in" in said
    assert "no vLLM here" in said
    assert job.ranks() == {}
