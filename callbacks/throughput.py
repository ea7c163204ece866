"""Measure how long the parts of an iteration take."""

import time
from typing import Any

import lightning as L
import torch

from gear_lightning.batch import RolloutBatch


class Throughput(L.Callback):
    """Logs times, rates and peak memory of rollouts and updates.

    Per iteration, mean over the processes: ``time/rollout_s``, ``time/update_s``, ``perf/rollout_tokens_per_s``
    (sampled tokens) and ``perf/update_tokens_per_s`` (all tokens of the policy's forward, without padding). Also
    ``perf/padding_fraction``: share of padding in the tokens of the policy's and the teacher's forward passes. On GPUs
    also ``memory/rollout_gib`` and ``memory/update_gib``: the maximum that any process had allocated in each phase.

    Since the start of the run, continued over restarts: ``perf/rollouts`` and ``perf/sampled_tokens``, summed over all
    processes, and ``perf/seconds`` of rollouts and updates, mean over the processes. These exclude the warm start,
    evaluations, checkpoints, pauses and rollouts that a stop interrupted.

    Lightning's ``ThroughputMonitor`` measures both phases as one, on the first process, and starts from zero in a
    resumed run. It can be used beside this callback, for example to measure MFU.
    """

    def __init__(self) -> None:
        self._all_rollouts = self._all_tokens = 0  # since the start of the run, on all processes
        self._all_seconds = 0.0
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
            self._count_rollouts(trainer)
        self._started = time.perf_counter()

    def _count_rollouts(self, trainer: L.Trainer) -> None:
        """Add this iteration's rollouts, before its first update, so that a checkpoint in mid-iteration has them."""
        stats = trainer.datamodule.stats  # pyright: ignore[reportAttributeAccessIssue]
        fresh = stats.seconds > 0  # rollouts from a checkpoint took no time here and are already counted
        mine = [sum(stats.statuses.values()), stats.tokens, stats.seconds] if fresh else [0, 0, 0.0]
        rollouts, tokens, seconds = _total(trainer, mine)
        self._all_rollouts += int(rollouts)
        self._all_tokens += int(tokens)
        self._all_seconds += seconds / trainer.world_size

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        self._tokens += int(batch.valid.sum())  # waits for the device, so that the time includes its work
        self._seconds += time.perf_counter() - self._started
        scored = outputs["teacher"] is not None and not batch.inner_epoch  # later epochs reuse the teacher's scores
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
        self._all_seconds += _total(trainer, [self._seconds])[0] / trainer.world_size
        self._seconds = 0.0  # already in _all_seconds, which a checkpoint written here stores
        values |= {"perf/rollouts": self._all_rollouts, "perf/sampled_tokens": self._all_tokens}
        values["perf/seconds"] = self._all_seconds
        for name, value in values.items():
            pl_module.log(name, float(value), batch_size=1, sync_dist=True)
        if pl_module.device.type == "cuda":
            peaks = {"memory/rollout_gib": self._rollout_peak, "memory/update_gib": _peak(pl_module.device)}
            for name, value in peaks.items():
                pl_module.log(name, value, batch_size=1, sync_dist=True, reduce_fx="max")
        padding = (self._places - self._filled) / max(self._places, 1)
        weight = max(self._places, 1) * trainer.world_size  # see GearModule._log
        pl_module.log("perf/padding_fraction", padding, batch_size=weight, sync_dist=True)

    def state_dict(self) -> dict[str, float]:
        seconds = self._all_seconds + self._seconds  # includes an unfinished iteration
        return {"rollouts": self._all_rollouts, "tokens": self._all_tokens, "seconds": seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._all_rollouts, self._all_tokens = int(state_dict["rollouts"]), int(state_dict["tokens"])
        self._all_seconds = state_dict["seconds"]


def _total(trainer: L.Trainer, mine: list[float]) -> list[float]:
    """Return the sums over the processes."""
    if trainer.world_size == 1:
        return mine
    values = torch.tensor(mine, dtype=torch.float64, device=trainer.strategy.root_device)
    return trainer.strategy.reduce(values, reduce_op="sum").tolist()


def _peak(device: torch.device) -> float:
    """Return the peak GiB allocated on a GPU since the last call; 0 on other devices."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak
