"""A job that is asked to stop saves one checkpoint, is requeued, and ends like an undisturbed job."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from slurm_cluster import run
from slurm_jobs import Sent, send

from gear_lightning.parity.compare import compare

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
STRATEGIES = ("ddp", "fsdp")
SIGNALS = 5  # per strategy
PHASES = ("rollouts", "evaluation", "checkpoint write")


@pytest.fixture(scope="module")
def tight(cluster, tmp_path_factory):
    """Runs without pauses between steps, and for each strategy an undisturbed run to compare with."""
    folder = tmp_path_factory.mktemp("tight")
    options = (f"--trainer.max_epochs={3 * SIGNALS}", "--checkpoint.save_top_k=1", "--checkpoint.every_n_epochs=1000")
    return {
        f"{name}{whole}": send(folder / f"{name}{whole}", "--config", f"configs/strategy/{name}.yaml", *options)
        for whole in ("", "_whole")
        for name in STRATEGIES
    }


def test_repeated_stop_signals_in_a_tight_loop(tight, row):
    rng, told, took = random.Random(0), dict.fromkeys(STRATEGIES, 0), []
    wanted = dict.fromkeys(STRATEGIES, 1)
    begun: dict[str, float] = {}
    while any(told[name] < SIGNALS or name in begun for name in STRATEGIES):
        for name in STRATEGIES:
            job = tight[name]
            if name in begun:  # the signal was sent; wait for the requeue
                if job.restarts == told[name]:
                    took.append(time.monotonic() - begun.pop(name))
                    wanted[name] = job.rows() + 1
                else:
                    assert job.state not in ("FAILED", "COMPLETED", "CANCELLED"), job.output()
            elif told[name] < SIGNALS and job.rows() >= wanted[name]:
                time.sleep(rng.uniform(0, 0.2))
                job.signal("USR1")
                told[name] += 1
                begun[name] = time.monotonic()
        time.sleep(0.02)
    for name in STRATEGIES:
        # compare with the same strategy: another one sums in another order, which may change a token in a tie
        job, whole = tight[name], tight[f"{name}_whole"]
        whole.succeeds()
        job.succeeds()
        assert job.restarts == SIGNALS
        found = compare(whole.run, job.run)
        worst = max(found.worst.values())
        row(
            f"USR1 in a tight loop, {name}, {SIGNALS} times",
            f"{job.restarts} of {SIGNALS} came back, {found.verdict}, largest difference {worst:.1e}",
            max(took),
        )
        assert found.verdict == "equal", found


@pytest.fixture(scope="module")
def phases(cluster, tmp_path_factory):
    """Jobs that stay long in one phase each and are asked to stop in it, with the seconds until the requeue; and an
    undisturbed job."""
    folder, sent = tmp_path_factory.mktemp("phases"), {}
    options = [
        "--config=configs/strategy/ddp.yaml", "--trainer.max_epochs=4", "--trainer.limit_val_batches=1.0",
        "--data.val_tasks=long_phases.HeldOut", "--data.val_limit=4", "--trainer.check_val_every_n_epoch=2",
        "--first_evaluation.enabled=false", "--generation.environment=long_phases.Lingering",
        "--trainer.callbacks+=[{class_path: long_phases.LingeringSave}]",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for phase in (*PHASES, "none"):
            run = folder / phase.replace(" ", "_")
            patch.setenv("PHASE", phase)
            patch.setenv("STARTED", f"{run}.started")
            sent[phase] = send(run, *options)
    took = {}
    with ThreadPoolExecutor(len(PHASES)) as pool:
        for phase, seconds in zip(PHASES, pool.map(lambda phase: _stop(sent[phase], phase), PHASES), strict=True):
            took[phase] = seconds
    return sent, took


def _stop(job: Sent, phase: str) -> float:
    job.until(job.run.with_name(f"{job.run.name}.started").exists, f"start of {phase}", pause=0.01)
    time.sleep(0.3)
    begun = time.monotonic()
    job.signal("USR1")
    job.until(lambda: job.restarts == 1, "requeue")
    return time.monotonic() - begun


@pytest.mark.parametrize("phase", PHASES)
def test_a_stop_signal_in_the_middle_of_a_phase(phases, row, phase):
    jobs, took = phases
    jobs["none"].succeeds()
    jobs[phase].succeeds()
    found = compare(jobs["none"].run, jobs[phase].run)
    worst = max(found.worst.values())
    result = f"came back, {found.verdict}, largest difference {worst:.1e}"
    row(f"USR1 during {phase}", result, took[phase])
    assert jobs[phase].restarts == 1
    assert found.verdict == "equal", found


@pytest.mark.slow
def test_slurm_signals_a_job_before_its_time_limit(cluster, tmp_path, row):
    # Slurm checks every half minute, and may send the signal up to a minute early
    job = send(tmp_path / "run", "--trainer.max_epochs=1000000", nodes=1, minutes=2, before=30)
    job.has_rows(1)
    took = job.until(lambda: job.restarts >= 1, "requeue by --signal", pause=0.5)
    rows = job.rows()
    job.until(lambda: job.rows() > rows, "more rows after the requeue")
    run("scancel", job.number)
    row("USR1 by sbatch --signal", f"came back, {rows} rows and going on", took)
