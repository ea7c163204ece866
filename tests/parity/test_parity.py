"""Comparisons of `gear-lightning parity` on runs of one process, and its report if nothing was trained."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import lightning as L
import pytest
import torch
import yaml
from deadlines import seconds, until
from tiny_runs import data, generation, module, trainer

from gear_lightning.callbacks.step_recorder import StepRecorder
from gear_lightning.commands import parity
from gear_lightning.commands.parity import STRATEGIES, UNCOMPARED, idle_iterations, parity_command
from gear_lightning.environments.lookup_chain import LookupChain
from gear_lightning.errors import UserError
from gear_lightning.module import GearModule
from gear_lightning.parity.compare import compare, tolerance_of


def played(run, environment=None, iterations=1, callbacks=(), make=module, precision="32-true", **options):
    fit = trainer(
        run,
        generation(**({"environment": environment} if environment else {})),
        *callbacks,
        StepRecorder(),
        max_epochs=iterations,
        precision=precision,
    )
    fit.fit(make(), datamodule=data(**options))
    fit.save_checkpoint(run / "checkpoints" / "last.ckpt")
    return run


def read(metrics) -> float:
    with metrics.open() as file:
        return float(next(csv.DictReader(file))["train/loss"])


def test_a_loss_that_cancels_is_compared_relative_to_its_terms(tmp_path):
    """The first loss on new rollouts is 0 except for rounding, which depends on the micro-batches."""
    one = played(tmp_path / "one", micro_batch_size=8)
    split = compare(one, played(tmp_path / "split", micro_batch_size=2))
    losses = [read(tmp_path / name / "metrics.csv") for name in ("one", "split")]
    assert abs(losses[0] - losses[1]) > 1e-3 * abs(losses[0]), "relative to the loss itself, rounding is large"
    assert max(map(abs, losses)) < 1e-6
    assert 0 < split.worst["train/loss"] < 1e-6
    assert split.verdict == "equal", split
    other = compare(one, played(tmp_path / "other", group_size=3))
    assert not other.equal
    assert "is in only one of the runs" in other.faults[0]


# -- errors are detected, and different rounding is equal --------------------------------------------------------------

ITERATIONS = 2


def trained(weight_decay=0.05, lr=1e-3, kind=GearModule, **options):
    """Return a module whose optimizer has weight decay."""
    made = module(optimizer=lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=weight_decay), **options)
    made.__class__ = kind
    return made


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return played(tmp_path_factory.mktemp("reference") / "run", iterations=ITERATIONS, make=trained)


class Scaled(GearModule):
    """Every gradient is 1 % too large, as with a wrong count in a mean over ranks."""

    factor, batches = 1.01, range(8)

    def training_step(self, batch, batch_idx):
        out = super().training_step(batch, batch_idx)
        return {**out, "loss": out["loss"] * (self.factor if batch_idx in self.batches else 1.0)}


class CountedTwice(Scaled):
    """A rank's micro-batch is counted twice."""

    factor, batches = 2.0, (1,)


class FarTeacher(GearModule):
    """The teacher does not get its privileged text."""

    def _freeze(self, batch, policy):
        return super()._freeze(replace(batch, teacher_tokens=batch.teacher_tokens.flip(0)), policy)


class BatchCredit(GearModule):
    """A credit rule that depends on the other rollouts of its micro-batch."""

    def _freeze(self, batch, policy):
        old, teacher, credit = super()._freeze(batch, policy)
        scale = 1 + torch.arange(len(batch.index))[:, None] / 10
        return old, teacher, replace(credit, token_advantages=credit.token_advantages * scale)


class Half(L.Callback):
    """The second half of a tensor is not updated, as if a rank's shard was gathered before its update."""

    def __init__(self, name="policy.model.layers.1.mlp.up_proj.weight"):
        self.name = name

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before = pl_module.get_parameter(self.name).detach().clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            rows = len(self.before) // 2
            with torch.no_grad():
                pl_module.get_parameter(self.name)[rows:] = self.before[rows:]


class NotReduced(L.Callback):
    """One small tensor keeps the gradient of only one of two ranks."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pl_module.get_parameter("policy.model.layers.0.input_layernorm.weight").grad.mul_(0.5)


class Forgets(L.Callback):
    """The optimizer's state is lost after the first iteration, as in a resume that does not restore it."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.optimizers[0].state.clear()


class NoUpdate(L.Callback):
    """The teacher is not updated."""

    def on_train_start(self, trainer, pl_module):
        pl_module.teacher.update = lambda policy, step: None


class OtherRate(L.Callback):
    """A learning rate that is 1 % higher in the second step."""

    def on_train_epoch_start(self, trainer, pl_module):
        trainer.optimizers[0].param_groups[0]["lr"] = 1e-3 if trainer.current_epoch != 1 else 1.01e-3


class OtherDraws(L.Callback):
    """Half of the rollouts are sampled with other random numbers, as if a rank had its own seed."""

    def on_train_start(self, trainer, pl_module):
        generate = trainer.datamodule.generator.generate

        def drawn(jobs, stage):
            half = len(jobs) // 2
            made = generate([*jobs[:half], *((task, (*seed, 1)) for task, seed in jobs[half:])], stage)
            return made

        trainer.datamodule.generator.generate = drawn


FAULTS = {
    "a gradient scale that is 1 % off": ({"make": partial(trained, kind=Scaled)}, "gradient differs by 1.0e-02"),
    "a micro-batch that counts twice": ({"make": partial(trained, kind=CountedTwice)}, "the gradient differs by"),
    "a gradient that is not reduced": (
        {"callbacks": [NotReduced()]},
        "that of policy.model.layers.0.input_layernorm.weight by",
    ),
    "a part that is not updated": ({"callbacks": [Half()]}, "layers.1.mlp.up_proj.weight has an update"),
    "no weight decay": (
        {"make": partial(trained, weight_decay=0.0)},
        "has an update that its gradient does not explain",
    ),
    "a lost optimizer state": ({"callbacks": [Forgets()]}, "step 2: policy"),
    "a teacher that stays": ({"callbacks": [NoUpdate()]}, "does not follow the policy as in the reference"),
    "another learning rate": ({"callbacks": [OtherRate()]}, "learning rate 0.001 in the reference and"),
    "other random numbers": ({"callbacks": [OtherDraws()]}, "more often than rounding explains"),
    "credit that depends on the batch": ({"make": partial(trained, kind=BatchCredit)}, "credit differs in 6 of 8"),
    "another teacher's view": ({"make": partial(trained, kind=FarTeacher)}, "iteration 1: divergence differs by"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_real_difference_is_detected(reference, tmp_path, fault):
    options, told = FAULTS[fault]
    found = compare(reference, played(tmp_path / "run", iterations=ITERATIONS, **{"make": trained, **options}))
    assert found.verdict == "NOT EQUAL", found
    assert told in found.faults[0]


def test_a_checkpoint_with_other_weights_is_detected(reference, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    path = run / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    state["state_dict"]["policy.model.layers.0.mlp.up_proj.weight"][-1] += 1e-6
    torch.save(state, path)
    assert compare(reference, run).faults == [
        "the run's last.ckpt holds other values of policy.model.layers.0.mlp.up_proj.weight than the run had"
    ]


class OneDraw(L.Callback):
    """In one iteration, one rollout is sampled with another random number, as for a token at a boundary."""

    def __init__(self, iteration):
        self.iteration = iteration

    def on_train_start(self, trainer, pl_module):
        generate = trainer.datamodule.generator.generate

        def drawn(jobs, stage):
            if trainer.current_epoch == self.iteration:
                jobs = [*jobs[:-1], (jobs[-1][0], (*jobs[-1][1], 1))]
            return generate(jobs, stage)

        trainer.datamodule.generator.generate = drawn


class OneCredit(GearModule):
    """One rollout's credit differs, as for an anchor at its threshold."""

    def _freeze(self, batch, policy):
        old, teacher, credit = super()._freeze(batch, policy)
        credit.token_advantages[batch.index == 0] *= 1.5
        return old, teacher, credit


def test_runs_are_compared_up_to_a_decision_that_rounding_changes(reference, tmp_path):
    late = compare(reference, played(tmp_path / "late", iterations=2, make=trained, callbacks=[OneDraw(1)]))
    assert (late.verdict, late.iterations, late.steps, late.faults) == ("equal to 1", 1, 1, [])
    assert late.parted.startswith("sampled ids differ in 1 of 8 rollouts, first at iteration 2, group ")
    both = played(tmp_path / "both", iterations=2, make=partial(trained, kind=Scaled), callbacks=[OneDraw(1)])
    assert "the gradient differs" in compare(reference, both).faults[0], "earlier errors are detected"
    early = compare(reference, played(tmp_path / "early", make=trained, callbacks=[OneDraw(0)]))
    assert (early.verdict, early.iterations, early.faults) == ("NOT COMPARED", 0, [])
    credit = compare(reference, played(tmp_path / "credit", make=partial(trained, kind=OneCredit)))
    assert (credit.verdict, credit.faults) == ("NOT COMPARED", [])
    assert (
        credit.parted == "credit differs in 1 of 8 rollouts, first in iteration 1, group 0, rollout 0, at a threshold"
    )


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_wrong_scale_is_detected_despite_low_precision_rounding(tmp_path, precision):
    low = partial(played, make=trained, precision=precision)
    one, tolerance = low(tmp_path / "one", micro_batch_size=8), tolerance_of(precision)
    equal = compare(one, low(tmp_path / "split", micro_batch_size=2), tolerance)
    assert equal.verdict == "equal", equal
    assert 1e-4 < equal.worst["gradient"] < tolerance.share / 2
    assert equal.worst["norm"] < tolerance.norm / 2
    wrong = compare(one, low(tmp_path / "wrong", micro_batch_size=2, make=partial(trained, kind=Scaled)), tolerance)
    assert "the gradient's norm differs by" in wrong.faults[0]


class Rounds(L.Callback):
    """Another processor: outputs of a linear layer differ by some units in the last place, and so do the gradients of
    every weight, in units of the tensor's largest element."""

    def __init__(self, size=1e-6, **kinds):
        self.size, self.random = size, torch.Generator().manual_seed(7)

    def noise(self, value):
        return torch.randn(value.shape, generator=self.random) * self.size

    def on_train_start(self, trainer, pl_module):
        for part in pl_module.policy.modules():
            if isinstance(part, torch.nn.Linear):
                part.register_forward_hook(lambda part, given, out: out * (1 + self.noise(out)))
        for parameter in pl_module.policy.parameters():
            parameter.register_hook(lambda grad: grad + self.noise(grad) * (grad != 0) * grad.abs().max())


class Keyless(GearModule):
    """A model with a bias whose gradient is only rounding, such as the bias of attention keys."""

    def configure_model(self):
        super().configure_model()
        for layer in self.policy.model.layers:
            layer.self_attn.k_proj.bias = torch.nn.Parameter(torch.zeros(layer.self_attn.k_proj.out_features))
        for layer in self.teacher.model.model.layers:
            layer.self_attn.k_proj.bias = torch.nn.Parameter(torch.zeros(layer.self_attn.k_proj.out_features), False)


def largest_share(one, other) -> float:
    """Return the largest difference of the policy's tensors relative to their largest element, the former criterion."""
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (one, other)]
    pairs = [(v, states[1][n]) for n, v in states[0].items() if n.startswith("policy.") and v.is_floating_point()]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs if a.abs().max() > 0)


@pytest.mark.parametrize("make", [trained, partial(trained, kind=Keyless)], ids=["plain", "noise alone"])
def test_another_processor_is_not_a_difference(reference, tmp_path, make):
    one = reference if make is trained else played(tmp_path / "one", iterations=ITERATIONS, make=make)
    other = played(tmp_path / "other", iterations=ITERATIONS, make=make, callbacks=[Rounds()])
    found = compare(one, other)
    assert found.verdict == "equal", found
    assert found.steps == ITERATIONS
    assert largest_share(one, other) > 1e-4, "weights whose gradient is only rounding change by whole steps"
    assert 1e-7 < found.worst["gradient"] < 1e-3


def test_strategies_of_parity_equal_those_of_the_configs(repository):
    files = {path.stem: path for path in (repository / "configs" / "strategy").glob("*.yaml")}
    assert files.keys() == STRATEGIES.keys()
    for name, path in files.items():
        assert yaml.safe_load(path.read_text()) == {"trainer": {"strategy": STRATEGIES[name]}}


# -- runs without optimizer steps -------------------------------------------------------------------------------------


class Sometimes(LookupChain):
    """Rewards well-formed calls, except in the first iteration of two tasks."""

    def reset(self, task, *, seed):
        self.idle = task.id.endswith(IDLE)
        return super().reset(task, seed=seed)

    def step(self, message):
        step = super().step(message)
        words = message.get("content", "").split()
        step.reward += 0 if self.idle else 0.1 * len(message.get("tool_calls") or []) + 0.01 * len(set(words))
        return step


IDLE: tuple[str, ...] = ()


def test_iterations_without_a_gradient_are_detected(tmp_path, monkeypatch):
    assert idle_iterations(played(tmp_path / "none", LookupChain, iterations=2)) == [0, 1]
    assert idle_iterations(played(tmp_path / "all", iterations=2)) == []
    source = data()
    first = tuple(source.train_task(i).id for i in range(source.tasks_per_iteration))
    monkeypatch.setattr("test_parity.IDLE", first)
    assert idle_iterations(played(tmp_path / "some", Sometimes, iterations=2)) == [0]


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Return a function: ``parity`` of zero2 against one process, run in this process -> (status, run directories)."""
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


def test_parity_fails_without_a_comparison_if_nothing_was_trained(command, tmp_path, capsys):
    assert command("--two", environment=LookupChain) == (UNCOMPARED, ["one"]), "no strategy runs without need"
    said = capsys.readouterr().out
    assert "NOTHING WAS TRAINED: in all 2 iterations of the reference the gradient was 0" in said
    assert "warm_start.steps" in said
    assert "equal to one" not in said
    assert f"Logs and runs are in {next(tmp_path.glob('parity-*'))}; they can be removed" in said
    assert UNCOMPARED not in (0, 1, 2)


def test_iterations_without_steps_are_reported(command, monkeypatch, capsys):
    source = data()
    monkeypatch.setattr("test_parity.IDLE", tuple(source.train_task(i).id for i in range(2)))
    status, _ = command("--two", environment=Sometimes)
    said = capsys.readouterr().out
    assert status == 0
    assert "The gradient was 0 in 1 of 2 iterations (1)" in said
    assert "All equal to one" in said


def test_runs_are_removed_if_all_are_equal_and_no_output_was_requested(command, tmp_path, capsys):
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
def test_options_that_parity_sets_itself_are_rejected(option, advice):
    with pytest.raises(UserError, match=advice):
        parity_command(["--config", "any.yaml", *option])


def test_a_run_ends_when_its_command_receives_a_signal(tmp_path, repository):
    fit = tmp_path / "fit"  # replaces python -m gear_lightning fit
    fit.write_text("#!/bin/sh\necho $$ > pid.new && mv pid.new pid && exec sleep 10000\n")
    fit.chmod(0o755)
    call = f"from gear_lightning.commands import parity; parity.sys.executable = {str(fit)!r}; "
    call += "parity.parity_command(['--config', 'any.yaml', '--out', 'runs'])"
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    process = subprocess.Popen([sys.executable, "-c", call], cwd=tmp_path, env=environment)
    try:
        until((tmp_path / "pid").exists, "the start of a run")
        child = int((tmp_path / "pid").read_text())
        process.terminate()
        assert process.wait(timeout=seconds(60)) == 128 + signal.SIGTERM
    finally:
        process.kill()
    until(lambda: not _alive(child), "the end of the run")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
