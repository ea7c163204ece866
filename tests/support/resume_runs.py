"""Runs that end and resume, in this process."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from tiny_runs import AnyCall, data, generation, module, trainer

from gear_lightning.callbacks.checkpoint import IterationCheckpoint
from gear_lightning.callbacks.first_evaluation import FirstEvaluation
from gear_lightning.callbacks.preemption import Preemption
from gear_lightning.callbacks.resumption import Resumption
from gear_lightning.module import GearModule
from gear_lightning.runs.checkpoints import CompleteCheckpoints


class Scores(L.Callback):
    """Logs ``score`` in evaluations, or in training: the n-th value of a list in iteration n; None: no value."""

    def __init__(self, *values: float | None, training: bool = False):
        self.values, self.training = values, training

    def _log(self, trainer: Any, pl_module: Any) -> None:
        at = trainer.current_epoch
        if at < len(self.values) and self.values[at] is not None and (trainer.global_step or self.training):
            pl_module.log("score", self.values[at], batch_size=1)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not self.training:
            self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.training:
            self._log(trainer, pl_module)


class StopAt(L.Callback):
    """Sets ``trainer.should_stop`` after the n-th micro-batch of every iteration from a given one on."""

    def __init__(self, iteration: int, batch: int):
        self.iteration, self.batch = iteration, batch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch >= self.iteration and batch_idx == self.batch:
            trainer.should_stop = True


def folder_of(run: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run / "checkpoints"


def fit(
    run: Path,
    *callbacks: L.Callback,
    resume: Path | None = None,
    checkpoint: dict[str, Any] | None = None,
    source: dict[str, Any] | None = None,
    model: GearModule | None = None,
    environment: Any = AnyCall,
    **options: Any,
) -> L.Trainer:
    """Train as the command line does, and return the Trainer."""
    names = {"filename": "iteration={epoch}", "auto_insert_metric_name": False, "enable_version_counter": False}
    keeper = IterationCheckpoint(folder_of(run), **{**names, "save_last": "link", **(checkpoint or {})})
    torch.manual_seed(0)
    options = {"max_epochs": 4, "limit_val_batches": 0, **options}
    made = trainer(
        run, Preemption(), generation(environment=environment), *callbacks, FirstEvaluation(enabled=False), keeper,
        Resumption(), enable_checkpointing=True, plugins=[CompleteCheckpoints()], **options,
    )  # fmt: skip
    made.fit(model or module(), datamodule=data(**(source or {})), ckpt_path=resume, weights_only=True)
    return made


def steps(run: Path) -> dict[str, int]:
    """Return checkpoint -> its optimizer steps, including ``last``."""
    files = sorted(folder_of(run).glob("*.ckpt"))
    return {file.stem: torch.load(file, weights_only=True)["global_step"] for file in files}


def weights(made: Any) -> torch.Tensor:
    """Return the weights of the policy as one tensor."""
    module = made.lightning_module if isinstance(made, L.Trainer) else made
    return torch.cat([p.detach().flatten().clone() for p in module.policy.parameters()])
