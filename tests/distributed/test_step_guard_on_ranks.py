"""All ranks skip the same optimizer steps, under every strategy."""

import math
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from distributed_runs import Chatter
from short_runs import train

STRATEGIES = ["ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload"]


class NonFiniteLoss(L.Callback):
    """Makes the loss of rank 1 non-finite in the second step, in one micro-batch only."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1 and batch_idx == 0 and os.environ["LOCAL_RANK"] == "1":
            batch.base_advantages[0] = math.nan


class Metrics(L.Callback):
    """Keeps `train/skipped_steps` of every iteration."""

    def __init__(self) -> None:
        self.skipped: list[float] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.skipped.append(float(trainer.callback_metrics["train/skipped_steps"]))


class RewardsOnlyAtFirst(Chatter):
    """Returns reward 0 after the first iteration."""

    def step(self, message: dict) -> Any:
        step = super().step(message)
        step.reward = step.reward if RewardsOnlyAtFirst.paying else 0.0
        return step

    paying = True


class StopRewards(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        RewardsOnlyAtFirst.paying = trainer.current_epoch == 0

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        RewardsOnlyAtFirst.paying = True


class Save(L.Callback):
    """Writes a checkpoint after each iteration."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint(self.run / f"{trainer.current_epoch}.ckpt")


def train_with_a_nan(run: Path, name: str) -> Any:
    metrics = Metrics()
    train(run, name, callbacks=[NonFiniteLoss(), metrics, Save(run)])
    return metrics.skipped


def last_gradient_norm(run: Path, name: str) -> Any:
    result = train(run, name, environment=RewardsOnlyAtFirst, callbacks=[StopRewards(), Save(run)])
    return result["metrics"]["train/grad_norm"]


def assert_unchanged(run: Path) -> None:
    """Assert that the second step changed no weight of the policy or the teacher, and no state of the optimizer."""
    first, second = (torch.load(run / f"{i}.ckpt", weights_only=True) for i in (0, 1))
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
        assert value.isfinite().all()
    for before, after in zip(*(list(c["optimizer_states"][0]["state"].values()) for c in (first, second)), strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(torch.as_tensor(before[k]), torch.as_tensor(after[k])) for k in before)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_non_finite_gradient_on_one_rank_is_skipped_on_all(pair, tmp_path, name):
    assert pair.run(train_with_a_nan, tmp_path, name) == [[0.0, 1.0], [0.0, 1.0]]
    assert_unchanged(tmp_path)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_step_with_zero_gradient_changes_nothing(pair, tmp_path, name):
    assert pair.run(last_gradient_norm, tmp_path, name) == [0.0, 0.0]
    assert_unchanged(tmp_path)
