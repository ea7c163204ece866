"""A run that is repeatedly killed at random places and restarted equals an uninterrupted run."""

import random
from pathlib import Path

import pytest
from quickstart_runs import ITERATIONS, assert_same_steps, checkpoint, lives, metrics
from restart_runs import play, said
from send_signal_at import PLACES

from gear_lightning.runs.records import read_records

# maximum occurrence of a place at which to send the signal, within a few iterations
OCCURRENCES = {"rollout": 12, "tool call": 20, "teacher pass": 6, "update": 6, "update end": 6}
OF_RANK_ZERO = ("checkpoint write", "checkpoint written", "metrics write")


def ledger(run: Path) -> list[tuple[int, int, int, str, str]]:
    return sorted(
        (r["iteration"], r["group_id"], r["rollout"], r["task_id"], str(r["messages"]))
        for record in read_records(run)
        for r in record.rollouts
    )


def random_signals(seed: int, number: int, processes: int) -> list[tuple[str, int, str, int]]:
    """Return signals at every place once, then at random places: (place, occurrence, signal, rank)."""
    rng = random.Random(seed)
    places = [*PLACES, *rng.choices(PLACES, k=max(0, number - len(PLACES)))]
    rng.shuffle(places)
    signals = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGUSR1")
    return [
        (
            place,
            rng.randint(1, OCCURRENCES.get(place, 1)),
            rng.choice(signals),
            0 if place in OF_RANK_ZERO else rng.randrange(processes),
        )
        for place in places[:number]
    ]


def check(folder: Path, seed: int, number: int, processes: int, *options: str) -> None:
    assert play(folder / "one", lives(folder / "whole", [], processes, *options))[-1] == [0] * processes
    drawn = random_signals(seed, number, processes)
    ended = play(folder / "many", lives(folder / "struck", drawn, processes, *options))
    history = list(zip(drawn, ended, strict=False))
    assert ended[-1] == [0] * processes, (history, said(folder / "many", len(ended) - 1)[-2000:])
    assert len(ended) > number / 2, f"the run finished before it received enough signals: {history}"
    whole, struck = folder / "whole", folder / "struck"
    assert ledger(struck) == ledger(whole), history
    left, right = metrics(whole), metrics(struck)
    assert [row["step"] for row in right] == [row["step"] for row in left] == list(range(ITERATIONS + 1)), history
    # DDP rebuilds its gradient buckets after a process's first step: equal except for rounding
    tolerance = {"rel": 0, "abs": 0} if processes == 1 else {"rel": 1e-3, "abs": 1e-5}
    for a, b in zip(left, right, strict=True):
        assert b == pytest.approx(a, **tolerance), history
    if processes > 1:
        assert_same_steps(whole, struck, ITERATIONS)
        return
    mine, theirs = checkpoint(whole)["state_dict"], checkpoint(struck)["state_dict"]
    assert all(value.equal(theirs[name]) for name, value in mine.items())


def test_one_process_killed_at_twenty_four_places(tmp_path):
    check(tmp_path, 1, 24, 1)


@pytest.mark.slow
def test_one_of_two_processes_killed_at_twelve_places(tmp_path):
    check(tmp_path, 2, 12, 2, "--trainer.strategy", "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 9))
def test_one_or_two_processes_killed_at_forty_places(tmp_path, seed):
    check(tmp_path, seed, 40, 1 + seed % 2, *(["--trainer.strategy", "ddp"] if seed % 2 else []))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_one_of_two_sharded_processes_killed_at_twelve_places(tmp_path, strategy):
    check(tmp_path, 10, 12, 2, "--config", f"configs/strategy/{strategy}.yaml")
