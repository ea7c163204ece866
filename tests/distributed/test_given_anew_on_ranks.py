"""Hyperparameters changed at a resume take effect under every strategy, and finished runs train nothing."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from distributed_runs import Chatter, Opinions
from every_rule import TalkTasks
from lightning.pytorch.cli import ReduceLROnPlateau
from rank_group import make_strategy

from gear_lightning.callbacks.checkpoint import IterationCheckpoint
from gear_lightning.callbacks.generation import GenerationCallback
from gear_lightning.callbacks.resumption import Resumption
from gear_lightning.data import RolloutDataModule
from gear_lightning.generation.budgets import Budgets
from gear_lightning.module import GearModule
from gear_lightning.runs.checkpoints import CompleteCheckpoints
from gear_lightning.teacher import TeacherOptions


class Falling(L.Callback):
    """Logs a score that falls with every iteration."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("score", -float(trainer.current_epoch), batch_size=1)


def fit(run: Path, name: str, lr: float, schedule: Any, resume: bool = False, **options: Any) -> dict[str, Any]:
    """Train, and return the number of steps and the learning rate at the end."""
    torch.manual_seed(0)
    model = GearModule(
        Opinions(),
        teacher=TeacherOptions(template=" <ref> {reference}"),
        optimizer=lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.0),
        lr_scheduler=schedule,
    )
    data = RolloutDataModule(TalkTasks(), tasks_per_iteration=2, group_size=2, micro_batch_size=2)
    keeper = IterationCheckpoint(run / "c", "{epoch}", save_last="link")
    generation = GenerationCallback(Chatter, budgets=Budgets(turns=2, tokens=20, context=96))
    strategy = make_strategy(name)
    plugins = [] if hasattr(strategy, "shards") else [CompleteCheckpoints()]
    trainer = L.Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy=strategy, default_root_dir=run, logger=False,
        callbacks=[generation, Falling(), keeper, Resumption()], enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0, plugins=plugins, **{"max_epochs": 2, **options},
    )  # fmt: skip
    trainer.fit(model, datamodule=data, ckpt_path=run / "c" if resume else None, weights_only=True)
    return {"steps": trainer.global_step, "lr": float(trainer.optimizers[0].param_groups[0]["lr"])}


def weights(run: Path) -> torch.Tensor:
    states = torch.load(run / "c" / "last.ckpt", weights_only=True)["state_dict"]
    return torch.cat([value.flatten() for name, value in sorted(states.items()) if name.startswith("policy.")])


def counts(run: Path) -> set[float]:
    """Return the step counts in the optimizer's states."""
    states = torch.load(run / "c" / "last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    return {float(state["step"]) for state in states.values() if state["exp_avg"].any()}


def halved(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def plateau(optimizer: Any) -> Any:
    return ReduceLROnPlateau(optimizer, "score", mode="max", patience=0, factor=0.1)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero1", "zero3"])
def test_a_new_learning_rate_and_schedule_take_effect_at_a_resume(pair, tmp_path, name):
    assert pair.run(fit, tmp_path, name, 1e-3, halved) == [{"steps": 2, "lr": 2.5e-4}] * 2
    before = weights(tmp_path)
    assert pair.run(fit, tmp_path, name, 1e-3, halved, True) == [{"steps": 2, "lr": 2.5e-4}] * 2, "nothing to train"
    (one, other) = pair.run(again, tmp_path, name, 0.0, halved, 3)
    assert one == other == {"steps": 3, "lr": 0.0}
    assert torch.equal(weights(tmp_path), before), "a learning rate of 0 changes no weight"
    assert counts(tmp_path) == {3.0}
    (one, other) = pair.run(again, tmp_path, name, 1e-2, plateau, 5)
    assert one == other == {"steps": 5, "lr": pytest.approx(1e-3)}, "the score falls in the second of two iterations"


def again(run: Path, name: str, lr: float, schedule: Any, epochs: int) -> dict[str, Any]:
    return fit(run, name, lr, schedule, True, max_epochs=epochs)
