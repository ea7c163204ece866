"""Ranks with very different work meet again: nobody waits for a rank that has gone another way."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.group import Group, make_strategy
from distributed.pieces import Chatter, Opinions

from gear_lightning.engines import CachedEngine, Sampling

STRATEGIES = ["ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload"]
MODES = [(name, "auto") for name in STRATEGIES[:1] + STRATEGIES[2:4]] + [
    (name, mode) for name in ("fsdp", "zero3", "zero3_offload") for mode in ("gather", "stream")
]


@pytest.fixture(scope="module")
def pair():
    group = Group(2)
    yield group
    group.stop()


def rank() -> int:
    return int(os.environ["LOCAL_RANK"])


class Uneven(CachedEngine):
    """On rank 0 any token ends a turn, so that every rollout ends at its first token; on rank 1 none does."""

    def begin(self, model: Any, sampling: Sampling, stop_ids: set[int]) -> None:
        super().begin(model, sampling, set(range(1000)) if rank() == 0 else set())


class OneRankLearns(Chatter):
    """Every rollout of rank 0 is worth the same."""

    def step(self, message: dict) -> Any:
        step = super().step(message)
        step.reward = 0.5 if rank() == 0 else step.reward
        return step


class Raises(Chatter):
    """Fails in every rollout of rank 0, at once."""

    def reset(self, task: Any, *, seed: int) -> list[dict]:
        if rank() == 0:
            raise ValueError("no such world")
        return super().reset(task, seed=seed)


def train(
    run: Path, name: str, *, engine: Any = None, weights: str = "auto", logits: int | None = None, **options: Any
):
    """Two iterations with an evaluation before, between and after. Returns what this rank had to do and all metrics."""
    import lightning as L
    from laws import TalkTasks

    from gear_lightning import token_stats
    from gear_lightning.callbacks.first_evaluation import FirstEvaluation
    from gear_lightning.callbacks.generation import GenerationCallback
    from gear_lightning.data import RolloutDataModule
    from gear_lightning.module import GearModule
    from gear_lightning.rollout import Budgets
    from gear_lightning.teacher import TeacherOptions

    environment = options.pop("environment", Chatter)
    torch.manual_seed(0)
    model = GearModule(
        Opinions(),
        teacher=TeacherOptions(template=" <ref> {reference}", **options.pop("teacher", {})),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
    )
    data = RolloutDataModule(
        TalkTasks(), TalkTasks(seed=1), tasks_per_iteration=4, group_size=2, micro_batch_size=2, val_limit=3,
        zero_spread=options.pop("zero_spread", "keep"),
    )  # fmt: skip
    generation = GenerationCallback(
        environment, engine or CachedEngine(), weights=weights, budgets=Budgets(turns=3, tokens=40, context=128)
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy=make_strategy(name, **options),
        callbacks=[generation, FirstEvaluation()], default_root_dir=run, max_epochs=2, gradient_clip_val=0.1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    before, token_stats.LOGITS = token_stats.LOGITS, logits or token_stats.LOGITS
    try:
        trainer.fit(model, datamodule=data)
    finally:
        token_stats.LOGITS = before
    work = {"tokens": data.stats.tokens, "learns": sum(len(r.tokens) for g in data.groups for r in g.rollouts)}
    metrics = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith(("train/", "val/"))}
    return {**work, "spread": data.stats.groups - data.stats.zero_spread, "metrics": metrics}


def uneven(run: Path, name: str, mode: str) -> dict[str, Any]:
    return train(run, name, engine=Uneven(), weights=mode)


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_one_rank_ends_at_the_first_token_and_the_other_at_the_limit(pair, tmp_path, name, mode):
    short, long = pair.run(uneven, tmp_path, name, mode)
    assert short["tokens"] == 4
    assert long["tokens"] == 4 * 40
    assert short["metrics"] == long["metrics"]


def failing(run: Path, name: str, mode: str) -> dict[str, Any]:
    return train(run, name, environment=Raises, weights=mode)


@pytest.mark.parametrize(
    ("name", "mode"), [("ddp", "auto"), ("fsdp", "stream"), ("zero3", "stream"), ("zero3", "gather")]
)
def test_no_environment_of_one_rank_can_be_played(pair, tmp_path, name, mode):
    none, some = pair.run(failing, tmp_path, name, mode)
    assert none["tokens"] == 0 < some["tokens"]


def chunked(run: Path, name: str, logits: int | None) -> dict[str, Any]:
    return train(run, name, engine=Uneven(), logits=logits)


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_ranks_with_different_numbers_of_logits_chunks(pair, tmp_path, name):
    whole, _ = pair.run(chunked, tmp_path, name, None)
    pieces, _ = pair.run(chunked, tmp_path, name, 1000)  # a few tokens: rank 1 has many pieces, rank 0 has one
    assert pieces["metrics"] == pytest.approx(whole["metrics"], rel=1e-4, abs=1e-6)


def nothing(run: Path, name: str) -> dict[str, Any]:
    return train(run, name, environment=OneRankLearns, zero_spread="drop")


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_rank_has_nothing_to_learn_from(pair, tmp_path, name):
    idle, busy = pair.run(nothing, tmp_path, name)
    assert idle["spread"] == 0 < busy["spread"]
    assert idle["metrics"]["train/grad_norm"] == busy["metrics"]["train/grad_norm"] > 0
