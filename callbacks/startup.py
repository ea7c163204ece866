"""Looks at what the processes hold before the first update, and says it."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from gear_lightning.errors import UserError
from gear_lightning.sharding import shape, state_bytes
from gear_lightning.together import gather
from gear_lightning.zero_state import piece_bytes


class StartupCheck(L.Callback):
    """With several processes: prints the bytes of weights that each holds, stops where a strategy that should spread
    them does not, and where two processes are going to train on the same rollouts. Only watches."""

    def __init__(self) -> None:
        self._looked = False

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.world_size == 1:
            return
        models = {"policy": pl_module.policy}
        if pl_module.teacher is not None and pl_module.teacher.model is not None:
            models["teacher"] = pl_module.teacher.model
        strategy: Any = trainer.strategy
        parts = trainer.world_size // getattr(strategy, "replicas", 1) if getattr(strategy, "shards", False) else 1
        told = []
        for name, model in models.items():
            held = gather(state_bytes(model))
            parameters = list(model.parameters())
            whole = sum(shape(p).numel() * p.element_size() for p in parameters)
            told.append(f"{name} {_size(max(held))} of {_size(whole)}")
            if max(held) > sum(_largest_part(p, parts) for p in parameters):
                raise UserError(
                    f"{type(strategy).__name__} should spread the {name} over {parts} processes, and one holds "
                    f"{_size(max(held))} of {_size(whole)}"
                )
        for optimizer in trainer.optimizers:
            if pieces := piece_bytes(optimizer):
                whole = sum(shape(p).numel() * 4 for p in pl_module.policy.parameters() if p.requires_grad)
                held = gather(pieces)
                told.append(f"float32 weights of the optimizer {_size(max(held))} of {_size(whole)}")
                if max(held) > 1.1 * whole / trainer.world_size + (1 << 20):
                    raise UserError(f"ZeRO should spread the optimizer, and one process holds {_size(max(held))}")
        rank_zero_info(f"each of {trainer.world_size} processes holds: {', '.join(told)}")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._looked or trainer.world_size == 1:
            return
        self._looked = True
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        seen: dict[int, int] = {}
        for rank, groups in enumerate(gather([group.group_id for group in data.groups])):
            for group in groups:
                if group in seen:
                    raise UserError(
                        f"ranks {seen[group]} and {rank} both hold the rollouts of group {group}: is every process "
                        "told its own rank?"
                    )
                seen[group] = rank


def _largest_part(parameter: Any, parts: int) -> int:
    """Bytes of the largest part of a parameter that is cut between its rows."""
    size = shape(parameter)
    rows = size[0] if size else 1
    return math.ceil(rows / parts) * (size.numel() // max(rows, 1)) * parameter.element_size()


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"
