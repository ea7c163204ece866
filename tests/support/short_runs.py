"""A short run, inside a process of a `Group` or in this process."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from distributed_runs import Chatter, Opinions
from every_rule import TalkTasks
from rank_group import make_strategy

from gear_lightning.callbacks.first_evaluation import FirstEvaluation
from gear_lightning.callbacks.generation import GenerationCallback
from gear_lightning.callbacks.step_recorder import StepRecorder
from gear_lightning.data import RolloutDataModule
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.cached_engine import CachedEngine
from gear_lightning.learning import token_stats
from gear_lightning.module import GearModule
from gear_lightning.teacher import TeacherOptions


def train(
    run: Path, name: Any, *, engine: Any = None, weights: str = "auto", logits: int | None = None, **options: Any
):
    """Train for two iterations, with evaluations before, between and after. Return this rank's work and all metrics.

    ``name`` is the name of a strategy, or a strategy. With ``only_evaluate``, return the metrics of an evaluation.
    ``resume`` is a checkpoint to resume from. With ``whole``, the final checkpoint can be resumed from, and there are
    no evaluations.
    """
    only_evaluate, precision = options.pop("only_evaluate", False), options.pop("precision", "32-true")
    environment, callbacks = options.pop("environment", Chatter), options.pop("callbacks", ())
    lr, resume = options.pop("lr", 1e-3), options.pop("resume", None)
    epochs, whole = options.pop("max_epochs", 2), options.pop("whole", False)
    torch.manual_seed(0)
    model = GearModule(
        options.pop("policy", Opinions()),
        teacher=TeacherOptions(template=" <ref> {reference}", **options.pop("teacher", {})),
        optimizer=lambda p: torch.optim.AdamW(p, lr=lr),
        **options.pop("model", {}),
    )
    data = options.pop("data", RolloutDataModule)(
        TalkTasks(), TalkTasks(seed=1), tasks_per_iteration=4, group_size=2, micro_batch_size=2, val_limit=3,
        zero_spread=options.pop("zero_spread", "keep"),
    )  # fmt: skip
    generation = GenerationCallback(
        environment, engine or CachedEngine(), weights=weights, budgets=Budgets(turns=3, tokens=40, context=128),
        ahead=options.pop("ahead", 0),
    )  # fmt: skip
    strategy = name if not isinstance(name, str) else "auto" if name == "one" else make_strategy(name, **options)
    trainer = L.Trainer(
        accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", "1")), strategy=strategy, default_root_dir=run,
        callbacks=[generation, *([] if whole else [FirstEvaluation()]), *callbacks, StepRecorder()], max_epochs=epochs,
        gradient_clip_val=0.1, limit_val_batches=0 if whole else None,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0, log_every_n_steps=1, precision=precision,
    )  # fmt: skip
    if only_evaluate:
        return trainer.validate(model, datamodule=data, verbose=False)
    before, token_stats.LOGITS = token_stats.LOGITS, logits or token_stats.LOGITS
    try:
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    finally:
        token_stats.LOGITS = before
    trainer.save_checkpoint(run / "end.ckpt", weights_only=not whole)
    work = {"tokens": data.stats.tokens}
    metrics = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith(("train/", "val/"))}
    return {**work, "spread": data.stats.groups - data.stats.zero_spread, "metrics": metrics}
