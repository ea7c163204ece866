"""Every strategy trains like one process, resumes exactly, and writes the same checkpoints."""

import csv
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from deadlines import until
from distributed_runs import (
    DEADLINE,
    PYTHON,
    ROOT,
    environment,
    finish,
    fit,
    fit_command,
    side_by_side,
    start,
    strategy,
)

from gear_lightning.commands import parity
from gear_lightning.commands.export import export_command
from gear_lightning.parity.compare import compare, read_rollouts

DISTRIBUTED = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
STRATEGIES = [*DISTRIBUTED, "zero3_offload"]
TOLERANCE = 1e-3  # for averages of gradients, relative to the largest; rounding is 1e-6, errors are of order 1
ITERATIONS, STOP = 5, 2
RESUMED = [  # (strategy of the first iterations, strategy of the others)
    *((name, name) for name in DISTRIBUTED),
    ("one", "fsdp"), ("one", "zero1"), ("zero3", "one"), ("fsdp", "zero3"), ("zero2", "fsdp"), ("zero1", "ddp"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name, value in environment().items():
            patch.setenv(name, value)
        yield tmp_path_factory.mktemp("strategies")


def train(run: Path, *options: str) -> Path:
    failed = parity.train(["--config", "tests/distributed/run.yaml", *options], run, DEADLINE)
    assert failed is None, (failed, (run / "log.txt").read_text()[-3000:])
    return run


@pytest.fixture(scope="module")
def runs(folder):
    """Map the name of a strategy to its run."""
    return side_by_side({name: partial(train, folder / name, *strategy(name)) for name in ["one", *STRATEGIES]})


@pytest.fixture(scope="module")
def resumed(folder, runs):
    """Map (before, after) to the run that stopped under one strategy and resumed under another."""

    def resume(before: str, after: str) -> Path:
        run = folder / f"{before}-{after}"
        cut(runs[before], run)
        return train(run, *strategy(after), "--ckpt_path=last")

    return side_by_side({pair: partial(resume, *pair) for pair in RESUMED})


def cut(whole: Path, run: Path) -> None:
    """Copy the state of a run after `STOP` iterations."""
    for name in (f"iteration={STOP - 1:05d}.ckpt", f"iteration={STOP - 1:05d}.ckpt.json"):
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        shutil.copy(whole / "checkpoints" / name, run / "checkpoints" / name)
    (run / "rollouts").mkdir()
    for path in (whole / "rollouts").glob("iter_*"):
        if int(path.name[5:11]) < STOP:
            shutil.copy(path, run / "rollouts")
    (run / "steps").mkdir()
    for path in (whole / "steps").glob("step_*"):
        if int(path.stem[5:]) <= STOP:
            shutil.copy(path, run / "steps")
    lines = (whole / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(lines[: STOP + 1]))


def checkpoint(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def column(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def share(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    assert one.shape == other.shape
    assert one.dtype == other.dtype
    scale = float(one.abs().max()) if one.numel() else 0.0
    return float((one.double() - other.double()).abs().max()) / (scale or 1.0) if one.numel() else 0.0


def assert_same(one, other, where: str = "") -> None:
    """Assert that nested data is equal, with tensors within the tolerance."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert share(one, other) <= TOLERANCE, where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}.{i}")
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=TOLERANCE), where
    else:
        assert one == other, where


def test_the_reference_run_covers_the_interesting_cases(runs):
    """It has turns of very different lengths, clipped gradients, many micro-batches, and non-uniform credit."""
    rollouts = read_rollouts(runs["one"])
    lengths = [int(tensors["action_mask"].sum()) for tensors in rollouts.values() if tensors]
    assert len(rollouts) == ITERATIONS * 16
    assert min(lengths) < 10 < 40 < max(lengths)
    assert min(column(runs["one"], "train/grad_norm")) > 10 * 0.1
    assert min(column(runs["one"], "credit/weight_deviation")) > 0.05
    assert min(column(runs["one"], "credit/segments_per_rollout")) > 0.3
    start, end = (
        torch.load(runs["one"] / "checkpoints" / f"iteration={i:05d}.ckpt", weights_only=True)["state_dict"]
        for i in (0, ITERATIONS - 1)
    )
    for whose in ("policy.", "teacher."):
        moved = [share(v, end[n]) for n, v in start.items() if n.startswith(whose) and v.is_floating_point()]
        assert min(moved) > 1e-4, "nothing was learned"


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_trains_like_one_process(runs, name):
    found = compare(runs["one"], runs[name])
    assert found.verdict == "equal", found
    assert found.steps == ITERATIONS
    assert {"gradient", "norm", "update", "teacher", "divergence", "weights", "train/loss"} < found.worst.keys()
    assert max(found.worst.values()) < 1e-3, found.worst
    assert sorted({rank for _, rank, _ in records(runs[name])}) == [0, 1], "one process generated all rollouts"


MEANS = [
    "train/reward", "train/turns", "train/response_tokens", "train/entropy", "teacher/student_gap",
    "credit/weight_deviation", "credit/segments_per_rollout", "rollouts/empty_response", "rollouts/truncated",
]  # fmt: skip


@pytest.mark.parametrize("name", STRATEGIES)
def test_means_over_uneven_ranks_equal_those_of_one_process(runs, name):
    for metric in MEANS:
        one, other = column(runs["one"], metric), column(runs[name], metric)
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6), metric


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_noise_floor_is_equal_on_all_ranks_and_in_all_iterations(runs, name):
    from gear_lightning.lens.recredit import recorded_noise
    from gear_lightning.runs.records import read_records

    found = {recorded_noise(record) for record in read_records(runs[name])}
    assert len(found) == 1
    (one,) = {recorded_noise(record) for record in read_records(runs["one"])}
    assert 0.2 < found.pop().log_ratio / one.log_ratio < 5
    assert 0 < one.log_ratio < 1e-4


def records(run: Path):
    from gear_lightning.runs.records import record_files

    return record_files(run)


@pytest.mark.parametrize("pair", RESUMED, ids="-".join)
def test_a_run_resumes_under_the_same_and_under_another_strategy(runs, resumed, pair):
    found = compare(runs["one"], resumed[pair])
    assert found.verdict == "equal", found
    assert column(resumed[pair], "step") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_optimizer_and_its_schedule_are_saved_like_those_of_plain_torch(runs, name):
    one, other = checkpoint(runs["one"]), checkpoint(runs[name])
    assert_same(one["optimizer_states"], other["optimizer_states"])
    assert_same(one["lr_schedulers"], other["lr_schedulers"])
    assert other["lr_schedulers"][0]["_last_lr"] == [pytest.approx(1e-3 * 0.3**2)]
    assert other["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(1e-3 * 0.3**2)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_checkpoint_exports_to_the_same_model_directory(runs, tmp_path, name):
    from safetensors.torch import load_file

    for which in ("one", name):
        assert export_command([str(runs[which] / "checkpoints" / "last.ckpt"), str(tmp_path / which)]) == 0
    one, other = (tmp_path / which for which in ("one", name))
    files = {path.name for path in one.iterdir()}
    assert files == {path.name for path in other.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    for file in files - {"model.safetensors", "README.md"}:  # the model card names the run
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    kept = checkpoint(runs[name])["state_dict"]
    for key, value in load_file(other / "model.safetensors").items():
        assert torch.equal(value, kept[f"policy.{key}"]), key
    assert load_file(one / "model.safetensors").keys() == load_file(other / "model.safetensors").keys()


def test_checkpoints_of_sharded_runs_have_the_keys_of_those_of_one_process(runs):
    one = checkpoint(runs["one"])
    for name in STRATEGIES:
        other = checkpoint(runs[name])
        assert one["state_dict"].keys() == other["state_dict"].keys(), name
        assert one.keys() == other.keys(), name
        assert one["identity"] == other["identity"], name


def test_a_killed_run_resumes_exactly(runs, folder):
    """SIGKILL of all processes during the third iteration or a later one."""
    run = folder / "killed"
    command = fit_command(run, *strategy("zero3"), "--ckpt_path=last", python=PYTHON)
    process = start(command, run / "log.txt")

    def far_enough() -> bool:
        assert process.poll() is None, (run / "log.txt").read_text()[-3000:]
        try:
            return len(column(run, "step")) >= STOP
        except FileNotFoundError:
            return False

    until(far_enough, "iterations before the kill", pause=0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = len(column(run, "step"))
    assert done < ITERATIONS, "the run finished before it was killed"
    assert finish(start(command, run / "log.txt"), run / "log.txt") == 0
    found = compare(runs["one"], run)
    assert found.verdict == "equal", found
    assert column(run, "step") == [1, 2, 3, 4, 5]


def test_fsdp_on_one_process_equals_the_run_without_a_strategy(runs, folder):
    """FSDP2 on a single device, such as a single GPU."""
    run = folder / "alone"
    fit(run, *strategy("fsdp", processes=1))
    assert compare(runs["one"], run).verdict == "equal"
