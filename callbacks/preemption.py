"""Stop a run on a signal, after writing one complete checkpoint."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from gear_lightning.callbacks.checkpoint import IterationCheckpoint
from gear_lightning.callbacks.generation import GenerationCallback
from gear_lightning.data import RolloutDataModule
from gear_lightning.distributed.peers import Peers, peers_of
from gear_lightning.errors import Stopped
from gear_lightning.learning.iterations import at_a_limit
from gear_lightning.runs.background import WRITER
from gear_lightning.runs.checkpoints import fail_on_all_ranks, known_checkpoints
from gear_lightning.runs.signals import MEANING, NOTES, REQUEUE

NAME = "stopped.ckpt"
LOOK = 0.5  # seconds between two queries for stop requests of other processes


class Preemption(L.Callback):
    """Stops the run on a signal, at a place where all processes can stop together.

    Such places are between two turns of a rollout phase, two micro-batches, or two batches of an evaluation. The state
    is saved, and the same command with ``--ckpt_path last`` resumes the run.

    On SIGUSR1 and SIGUSR2 (which SLURM sends before a time limit or a pre-emption), the run saves and puts the job back
    into the queue. On SIGTERM and Ctrl-C, it saves and stops; a second Ctrl-C stops at once. A signal to one process is
    enough. The exit status is 75 with a checkpoint, 143 without one.

    Args:
        requeue: ask SLURM to run the job again after SIGUSR1 or SIGUSR2.
    """

    def __init__(self, requeue: bool = True):
        self.requeue = requeue
        self._agreed = 0
        self._looked = 0.0
        self._group: Any = None
        self._peers: Peers | None = None
        self._finished = False
        self._watched: list[signal.Signals] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Lightning's handlers save and wait for the other processes wherever the signal arrives, which deadlocks inside
        # a collective (https://github.com/Lightning-AI/pytorch-lightning/issues/21406)
        trainer._signal_connector.register_signal_handlers = lambda: None
        if stage != "fit":
            return  # nothing to save: signals keep their default handlers
        self._agreed, self._finished = 0, False
        self._peers = peers_of(trainer)
        if self._peers is not None and trainer.strategy.root_device.type != "cpu":
            self._group = dist.new_group(backend="gloo")  # does not synchronize the device
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(data, RolloutDataModule):
            data.stop = self.agreed
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, GenerationCallback):
                callback.stop = self.wanted

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._watched = NOTES.watch(*MEANING)

    # -- the decision -------------------------------------------------------------------------------------------------

    def wanted(self) -> bool:
        """Return whether this process, or another process known to this one, was asked to stop.

        Any thread may call it.
        """
        if NOTES.wanted or self._agreed:
            if self._peers is not None:
                self._peers.post("stop", str(NOTES.wanted))
            return True
        if self._peers is None or time.monotonic() - self._looked < LOOK:
            return False
        self._looked = time.monotonic()
        return bool(self._peers.read("stop"))

    def agreed(self) -> bool:
        """Return whether any process was asked to stop. All ranks must call it."""
        if not self._agreed:
            level = torch.tensor(NOTES.wanted)
            if self._peers is not None:
                dist.all_reduce(level, dist.ReduceOp.MAX, group=self._group)
            self._agreed = int(level)
        return bool(self._agreed)

    @property
    def asked(self) -> bool:
        """Whether all processes have agreed to stop."""
        return bool(self._agreed)

    # -- the end ------------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(trainer.datamodule, RolloutDataModule) and self.agreed():  # pyright: ignore
            raise Stopped  # a warm start has nothing to save

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._remove_outdated(trainer)

    def _remove_outdated(self, trainer: L.Trainer) -> None:
        path = self._path(trainer)
        if trainer.is_global_zero and path is not None and path.exists() and _outdated(path):
            WRITER.then(partial(trainer.strategy.remove_checkpoint, path))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.agreed():
            trainer.should_stop = True  # the checkpoint callback runs later and saves

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        WRITER.settle()  # wait until the newest checkpoint is written
        self._remove_outdated(trainer)
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if self._agreed and isinstance(data, RolloutDataModule):
            if at_a_limit(trainer) and not data.evaluation_due:
                return  # the run is complete
            raise Stopped(self._finish(trainer, saved=self._path(trainer) is not None))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Stopped) and not self._finished:
            path = self._path(trainer)
            if path is not None:
                with fail_on_all_ranks(trainer.strategy):
                    trainer.save_checkpoint(path, weights_only=False)
                for callback in trainer.checkpoint_callbacks:
                    if isinstance(callback, IterationCheckpoint):
                        callback.point_last_to(trainer, path)
            exception.status = self._finish(trainer, saved=path is not None)

    def _path(self, trainer: L.Trainer) -> Path | None:
        kept = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        return Path(str(kept[0].dirpath)) / NAME if kept else None

    def _finish(self, trainer: L.Trainer, saved: bool) -> int:
        """Run the last steps that all processes do together, and return the exit status."""
        self._finished = True
        self.teardown(trainer, trainer.lightning_module, "fit")  # Lightning does not call it after an exception
        NOTES.forget()
        trainer.strategy.barrier("stopped")
        warm = not isinstance(trainer.datamodule, RolloutDataModule)  # pyright: ignore[reportAttributeAccessIssue]
        again = self._agreed == REQUEUE and self.requeue and (saved or warm)
        if trainer.is_global_zero and not (again and _requeue()):
            done = f"after {trainer.global_step} optimizer steps"
            if saved:
                print(f"stopped {done}; to resume: run the same command with --ckpt_path last", file=sys.stderr)
            elif warm:
                print(f"the warm start was stopped {done}; the same command restarts it", file=sys.stderr)
            else:
                print(f"stopped {done}; nothing was saved, because this run writes no checkpoints", file=sys.stderr)
        trainer.strategy.barrier("requeued")  # a launcher may end the other processes when the first one ends
        return 75 if saved or warm else 128 + signal.SIGTERM

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        NOTES.release(self._watched)
        self._watched = []


def _outdated(path: Path) -> bool:
    """Return whether the folder has a checkpoint further in training than the one that a stop wrote."""
    order = [known for known, _ in known_checkpoints(path.parent)]
    return path in order[1:]


def _requeue() -> bool:
    """Ask SLURM to run this job again. Return whether this is a SLURM job and SLURM accepted."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
        answer, refused = asked.stderr.strip(), asked.returncode != 0
    except (OSError, subprocess.TimeoutExpired) as error:
        answer, refused = str(error), True
    if refused:
        print(f"SLURM does not put job {job} back into the queue: {answer}", file=sys.stderr)
        return False
    print(f"job {job} is in the queue again and will resume from the checkpoint", file=sys.stderr, flush=True)
    return True
