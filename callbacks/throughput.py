"""How long the parts of an iteration take."""

import time
from typing import Any

import lightning as L
import torch

from gear_lightning.batch import RolloutBatch


class Throughput(L.Callback):
    """Logs ``time/rollout_s``, ``time/update_s``, ``perf/rollout_tokens_per_s`` (sampled tokens) and
    ``perf/update_tokens_per_s`` (all tokens of the policy's forward, padding aside): mean over the processes; and
    ``perf/padding_fraction``: share of padding in the tokens of the policy's and the teacher's forward passes. On GPUs
    also ``memory/rollout_gib`` and ``memory/update_gib``: the most that any process had allocated in each phase."""

    def __init__(self) -> None:
        self._seconds = self._started = 0.0
        self._tokens = self._places = self._filled = 0
        self._rollout_peak = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seconds = 0.0
        _peak(pl_module.device)
        self._tokens = self._places = self._filled = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self._rollout_peak = _peak(pl_module.device)
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        self._tokens += int(batch.valid.sum())  # waits for the device, so that the clock sees its work
        self._seconds += time.perf_counter() - self._started
        scored = outputs["teacher"] is not None and not batch.inner_epoch  # later epochs reuse what the teacher said
        for valid in (batch.valid, batch.teacher_valid) if scored else (batch.valid,):
            self._places += valid.numel()
            self._filled += int(valid.sum())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stats = trainer.datamodule.stats  # pyright: ignore[reportAttributeAccessIssue]
        values = {
            "time/rollout_s": stats.seconds,
            "time/update_s": self._seconds,
            "perf/rollout_tokens_per_s": stats.tokens / max(stats.seconds, 1e-9),
            "perf/update_tokens_per_s": self._tokens / max(self._seconds, 1e-9),
        }
        for name, value in values.items():
            pl_module.log(name, value, batch_size=1, sync_dist=True)
        if pl_module.device.type == "cuda":
            peaks = {"memory/rollout_gib": self._rollout_peak, "memory/update_gib": _peak(pl_module.device)}
            for name, value in peaks.items():
                pl_module.log(name, value, batch_size=1, sync_dist=True, reduce_fx="max")
        padding = (self._places - self._filled) / max(self._places, 1)
        weight = max(self._places, 1) * trainer.world_size  # see GearModule._log
        pl_module.log("perf/padding_fraction", padding, batch_size=weight, sync_dist=True)


def _peak(device: torch.device) -> float:
    """GiB allocated on a GPU at the most since the last call; 0 elsewhere."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak
