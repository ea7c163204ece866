"""Parts of runs that stay long in one phase when they first reach it, and report it.

The environment variable `PHASE` names the phase. `STARTED` is the path of a file that is then created. Neither changes
what is sampled and trained.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from deadlines import seconds
from distributed_runs import Chatter
from every_rule import TalkTasks

from gear_lightning.environments.base import Task

LONG = seconds(2)


def linger(phase: str, pause: float) -> None:
    """Pause in the first seconds of the phase, once over all starts of the job."""
    file = Path(os.environ.get("STARTED", os.devnull))
    if os.environ.get("PHASE") != phase:
        return
    if not file.exists():
        file.touch()
    if time.time() - file.stat().st_ctime < LONG:
        time.sleep(pause)


@dataclass(frozen=True)
class HeldOut(TalkTasks):
    """Tasks that an environment can distinguish from training tasks."""

    seed: int = 1

    def __getitem__(self, index: int) -> Task:
        task = super().__getitem__(index)
        return Task(task.id, task.messages, reference=task.reference, meta={**task.meta, "held_out": True})


class Lingering(Chatter):
    """An environment with slow steps, in training or in evaluation."""

    def reset(self, task: Task, *, seed: int) -> list[dict]:
        self.phase = "evaluation" if task.meta.get("held_out") else "rollouts"
        return super().reset(task, seed=seed)

    def step(self, message: dict) -> Any:
        linger(self.phase, 0.2)
        return super().step(message)


class LingeringSave(L.Callback):
    """Makes checkpoints slow to write."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.global_step:
            linger("checkpoint write", LONG)
