"""A callback that sends a signal to its own process at the n-th occurrence of a named place, once per run."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
from deadlines import until
from tiny_runs import AnyCall

from gear_lightning.callbacks.watchdog import GRACE
from gear_lightning.runs.signals import NOTES

PLACES = (
    "start", "rollout", "tool call", "rollouts end", "teacher pass", "update", "optimizer step", "update end",
    "evaluation", "evaluation end", "checkpoint", "checkpoint write", "checkpoint written", "record write",
    "record written", "metrics write", "epoch end",
)  # fmt: skip


class Strike(L.Callback):
    """Sends a signal at one of `PLACES`.

    Args:
        place: where to send it.
        count: at which occurrence of the place, from 1.
        number: name of the signal.
        name: name of the marker file that it writes into the run directory.
        rank: rank of the process that sends it to itself; -1 for all.
    """

    def __init__(self, place: str, count: int = 1, number: str = "SIGKILL", rank: int = 0, name: str = "struck"):
        assert place in PLACES, place
        self.place, self.count, self.number, self.rank = place, count, number, rank
        self.left, self.name = count, name
        STRIKES.append(self)

    def reach(self, place: str) -> None:
        mine = self.rank in (-1, int(os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0"))))
        if place != self.place or not mine or self.marker.exists():
            return
        self.left -= 1
        if self.left == 0:
            self.marker.write_text(place)
            number = getattr(signal, self.number)
            os.kill(os.getpid(), number)
            if number in NOTES._before:  # without a handler the signal ends the process
                until(lambda: number in NOTES.received, "the thread that records signals", pause=0.001)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self.marker = Path(trainer.default_root_dir) / self.name
        replace = os.replace

        def replaced(source: Any, target: Any) -> None:
            kind = {".ckpt": "checkpoint", ".jsonl": "record", ".csv": "metrics"}.get(Path(target).suffix)
            if kind is not None:
                self.reach(f"{kind} write")
            replace(source, target)
            if kind is not None:
                self.reach(f"{kind} written")

        os.replace = replaced

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.reach("start")
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        generate, score = data.generator.generate, pl_module.teacher.score

        def generated(*args: Any) -> Any:
            made = generate(*args)
            if args[1] == "fit":
                self.reach("rollouts end")
            return made

        def scored(*args: Any) -> Any:
            self.reach("teacher pass")
            return score(*args)

        data.generator.generate, pl_module.teacher.score = generated, scored

    def on_train_batch_start(self, *args: Any, **options: Any) -> None:
        self.reach("update")

    def on_before_optimizer_step(self, *args: Any, **options: Any) -> None:
        self.reach("optimizer step")

    def on_train_batch_end(self, *args: Any, **options: Any) -> None:
        self.reach("update end")

    def on_validation_batch_start(self, *args: Any, **options: Any) -> None:
        self.reach("evaluation")

    def on_validation_end(self, *args: Any, **options: Any) -> None:
        self.reach("evaluation end")

    def on_save_checkpoint(self, *args: Any, **options: Any) -> None:
        self.reach("checkpoint")

    def on_train_epoch_end(self, *args: Any, **options: Any) -> None:
        self.reach("epoch end")


STRIKES: list[Strike] = []  # all callbacks of this process


class Struck(AnyCall):
    """Reports the place "rollout" when an episode begins, and "tool call" at every step of the environment."""

    def reset(self, task, *, seed):
        for strike in STRIKES:
            strike.reach("rollout")
        return super().reset(task, seed=seed)

    def step(self, message):
        for strike in STRIKES:
            strike.reach("tool call")
        return super().step(message)


class Slow(Struck):
    """After the signal, takes almost as long to return as the watchdog's grace period."""

    def step(self, message):
        step = super().step(message)
        if any(strike.marker.exists() for strike in STRIKES):
            time.sleep(0.8 * GRACE)
        return step


class Deaf(Struck):
    """After the signal, does not return, so that only a second signal, which stops at once, ends the process."""

    def step(self, message):
        step = super().step(message)
        if any(strike.marker.exists() for strike in STRIKES):
            for strike in STRIKES:
                strike.reach("tool call")
            time.sleep(1000)
        return step


class HeldDisk(L.Callback):
    """Delays writing the second iteration's checkpoint until the signal is sent."""

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        fsync = os.fsync

        def held(place: int) -> None:
            # a start without a signal does not wait for one
            if STRIKES and os.readlink(f"/proc/self/fd/{place}").endswith("iteration=00001.ckpt.partial"):
                until(lambda: any(strike.marker.exists() for strike in STRIKES), "the signal", limit=60)
            fsync(place)

        os.fsync = held
