"""Components for short test runs: a tiny policy and its data, generation and trainer."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch

from gear_lightning.callbacks.generation import GenerationCallback
from gear_lightning.callbacks.rollout_recorder import RolloutRecorder
from gear_lightning.callbacks.throughput import Throughput
from gear_lightning.credit import GEAR, CreditAssigner
from gear_lightning.data import RolloutDataModule
from gear_lightning.environments.base import Step
from gear_lightning.environments.lookup_chain import LookupChain, LookupChainTasks
from gear_lightning.generation.budgets import Budgets
from gear_lightning.models import FromScratch
from gear_lightning.module import GearModule
from gear_lightning.runs.loggers import MetricsFile
from gear_lightning.teacher import TeacherOptions

WORDS = "gear_lightning.environments.lookup_chain.WORDS"


def source(**options: Any) -> FromScratch:
    """Return a policy with a few thousand parameters."""
    return FromScratch(WORDS, **{"hidden_size": 32, "layers": 2, "heads": 2, "max_length": 128, **options})


def module(credit: CreditAssigner = GEAR(), **options: Any) -> GearModule:
    """Return a GearModule with the tiny policy."""
    options.setdefault("teacher", TeacherOptions(template=" <ref> {reference}"))
    options.setdefault("optimizer", lambda p: torch.optim.AdamW(p, lr=1e-2))
    return GearModule(source(), credit, **options)


class TellsGPU(LookupChain):
    """Lookup chain that prints the GPUs visible to its process."""

    def __init__(self):
        super().__init__()
        print(f"sees GPU {os.environ.get('CUDA_VISIBLE_DEVICES')}.")


class AnyCall(LookupChain):
    """Lookup chain that also rewards well-formed calls, so that rewards vary in an untrained policy's groups."""

    def step(self, message):
        step = super().step(message)
        words = message.get("content", "").split()
        step.reward += 0.1 * len(message.get("tool_calls") or []) + 0.01 * sum(w.startswith("e") for w in words)
        return step


def data(**options: Any) -> RolloutDataModule:
    """Return data with two tasks of four rollouts per iteration."""
    defaults = {"tasks_per_iteration": 2, "group_size": 4, "micro_batch_size": 4, "val_limit": 4}
    tasks = LookupChainTasks(2)
    return RolloutDataModule(**{"train_tasks": tasks, "val_tasks": LookupChainTasks(2, "val"), **defaults, **options})


def generation(**options: Any) -> GenerationCallback:
    """Return a generation callback for short rollouts."""
    options.setdefault("environment", AnyCall)
    options.setdefault("budgets", Budgets(turns=4, tokens=24, turn_tokens=8, context=96))
    return GenerationCallback(**options)


def trainer(run: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """Return a Trainer without console output that writes metrics.csv and rollouts to ``run``."""
    options.setdefault("max_epochs", 2)
    options.setdefault("limit_val_batches", 0)
    options.setdefault("enable_checkpointing", False)
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=run,
        logger=MetricsFile(str(run)),
        callbacks=[*callbacks, RolloutRecorder(), Throughput()],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )


class NoSpread(LookupChain):
    def step(self, message):
        return Step(done=True, reward=0.0)  # as for an unparsable tool call
