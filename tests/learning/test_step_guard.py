"""Steps with a non-finite gradient or without a gradient change nothing; no checkpoint has non-finite numbers."""

import csv
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny_runs import AnyCall, data, generation, module, trainer

from gear_lightning.callbacks.health import Health
from gear_lightning.errors import UserError
from gear_lightning.runs.finite import all_finite


def numbers(model: Any, run: L.Trainer) -> list[torch.Tensor]:
    """Return the weights of policy and teacher, and the optimizer's state."""
    states = [v for state in run.optimizers[0].state.values() for v in state.values()]
    return [p.detach().clone() for p in (*model.policy.parameters(), *model.teacher.model.parameters(), *states)]


class Watch(L.Callback):
    """Records all numbers before the first step, and after every step."""

    def __init__(self) -> None:
        self.kept: list[list[torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.steps_after(batch_idx):
            self.kept.append(numbers(pl_module, trainer))

    def moved(self, step: int) -> bool:
        """Return whether any number changed in the step (counted from 1)."""
        before, after = self.kept[step - 1], self.kept[step]
        return len(before) != len(after) or any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


class Spoil(L.Callback):
    """Sets one gradient of some steps to a value, in one of Lightning's hooks."""

    def __init__(self, hook: str, value: float, *steps: int):
        setattr(self, hook, self.spoil)
        self.value, self.steps = value, steps

    def spoil(self, trainer, pl_module, *_):
        if trainer.global_step in self.steps:
            next(p for p in pl_module.policy.parameters() if p.grad is not None).grad.view(-1)[3] = self.value


class Lost(L.Callback):
    """Makes the loss of some steps non-finite, with an advantage of NaN."""

    def __init__(self, *steps: int):
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.steps:
            batch.base_advantages[0] = math.nan


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


SPOILED = [
    Spoil("on_after_backward", math.inf, 2),
    Spoil("on_before_optimizer_step", math.nan, 2),
    Spoil("on_after_backward", -math.inf, 2),
    Lost(2),
]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("spoil", SPOILED, ids=lambda s: type(s).__name__ + str(getattr(s, "value", "")))
def test_a_step_with_a_non_finite_gradient_is_skipped_and_counted(tmp_path, spoil, clip):
    watch, model = Watch(), module(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1))
    run = trainer(tmp_path, generation(), spoil, watch, max_epochs=5, gradient_clip_val=clip)
    with pytest.warns(UserWarning, match="gradient of optimizer step 3 is not finite: the step is skipped"):
        run.fit(model, datamodule=data())
    assert [watch.moved(step) for step in range(1, 5)] == [True, False, True, True]
    assert all_finite(watch.kept[-1])
    assert [float(row["train/skipped_steps"]) for row in rows(tmp_path)] == [0, 0, 1, 0, 0]
    norms = [row["train/grad_norm"] for row in rows(tmp_path)]
    assert norms[2] == ""
    assert all(0 < float(norms[i]) < math.inf for i in (0, 1, 3, 4))


class PaysAtFirst(AnyCall):
    """Gives rewards of 0 after a number of rollouts."""

    played, paid = 0, 16

    def step(self, message):
        step = super().step(message)
        step.reward = step.reward if PaysAtFirst.played < self.paid else 0.0
        return step

    def close(self):
        PaysAtFirst.played += 1


@pytest.mark.parametrize("zero_spread", ["keep", "drop"])
def test_a_step_without_a_signal_changes_nothing(tmp_path, zero_spread, monkeypatch):
    """Momentum and weight decay would change the weights."""
    monkeypatch.setattr(PaysAtFirst, "played", 0)
    watch, model = Watch(), module(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1))
    run = trainer(tmp_path, generation(environment=PaysAtFirst), watch, max_epochs=4)
    run.fit(model, datamodule=data(zero_spread=zero_spread))
    assert [float(row["train/zero_spread_groups"]) for row in rows(tmp_path)] == [0, 0, 1, 1]
    assert [watch.moved(step) for step in range(1, 4)] == [True, False, False]
    assert [float(row["train/grad_norm"]) for row in rows(tmp_path)[2:]] == [0, 0]
    assert [float(row["train/skipped_steps"]) for row in rows(tmp_path)] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (
            "on_train_epoch_start",
            "log-probs are not finite while it samples: its weights are not finite.*ckpt_path",
        ),
        ("on_train_batch_start", "policy has weights that are not finite after 1 optimizer steps.*ckpt_path"),
    ],
)
def test_non_finite_weights_stop_the_run_at_once(tmp_path, hook, message):
    class Break(L.Callback):
        def __init__(self) -> None:
            setattr(self, hook, self.spoil)

        def spoil(self, trainer, pl_module, *_):
            if trainer.current_epoch == 1:
                with torch.no_grad():
                    pl_module.policy.lm_head.weight[0, 0] = math.nan

    run = trainer(tmp_path, generation(), Break(), max_epochs=9)
    with pytest.raises(UserError, match=message):
        run.fit(module(), datamodule=data())
    assert run.global_step == 1


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_finite_finds_a_single_non_finite_number(value, dtype):
    parts = [torch.zeros(0), torch.arange(5), torch.zeros(7, 9, dtype=dtype)]
    assert all_finite(parts)
    parts[2][6, 8] = value
    assert not all_finite(parts)


class Unlike(L.Callback):
    """Makes a log-prob of the sampler NaN."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch.sampler_logprobs[0][batch.action_mask[0].nonzero()[0]] = math.nan


def test_a_gap_that_is_no_number_is_the_largest_one(tmp_path):
    """torchmetrics would leave it out."""
    trainer(tmp_path, generation(), Unlike(), max_epochs=1).fit(module(), datamodule=data())
    assert float(rows(tmp_path)[-1]["train/sampler_gap_max"]) == math.inf


def test_steps_in_a_row_count_over_restarts_and_a_run_that_ends_on_them_says_so(tmp_path):
    lost, model = Lost(1, 2, 3), module()
    run = trainer(tmp_path, generation(), Health(stop_after_skipped=3), lost, max_epochs=3)
    with pytest.warns(UserWarning, match="gradients of the last 2 optimizer steps of this run were not finite"):
        run.fit(model, datamodule=data())
    run.save_checkpoint(tmp_path / "mid.ckpt")
    resumed = trainer(tmp_path / "resumed", generation(), Health(stop_after_skipped=3), lost, max_epochs=5)
    with pytest.raises(UserError, match="gradients of 3 optimizer steps in a row"):
        resumed.fit(module(), datamodule=data(), ckpt_path=tmp_path / "mid.ckpt", weights_only=True)
    assert resumed.global_step <= 4


def test_a_run_that_skipped_steps_have_ended_goes_on_once_gradients_are_finite(tmp_path):
    """Its count is that of the checkpoint until its own first step, several micro-batches later."""
    run = trainer(tmp_path, generation(), Health(stop_after_skipped=2), Lost(1, 2), max_epochs=4)
    with pytest.raises(UserError, match="gradients of 2 optimizer steps in a row"):
        run.fit(module(), datamodule=data(micro_batch_size=2))
    run.save_checkpoint(tmp_path / "end.ckpt")
    resumed = trainer(tmp_path / "resumed", generation(), Health(stop_after_skipped=2), max_epochs=4)
    model = module()
    resumed.fit(model, datamodule=data(micro_batch_size=2), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert resumed.global_step == 4
    assert model.skipped_in_a_row == 0
