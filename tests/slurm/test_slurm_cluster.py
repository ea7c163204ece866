"""Training on two nodes of a real cluster agrees with one process, and reports errors at the start."""

import shlex
import sys
import time

import pytest
from slurm_cluster import run as run_command
from slurm_jobs import RECIPE, Sent, send, send_script

from gear_lightning.parity.compare import compare, read_rollouts

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]
STRATEGIES = ("ddp", "fsdp", "zero2")


@pytest.fixture(scope="module")
def jobs(cluster, tmp_path_factory):
    """Jobs with the same recipe in one process and under the strategies, submitted at once."""
    folder = tmp_path_factory.mktemp("agree")
    sent = {"one": send(folder / "one", nodes=1)}
    for name in STRATEGIES:
        sent[name] = send(folder / name, "--config", f"configs/strategy/{name}.yaml")
    return sent


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_nodes_train_like_one_process(jobs, row, strategy):
    jobs["one"].succeeds()
    jobs[strategy].succeeds()
    found = compare(jobs["one"].run, jobs[strategy].run)
    worst = max(found.worst.values())
    row(f"2 nodes, {strategy}, against one process", f"{found.verdict}, largest difference {worst:.1e}")
    assert found.verdict == "equal", found
    logs = sorted(path.name for path in (jobs[strategy].run / "slurm").glob("*_*.log"))
    assert logs == [f"{jobs[strategy].number}_{rank}.log" for rank in (0, 1)], "one log for each rank"


def fit(run, *options: str) -> str:
    """Return a line of a hand-written script."""
    command = [sys.executable, "-m", "gear_lightning", "fit", "--config", RECIPE, "--trainer.strategy=ddp"]
    return shlex.join([*command, f"--trainer.default_root_dir={run}", *options])


def test_a_run_directory_that_a_node_does_not_see_is_reported(cluster, tmp_path, row):
    line = f"srun --kill-on-bad-exit=1 {fit(cluster.private / 'run', '--trainer.num_nodes=2', '--trainer.devices=1')}"
    job = send_script(tmp_path / "run", line, "--nodes=2", "--ntasks-per-node=1")
    state, took, said = job.end(), time.monotonic() - job.started, job.output()
    assert state == "FAILED", said
    assert "rank 1 on n2 cannot see a file that rank 0 on n1 wrote there" in said
    assert "Traceback" not in said
    row("run directory that a node does not see", "job ends, rank and node named", took)


SIZES = ("--trainer.num_nodes=2", "--trainer.devices=1")
WRONG = {  # options of sbatch, options of fit, error message
    "nodes taken for devices": (
        ("--nodes=2", "--ntasks-per-node=1"),
        ("--trainer.devices=2",),
        "Slurm started 2 tasks on 2 nodes, and trainer.devices=2 x trainer.num_nodes=1 asks for 2 on 1",
    ),
    "no srun": (("--nodes=2", "--ntasks-per-node=1"), SIZES, "put srun before the command"),
}


@pytest.fixture(scope="module")
def refused(cluster, tmp_path_factory):
    """Jobs with wrong options, submitted at once."""
    folder, sent = tmp_path_factory.mktemp("wrong"), {}
    for name, (asked, options, _) in WRONG.items():
        run = folder / name.replace(" ", "_")
        line = fit(run, *options) if name == "no srun" else f"srun --kill-on-bad-exit=1 {fit(run, *options)}"
        sent[name] = send_script(run, line, *asked)
    return sent


@pytest.mark.parametrize("name", WRONG)
def test_a_job_that_does_not_match_its_recipe_is_refused(refused, row, name):
    job = refused[name]
    state, said = job.end(), job.output()
    assert state == "FAILED", said
    assert WRONG[name][2] in said
    assert "Traceback" not in said
    row(f"{name}: sbatch {' '.join(WRONG[name][0])}, fit {' '.join(WRONG[name][1])}", "refused at the start")


def test_each_seed_of_an_array_is_a_separate_run(cluster, tmp_path, row):
    job = send(tmp_path / "run", "--seeds=3,7", nodes=1)
    tasks = {seed: Sent(f"{job.number}_{seed}", tmp_path / "run" / f"seed_{seed}") for seed in (3, 7)}
    tasks[7].has_rows(2)
    run_command("scontrol", "requeue", tasks[7].number)  # the requeued task resumes its own run
    for task in tasks.values():
        task.succeeds()
    took = time.monotonic() - job.started
    assert [task.restarts for task in tasks.values()] == [0, 1]
    assert not list(tmp_path.glob("run/seed_*/earlier-*")), "the requeued task must resume its own run"
    left, right = (read_rollouts(task.run) for task in tasks.values())
    assert left.keys() == right.keys()
    assert any(left[k].keys() != right[k].keys() for k in left) or any(
        len(left[k]["tokens"]) != len(right[k]["tokens"]) for k in left if left[k]
    ), "two seeds gave the same rollouts"
    again = send(tmp_path / "again", "--seed_everything=7", "--data.seed=7", nodes=1)
    again.succeeds()
    found = compare(again.run, tasks[7].run)
    same = found.verdict, max(found.worst.values())
    assert same == ("equal", 0.0), "a seed of the array must equal a run with that seed, requeued or not"
    row("array of 2 seeds, one of them requeued", "equal to the seed's own run, bit for bit", took)
