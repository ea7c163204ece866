"""Ends a job that stands still, with a word from every process on where it was."""

import faulthandler
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from gear_lightning.callbacks.generation import GenerationCallback
from gear_lightning.errors import UserError

GRACE = 10.0  # seconds for a process to end by itself after another has failed
PAUSE = 1.0  # seconds between two looks
STATUS = 124  # as timeout(1) gives


class Watchdog(L.Callback):
    """Ends the job where no process makes progress for too long, or where one fails and the others wait for it.

    Each process then writes ``RUN/stalled/rank_R.txt``: phase, iteration, how long ago it and the others last made
    progress, and the stack of every thread. Progress is a rollout, a micro-batch or a checkpoint of any process: one
    that waits for a slow one is not stuck. Also works where a tool or reward never lets go of the interpreter.

    Args:
        seconds: longest time without any progress. 0: no watchdog.
    """

    def __init__(self, seconds: float = 1800.0):
        if seconds < 0:
            raise UserError(f"watchdog.seconds={seconds} must be at least 0")
        self.seconds = seconds
        self._beats = 0
        self._phase = "start-up"
        self._last = time.monotonic()
        self._others: dict[int, tuple[str, float]] = {}  # rank -> (what it last said, when that changed)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Any = None

    # -- what progress is ---------------------------------------------------------------------------------------------

    def _beat(self, phase: str) -> None:
        self._beats += 1
        self._phase = phase
        self._last = time.monotonic()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not self.seconds or self._thread is not None:
            return
        self._rank, self._world = trainer.global_rank, trainer.world_size
        self._folder = Path(trainer.default_root_dir) / "stalled"
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, GenerationCallback) and self._rolling not in callback.listeners:
                callback.listeners.append(self._rolling)
        if self._world > 1:
            self._connect(trainer)
        self._beat("start-up")
        self._arm(self.seconds + GRACE)
        self._look()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def _connect(self, trainer: L.Trainer) -> None:
        strategy: Any = trainer.strategy
        host = strategy.cluster_environment.main_address
        wait = timedelta(seconds=60)
        options = {"world_size": None, "wait_for_workers": False, "timeout": wait}
        if self._rank == 0:
            self._store = TCPStore(host, 0, is_master=True, **options)
        port = strategy.broadcast(None if self._store is None else self._store.port)
        if self._rank:
            self._store = TCPStore(host, port, is_master=False, **options)

    def _rolling(self, stage: str, finished: int, rollouts: int, tokens: int) -> None:
        self._beat(f"{'rollout' if stage == 'fit' else 'evaluation'}, {finished} of {rollouts} done, {tokens} tokens")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._beat(f"iteration {trainer.current_epoch}, before the rollouts")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._beat(f"update in iteration {trainer.current_epoch}, micro-batch {batch_idx}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._beat(f"iteration {trainer.current_epoch}, after micro-batch {batch_idx}")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._beat(f"end of iteration {trainer.current_epoch}")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._beat("evaluation")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._beat("after the evaluation")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._beat(f"checkpoint after {trainer.global_step} steps")

    # -- the end ------------------------------------------------------------------------------------------------------

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._rest()

    def _rest(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
            faulthandler.cancel_dump_traceback_later()
        self._thread = self._store = None
        self._stop = threading.Event()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._store is not None:
            text = (str(exception).strip().splitlines() or [""])[0]
            try:
                self._store.set("failed", f"rank {self._rank} failed: {type(exception).__name__}: {text}")
            except Exception:  # the process that keeps the store is gone
                self._store = None
            time.sleep(2 * PAUSE)  # the others read it before the store goes with this process
        self._rest()  # what catches the exception may live on

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        pause = min(PAUSE, self.seconds / 4)
        moved, failed = time.monotonic(), None
        while not self._stop.wait(pause):
            moved = max(moved, self._last, self._look())
            now = time.monotonic()
            idle = now - moved
            self._arm(self.seconds - idle + GRACE)
            if self._store is not None and failed is None:
                failed = self._failure(now)
            if failed is not None and now - failed[1] > GRACE:
                self._end(failed[0])
            elif idle > self.seconds:
                self._end(f"no process has made progress for {idle:.0f} s")

    def _look(self) -> float:
        """Tell the others, hear them, and return when any of them last made progress, as seen from here."""
        if self._store is None:
            return 0.0
        try:
            self._store.set(f"rank{self._rank}", f"{self._beats} {self._phase}")
            keys = [f"rank{r}" for r in range(self._world)]
            present = [r for r in range(self._world) if self._store.check([keys[r]])]
            said = self._store.multi_get([keys[r] for r in present])
        except Exception:  # the process that keeps the store is gone; this one goes by its own progress
            self._store = None
            return 0.0
        for rank, words in zip(present, said, strict=True):
            text = words.decode()
            if self._others.get(rank, ("",))[0] != text:
                self._others[rank] = (text, time.monotonic())
        return max(when for _, when in self._others.values())

    def _failure(self, now: float) -> tuple[str, float] | None:
        try:
            return (self._store.get("failed").decode(), now) if self._store.check(["failed"]) else None
        except Exception:
            self._store = None
            return None

    def _arm(self, seconds: float) -> None:
        """A clock outside of the interpreter, for code that never lets this thread run."""
        faulthandler.dump_traceback_later(max(seconds, 1.0), exit=True, file=2)

    def _end(self, why: str) -> None:
        path = self._folder / f"rank_{self._rank}.txt"
        self._folder.mkdir(parents=True, exist_ok=True)
        now = time.monotonic()
        with path.open("w") as file:
            print(f"{why}\n", file=file)
            print(f"rank {self._rank} of {self._world}, process {os.getpid()} on {socket.gethostname()}", file=file)
            print(f"was here: {self._phase} ({now - self._last:.0f} s ago)\n", file=file)
            for rank in range(self._world):
                text, when = self._others.get(rank, (" not heard of", self._last))
                print(f"rank {rank}: {text.partition(' ')[2]} ({now - when:.0f} s ago)", file=file)
            print("\nstacks, innermost call first:", file=file, flush=True)
            faulthandler.dump_traceback(file=file, all_threads=True)
        print(f"gear-lightning: error: rank {self._rank} stopped in: {self._phase}; {why}; see {path}", file=sys.stderr)
        sys.stderr.flush()
        time.sleep(3 * PAUSE)  # the others write theirs
        os._exit(STATUS)
