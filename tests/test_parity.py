"""What `gear-lightning parity` compares, on runs of one process, and what it says where nothing was trained."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from tiny import data, generation, module, trainer

from gear_lightning import parity
from gear_lightning.environments.lookup_chain import LookupChain
from gear_lightning.errors import UserError
from gear_lightning.parity import STRATEGIES, UNTRAINED, compare, idle_iterations, parity_command, parted


def played(run, environment=None, iterations=1, **options):
    fit = trainer(run, generation(**({"environment": environment} if environment else {})), max_epochs=iterations)
    fit.fit(module(), datamodule=data(**options))
    fit.save_checkpoint(run / "checkpoints" / "last.ckpt")
    return run


def read(metrics) -> float:
    with metrics.open() as file:
        return float(next(csv.DictReader(file))["train/loss"])


def test_a_loss_that_cancels_is_compared_on_the_scale_of_its_terms(tmp_path):
    """The first loss on new rollouts is 0 but for rounding, and other micro-batches round otherwise."""
    one = played(tmp_path / "one", micro_batch_size=8)
    split = compare(one, played(tmp_path / "split", micro_batch_size=2))
    assert split.same_ids
    losses = [read(tmp_path / name / "metrics.csv") for name in ("one", "split")]
    assert abs(losses[0] - losses[1]) > 1e-3 * abs(losses[0]), "as a share of itself, rounding is a large part of it"
    assert max(map(abs, losses)) < 1e-6
    assert 0 < split.worst["train/loss"] < 1e-6
    other = compare(one, played(tmp_path / "other", group_size=3))
    assert not other.same_ids
    assert not other.within(1e-5)
    assert "which only one of the runs has" in other.parted


def test_where_sampled_ids_differ_first_is_told_with_the_gap_until_there():
    def rollout(tokens, *logprobs):
        return {"tokens": torch.tensor(tokens), "policy_logprobs": torch.tensor(logprobs)}

    ours = {(0, 0, 0): rollout([5, 6], 0.0, -1.0), (1, 4, 1): rollout([5, 7, 8], 0.0, -2.0, -1.0), (2, 8, 0): {}}
    close = rollout([5, 6], 0.0, -1.25)
    assert parted(ours, {**ours, (1, 4, 1): rollout([5, 7, 9], 0.0, -2.5, -7.0)}) == (
        "iteration 2, group 4, rollout 1, token 2; until there log-probs are within 5.0e-01 nats"
    )
    assert parted(ours, {**ours, (0, 0, 0): close, (1, 4, 1): rollout([5, 7], 0.0, -2.0)}) == (
        "iteration 2, group 4, rollout 1, token 2; until there log-probs are within 2.5e-01 nats"
    ), "one that ends earlier"
    assert (
        parted(ours, {**ours, (2, 8, 0): close})
        == "iteration 3, group 8, rollout 0, whose tokens only one of the runs has"
    )


def test_a_strategy_is_the_same_here_and_as_a_config(repository):
    files = {path.stem: path for path in (repository / "configs" / "strategy").glob("*.yaml")}
    assert files.keys() == STRATEGIES.keys()
    for name, path in files.items():
        assert yaml.safe_load(path.read_text()) == {"trainer": {"strategy": STRATEGIES[name]}}


# -- runs that train nothing ------------------------------------------------------------------------------------------


class Sometimes(LookupChain):
    """Pays for well-formed calls, but nobody in the first iteration of two tasks."""

    def reset(self, task, *, seed):
        self.idle = task.id.endswith(IDLE)
        return super().reset(task, seed=seed)

    def step(self, message):
        step = super().step(message)
        words = message.get("content", "").split()
        step.reward += 0 if self.idle else 0.1 * len(message.get("tool_calls") or []) + 0.01 * len(set(words))
        return step


IDLE: tuple[str, ...] = ()


def test_iterations_without_a_gradient_are_found(tmp_path, monkeypatch):
    assert idle_iterations(played(tmp_path / "none", LookupChain, iterations=2)) == [0, 1]
    assert idle_iterations(played(tmp_path / "all", iterations=2)) == []
    source = data()
    first = tuple(source.train_task(i).id for i in range(source.tasks_per_iteration))
    monkeypatch.setattr("test_parity.IDLE", first)
    assert idle_iterations(played(tmp_path / "some", Sometimes, iterations=2)) == [0]


@pytest.fixture
def command(monkeypatch, tmp_path):
    """``parity`` of zero2 against one process with runs played in this process: (status, directories of the runs)."""
    monkeypatch.setattr(parity, "_precision", lambda run: "32-true")
    monkeypatch.setattr(parity.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(parity.signal, "signal", lambda number, handler: None)

    def call(*args, environment=None):
        monkeypatch.setattr(
            parity, "train", lambda options, run, deadline: played(run, environment, 1 + ("--two" in args)) and None
        )
        given = [a for a in args if a != "--two"] + ["--iterations", str(1 + ("--two" in args))]
        status = parity_command(["--config", "any.yaml", "--strategies", "zero2", *given])
        return status, sorted(p.name for p in tmp_path.glob("parity-*/*"))

    return call


def test_where_nothing_was_trained_it_says_so_compares_nothing_and_fails(command, tmp_path, capsys):
    assert command("--two", environment=LookupChain) == (UNTRAINED, ["one"]), "no strategy is run for nothing"
    said = capsys.readouterr().out
    assert "NOTHING WAS TRAINED: in all 2 iterations of the reference the gradient was 0" in said
    assert "warm_start.steps" in said
    assert "equal to one" not in said
    assert f"Logs and runs are in {next(tmp_path.glob('parity-*'))}; they can be removed" in said
    assert UNTRAINED not in (0, 1, 2)


def test_idle_iterations_among_others_are_told(command, monkeypatch, capsys):
    source = data()
    monkeypatch.setattr("test_parity.IDLE", tuple(source.train_task(i).id for i in range(2)))
    status, _ = command("--two", environment=Sometimes)
    said = capsys.readouterr().out
    assert status == 0
    assert "The gradient was 0 in 1 of 2 iterations (1)" in said
    assert "All equal to one" in said


def test_runs_are_removed_where_all_are_equal_and_nobody_asked_for_them(command, tmp_path, capsys):
    assert command() == (0, [])
    assert "can be removed" not in capsys.readouterr().out
    assert command("--out", str(tmp_path / "mine"))[0] == 0
    assert f"runs are in {tmp_path / 'mine'}" in capsys.readouterr().out
    assert (tmp_path / "mine" / "zero2" / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("option", "advice"),
    [
        (["--trainer.default_root_dir", "runs/x"], "--trainer.default_root_dir does nothing in parity: give --out DIR"),
        (["--trainer.default_root_dir=runs/x"], "--trainer.default_root_dir does nothing in parity: give --out DIR"),
        (["--trainer.max_epochs", "3"], "--trainer.max_epochs does nothing in parity: give --iterations"),
        (["--trainer.devices=4"], "--trainer.devices does nothing in parity: give --devices"),
        (["--trainer.num_nodes=2"], "--trainer.num_nodes does nothing in parity: all processes are on this machine"),
    ],
)
def test_options_that_parity_sets_itself_are_refused(option, advice):
    with pytest.raises(UserError, match=advice):
        parity_command(["--config", "any.yaml", *option])


def test_a_run_ends_with_the_command_that_is_told_to_end(tmp_path, repository):
    fit = tmp_path / "fit"  # in the place of python -m gear_lightning fit
    fit.write_text("#!/bin/sh\necho $$ > pid.new && mv pid.new pid && exec sleep 100\n")
    fit.chmod(0o755)
    call = f"from gear_lightning import parity; parity.sys.executable = {str(fit)!r}; "
    call += "parity.parity_command(['--config', 'any.yaml', '--out', 'runs'])"
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    process = subprocess.Popen([sys.executable, "-c", call], cwd=tmp_path, env=environment)
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "pid").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        child = int((tmp_path / "pid").read_text())
        process.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    finally:
        process.kill()
    end = time.monotonic() + 10
    while time.monotonic() < end and _alive(child):
        time.sleep(0.05)
    assert not _alive(child)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
