"""Record gradients and weights of every optimizer step, for `gear-lightning parity`."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from gear_lightning.batch import RolloutBatch
from gear_lightning.distributed.sharding import full, rest
from gear_lightning.distributed.zero_state import whole_gradient
from gear_lightning.errors import UserError
from gear_lightning.runs.step_records import Step, is_teacher, sample, write_step


class StepRecorder(L.Callback):
    """Records every optimizer step under ``RUN/steps``: the gradient before clipping, and the trained weights and the
    teacher's weights after the step (layout: `gear_lightning.runs.step_records`).

    `gear-lightning parity` adds it to its runs. It does not change training.

    Args:
        elements: maximum number of values to keep of each tensor, evenly spaced. Norms are those of full tensors.
    """

    def __init__(self, elements: int = 262_144):
        if elements < 1:
            raise UserError(f"step_recorder.elements={elements}: must be at least 1")
        self.elements = elements
        self._gradients: dict[str, Tensor] = {}
        self._norm = 0.0
        self._rate = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step == 0:  # a resumed run already has a record of the previous step
            self._write(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        engine: Any = trainer.strategy.model
        if hasattr(engine, "is_gradient_accumulation_boundary") and not engine.is_gradient_accumulation_boundary():
            return  # DeepSpeed counts micro-batches itself, and Lightning calls this for every one
        squares = 0.0
        for name, parameter in _trained(pl_module):
            gradient = whole_gradient(parameter)  # collective
            if gradient is not None and trainer.is_global_zero:
                squares += float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2
                self._gradients[name] = sample(gradient, self.elements)
        self._norm = squares**0.5
        self._rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._write(trainer, pl_module)

    @torch.no_grad()
    def _write(self, trainer: L.Trainer, pl_module: Any) -> None:
        rest(pl_module)
        weights = {}
        for name, parameter in [*_trained(pl_module), *_teacher(pl_module)]:
            whole = full(parameter)  # collective
            if trainer.is_global_zero:
                weights[name] = sample(whole, self.elements)
        if trainer.is_global_zero:
            step = Step(
                number=trainer.global_step,
                iteration=trainer.current_epoch,
                lr=self._rate,
                norm=self._norm,
                clip=float(trainer.gradient_clip_val or 0),
                clip_by=str(getattr(trainer.gradient_clip_algorithm, "value", None) or "norm"),
                elements=self.elements,
                gradients=self._gradients,
                weights=weights,
            )
            write_step(Path(trainer.default_root_dir), step)
        self._gradients = {}


def _trained(pl_module: Any) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in pl_module.named_parameters() if p.requires_grad]


def _teacher(pl_module: Any) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in pl_module.named_parameters() if is_teacher(name)]
