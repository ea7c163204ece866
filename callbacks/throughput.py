"""How long the parts of an iteration take."""

import time
from typing import Any

import lightning as L

from gear_lightning.batch import RolloutBatch


class Throughput(L.Callback):
    """Logs ``time/rollout_s``, ``time/update_s``, ``perf/rollout_tokens_per_s`` (sampled tokens) and
    ``perf/update_tokens_per_s`` (all tokens of the policy's forward, padding aside): mean over the processes."""

    def __init__(self) -> None:
        self._seconds = self._started = 0.0
        self._tokens = 0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seconds, self._tokens = 0.0, 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        self._tokens += int(batch.valid.sum())  # waits for the device, so that the clock sees its work
        self._seconds += time.perf_counter() - self._started

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
