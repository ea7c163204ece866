"""Hyperparameters at a resume: the configured values apply, and without changes the resume is exact."""

from typing import Any

import lightning as L
import pytest
import torch
from resume_runs import Scores, fit, folder_of, weights
from tiny_runs import module
from torch.optim import lr_scheduler as schedules

from gear_lightning.errors import UserError
from gear_lightning.learning.hyperparameters import FreshOptimizer, take_up_given

SCHEDULES = {
    "StepLR": lambda o: schedules.StepLR(o, 3),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 5]),
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda step: 0.95),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, total_iters=7),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 10),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 1e-5, 1e-3, step_size_up=4, cycle_momentum=False),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 1e-2, total_steps=30),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=3), schedules.CosineAnnealingLR(o, 10)], [3]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, 4), schedules.ExponentialLR(o, 0.9)]
    ),
    "none": None,
}
STEPS = 6


def adamw(**options: Any):
    return lambda parameters: torch.optim.AdamW(parameters, **{"lr": 1e-3, **options})


def train(optimizer: Any, schedule: Any, steps: int, checkpoint: dict | None = None) -> tuple[list, dict, list[float]]:
    """Take steps on fixed gradients as Lightning does. Return parameters, a checkpoint, and the rates of the steps."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(2))]
    fresh = FreshOptimizer(optimizer, schedule, parameters)
    made, done = optimizer(parameters), 0
    scheduler = None if schedule is None else schedule(made)
    if checkpoint is not None:
        take_up_given(checkpoint, fresh)
        for parameter, value in zip(parameters, checkpoint["parameters"], strict=True):
            parameter.data.copy_(value)
        made.load_state_dict(checkpoint["optimizer_states"][0])
        for state in checkpoint["lr_schedulers"]:
            scheduler.load_state_dict(state)
        done = checkpoint["global_step"]
    rates = []
    for step in range(done, done + steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        rates.append(float(made.param_groups[0]["lr"]))
        made.step()
        if scheduler is not None:
            scheduler.step()
    state = {
        "optimizer_states": [made.state_dict()],
        "lr_schedulers": [] if scheduler is None else [scheduler.state_dict()],
        "global_step": done + steps,
        "hyperparameters": fresh.given,
        "parameters": [p.detach().clone() for p in parameters],
    }
    return parameters, state, rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_unchanged_schedule_resumes_exactly(name):
    schedule = SCHEDULES[name]
    whole, _, rates = train(adamw(), schedule, 2 * STEPS)
    _, half, before = train(adamw(), schedule, STEPS)
    assert take_up_given(half, FreshOptimizer(adamw(), schedule, half["parameters"])) == []
    resumed, _, after = train(adamw(), schedule, STEPS, half)
    assert rates == before + after
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("before", ["StepLR", "OneCycleLR", "none"])
def test_a_new_schedule_continues_at_the_step_count_and_keeps_moments(name, before):
    _, half, _ = train(adamw(), SCHEDULES[before], STEPS)
    moments = [{k: v.clone() for k, v in state.items()} for state in half["optimizer_states"][0]["state"].values()]
    _, _, rates = train(adamw(lr=1e-4, weight_decay=0.5), SCHEDULES[name], STEPS + 2)
    fresh = FreshOptimizer(adamw(lr=1e-4, weight_decay=0.5), SCHEDULES[name], half["parameters"])
    changes = take_up_given(half, fresh)
    assert changes[:2] == ["lr 0.001 -> 0.0001", "weight_decay 0.01 -> 0.5"]
    assert changes[2:] == ([f"lr_scheduler {before} -> {name}"] if before != name else [])
    for state, kept in zip(half["optimizer_states"][0]["state"].values(), moments, strict=True):
        assert all(torch.equal(state[key], value) for key, value in kept.items())
    assert half["optimizer_states"][0]["param_groups"][0]["weight_decay"] == 0.5
    _, _, after = train(adamw(lr=1e-4, weight_decay=0.5), SCHEDULES[name], 2, half)
    assert after == rates[STEPS:]


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (lambda o: schedules.StepLR(o, 3), lambda o: schedules.StepLR(o, 2), "lr_scheduler StepLR: step_size 3 -> 2"),
        (lambda o: schedules.CyclicLR(o, 1e-5, 1e-3, cycle_momentum=False),
         lambda o: schedules.CyclicLR(o, 1e-6, 1e-3, cycle_momentum=False), "CyclicLR: base_lrs [1e-05] -> [1e-06]"),
        (lambda o: schedules.OneCycleLR(o, 1e-2, total_steps=30),
         lambda o: schedules.OneCycleLR(o, 2e-2, total_steps=30), "OneCycleLR: max_lr 0.01 -> 0.02"),
        (lambda o: schedules.LambdaLR(o, lambda step: 0.9**step),
         lambda o: schedules.LambdaLR(o, lambda step: 0.8**step), "LambdaLR: lr_lambdas"),
    ],
)  # fmt: skip
def test_a_changed_argument_of_a_schedule_is_reported(before, now, told):
    _, half, _ = train(adamw(), before, STEPS)
    assert told in take_up_given(half, FreshOptimizer(adamw(), now, half["parameters"]))[0]


def test_a_checkpoint_of_an_earlier_version_is_compared_as_far_as_possible():
    for name in ("StepLR", "OneCycleLR", "none"):
        _, half, _ = train(adamw(), SCHEDULES[name], STEPS)
        del half["hyperparameters"]
        assert take_up_given(half, FreshOptimizer(adamw(), SCHEDULES[name], half["parameters"])) == []
        changed = take_up_given(half, FreshOptimizer(adamw(eps=1e-6), SCHEDULES[name], half["parameters"]))
        assert changed == ["eps 1e-08 -> 1e-06"]


def test_an_incompatible_optimizer_state_is_an_error():
    _, half, _ = train(adamw(), None, STEPS)
    short = lambda o: schedules.OneCycleLR(o, 1e-2, total_steps=3)  # noqa: E731
    with pytest.raises(UserError, match=r"OneCycleLR cannot continue after 6 steps: .* total steps is 3"):
        take_up_given(half, FreshOptimizer(adamw(), short, half["parameters"]))
    two = lambda p: torch.optim.AdamW([{"params": p[:1]}, {"params": p[1:], "weight_decay": 0}])  # noqa: E731
    with pytest.raises(UserError, match=r"groups of \[2\] parameters, but model.optimizer creates groups of \[1, 1\]"):
        take_up_given(half, FreshOptimizer(two, None, half["parameters"]))
    with pytest.raises(UserError, match=r"cannot be created: Invalid learning rate: -1"):
        FreshOptimizer(adamw(lr=-1), None, half["parameters"])


def test_a_learning_rate_changed_at_a_resume_is_used_and_reported(tmp_path, capsys):
    made = fit(tmp_path, model=module(optimizer=adamw(lr=1e-2)), max_epochs=2)
    moments = {k: v["exp_avg"].clone() for k, v in made.optimizers[0].state_dict()["state"].items()}
    before = weights(made)
    idle = adamw(lr=0.0, weight_decay=0.0)
    still = fit(tmp_path, resume=folder_of(tmp_path), model=module(optimizer=idle), max_epochs=3)
    assert "changed hyperparameters: lr 0.01 -> 0; weight_decay 0.01 -> 0" in capsys.readouterr().err
    assert torch.equal(weights(still), before), "a rate of 0 changes no weight"
    state = still.optimizers[0].state_dict()["state"]
    assert all(float(state[k]["step"]) == 3 and not torch.equal(state[k]["exp_avg"], v) for k, v in moments.items())
    fit(tmp_path, resume=folder_of(tmp_path), model=module(optimizer=idle), max_epochs=4)
    assert "changed hyperparameters" not in capsys.readouterr().err


# -- ReduceLROnPlateau --------------------------------------------------------------------------------------------


def plateau(monitor: str = "score", mode: str = "max", **options: Any):
    from lightning.pytorch.cli import ReduceLROnPlateau

    return lambda o: ReduceLROnPlateau(o, monitor, mode=mode, **{"factor": 0.1, "patience": 0, **options})


def rates(
    *scores: float | None, every: int = 1, run: Any, resume_after: int | None = None, **options: Any
) -> list[float]:
    """Return the learning rate after each iteration."""

    class Rates(L.Callback):
        found: list[float] = []  # noqa: RUF012

        def on_train_epoch_start(self, trainer, pl_module):
            self.found.append(trainer.optimizers[0].param_groups[0]["lr"])

    Rates.found = []
    given = {"limit_val_batches": 1.0, "check_val_every_n_epoch": every}
    parts = [len(scores) + 1] if resume_after is None else [resume_after, len(scores) + 1]
    for i, most in enumerate(parts):
        model = module(optimizer=adamw(lr=1.0), lr_scheduler=plateau())
        fit(run, Scores(*scores), Rates(), model=model, max_epochs=most, resume=folder_of(run) if i else None, **given)
    return [float(f"{rate:g}") for rate in Rates.found[1:]]


def test_a_plateau_lowers_the_rate_if_the_metric_does_not_rise(tmp_path):
    assert rates(1, 2, 2, 3, 1, run=tmp_path) == [1, 1, 0.1, 0.1, 0.01]


def test_a_plateau_counts_each_evaluation_once(tmp_path):
    assert rates(None, 2, None, 3, None, 1, every=2, run=tmp_path) == [1, 1, 1, 1, 1, 0.1]


@pytest.mark.parametrize("after", [2, 3])
def test_a_plateau_resumes_exactly(tmp_path, after):
    assert rates(1, 2, 2, 3, 1, run=tmp_path, resume_after=after) == [1, 1, 0.1, 0.1, 0.01]


def test_a_plateau_without_its_metric_ends_the_run_after_saving(tmp_path):
    model = module(lr_scheduler=plateau("scores"))
    with pytest.raises(UserError, match=r"lr_scheduler.monitor=scores: there is no such metric in this run"):
        fit(tmp_path, Scores(1.0, training=True), model=model)
    assert torch.load(folder_of(tmp_path) / "last.ckpt", weights_only=True)["global_step"] == 1


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            lambda o: schedules.ReduceLROnPlateau(o),
            "lightning.pytorch.cli.ReduceLROnPlateau --model.lr_scheduler.monitor",
        ),
        (plateau("val/success", "min"), "lr_scheduler.mode=min treats the smallest val/success"),
    ],
)
def test_a_plateau_without_a_metric_or_with_the_wrong_mode_is_rejected(tmp_path, schedule, message):
    with pytest.raises(UserError, match=message):
        module(lr_scheduler=schedule).followed_metric()
    with pytest.raises(UserError, match=message):
        fit(tmp_path, model=module(lr_scheduler=schedule))


def test_changed_arguments_of_a_plateau_apply_and_its_best_value_is_kept():
    _, half, _ = train(adamw(), None, STEPS)
    fresh = FreshOptimizer(adamw(), plateau(patience=1), half["parameters"])
    fresh.scheduler.step(5.0)
    group = {**half["optimizer_states"][0]["param_groups"][0], "lr": 1e-4}  # as set by the plateau
    half["optimizer_states"][0] = {**half["optimizer_states"][0], "param_groups": [group]}
    half |= {"lr_schedulers": [fresh.scheduler.state_dict()], "hyperparameters": fresh.given}
    same = FreshOptimizer(adamw(), plateau(patience=1), half["parameters"])
    assert take_up_given(half, same) == []
    new = FreshOptimizer(adamw(), plateau(patience=7), half["parameters"])
    assert take_up_given(half, new) == ["lr_scheduler ReduceLROnPlateau: patience 1 -> 7"]
    state = half["lr_schedulers"][0]
    assert (state["patience"], state["best"]) == (7, 5.0)
    assert half["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-4
