"""Training on two nodes of a real cluster: agrees with one process, and says what is wrong at the start."""

import sys
import time

import pytest
from slurm.jobs import RECIPE, send, send_script

from gear_lightning.parity import compare

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]
STRATEGIES = ("ddp", "fsdp", "zero2")


@pytest.fixture(scope="module")
def jobs(cluster, tmp_path_factory):
    """The same recipe in one process and under the strategies, all at once."""
    folder = tmp_path_factory.mktemp("agree")
    sent = {"one": send(folder / "one", nodes=1)}
    for name in STRATEGIES:
        sent[name] = send(folder / name, "--config", f"configs/strategy/{name}.yaml")
    return sent


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_nodes_train_as_one_process_does(jobs, row, strategy):
    jobs["one"].succeeds()
    jobs[strategy].succeeds()
    found = compare(jobs["one"].run, jobs[strategy].run)
    worst = max(found.worst.values())
    row(f"2 nodes, {strategy}, against one process", f"same ids: {found.same_ids}, largest difference {worst:.1e}")
    assert found.within(1e-5), found
    logs = sorted(path.name for path in (jobs[strategy].run / "slurm").glob("*_*.log"))
    assert logs == [f"{jobs[strategy].number}_{rank}.log" for rank in (0, 1)], "one log for each rank"


def test_a_run_directory_that_a_node_does_not_see_is_named(cluster, tmp_path, row):
    job = send(cluster.private / "run")
    state, took = job.end(), time.monotonic() - job.started
    said = "\n".join(path.read_text() for path in (job.run / "slurm").glob("*.log"))
    assert state == "FAILED", said
    row("run directory not shared", "refused, node named", took)
