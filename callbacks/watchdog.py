"""Ends a job that stands still or whose processes fail, with a word from every process on where it was."""

import faulthandler
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import lightning as L

from gear_lightning.callbacks.generation import GenerationCallback
from gear_lightning.distributed.peers import Peers, peers_of
from gear_lightning.errors import Stopped, UserError
from gear_lightning.runs.background import WRITER
from gear_lightning.runs.signals import NOTES

GRACE = 10.0  # seconds for a process to end by itself after another has failed
PAUSE = 1.0  # seconds between two looks
STATUS = 124  # as timeout(1) gives


class Watchdog(L.Callback):
    """Ends the job where no process makes progress for too long, or where one fails and the others wait for it.

    Each process then writes ``RUN/crash/rank_R.txt``: what was wrong, its phase, iteration, optimizer steps and
    rollouts, how long ago it and the others last made progress, and where every thread was. Progress is a rollout, a
    micro-batch or a part of a checkpoint of any process: one that waits for a slow one is not stuck. Also works where a
    tool or reward never lets go of the interpreter. A checkpoint that is being written is finished first, as long as
    that makes progress.

    Args:
        seconds: longest time without any progress. 0: no watchdog.
    """

    def __init__(self, seconds: float = 1800.0):
        if not 0 <= seconds < math.inf:
            raise UserError(f"watchdog.seconds={seconds} must be at least 0, and finite")
        self.seconds = seconds
        self._beats = 0
        self._written = 0  # bytes of checkpoints
        self._phase = "start-up"
        self._last = time.monotonic()
        self._others: dict[int, tuple[str, float]] = {}  # rank -> (what it last said, when that changed)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._peers: Peers | None = None
        self._report: Path | None = None  # known from setup on
        self._warned = False

    # -- what progress is ---------------------------------------------------------------------------------------------

    def _beat(self, phase: str) -> None:
        self._beats += 1
        self._phase = phase
        self._last = time.monotonic()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._trainer, self._rank, self._world = trainer, trainer.global_rank, trainer.world_size
        self._report = Path(trainer.default_root_dir) / "crash" / f"rank_{self._rank}.txt"
        if stage == "fit" and self._report.exists():  # of an earlier attempt
            when = time.strftime("%Y%m%d-%H%M%S", time.localtime(self._report.stat().st_mtime))
            self._report.rename(self._report.with_name(f"{when}_{self._report.name}"))
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, GenerationCallback) and self._rolling not in callback.listeners:
                callback.listeners.append(self._rolling)
        self._peers = peers_of(trainer)
        self._beat("start-up")
        if not self.seconds or self._thread is not None:
            return
        self._arm(self.seconds + GRACE)
        self._look()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

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
        self._thread = self._peers = None
        self._stop = threading.Event()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Stopped) and self._warned and self._report is not None:
            self._report.unlink(missing_ok=True)  # it was only slow to come to a place to stop at
        mine = not isinstance(exception, Stopped | KeyboardInterrupt)
        if mine and not isinstance(exception, UserError):  # that one says what to mend
            self._write(f"{type(exception).__name__}: {exception}", "".join(traceback.format_exception(exception)))
            note = getattr(exception, "add_note", None)  # from Python 3.11 on: the last line of the traceback
            if note is not None:
                note(f"report: {self._report}; to go on: the same command with --ckpt_path last")
        if mine and self._peers is not None:
            text = (str(exception).strip().splitlines() or [""])[0]
            self._peers.tell("failed", f"rank {self._rank} failed: {type(exception).__name__}: {text}")
            time.sleep(2 * PAUSE)  # the others read it before the store goes with this process
        self._rest()  # what catches the exception may live on

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        pause = min(PAUSE, self.seconds / 4)
        moved, failed = time.monotonic(), None
        while not self._stop.wait(pause):
            if WRITER.progress != self._written:
                self._written = WRITER.progress
                self._beat(self._phase)
            moved = max(moved, self._last, self._look())
            now = time.monotonic()
            idle = now - moved
            self._arm(self.seconds - idle + GRACE)
            if failed is None and (said := self._peers and self._peers.hear("failed")):
                failed = (said["failed"], now)
            self._look_for_a_kill(now)
            if lost := self._lost_child():
                self._end(lost)
            if failed is not None and now - failed[1] > GRACE:
                self._end(failed[0])
            elif idle > self.seconds:
                self._end(f"no process has made progress for {idle:.0f} s")

    def _look(self) -> float:
        """Tell the others, hear them, and return when any of them last made progress, as seen from here."""
        if self._peers is None:
            return 0.0
        self._peers.tell(f"rank{self._rank}", f"{self._beats} {self._phase}")
        said = self._peers.hear(*(f"rank{rank}" for rank in range(self._world)))
        if not said:  # rank 0 is gone: this process goes by its own progress
            return 0.0
        for name, text in said.items():
            rank = int(name.removeprefix("rank"))
            if self._others.get(rank, ("",))[0] != text:
                self._others[rank] = (text, time.monotonic())
        return max(when for _, when in self._others.values())

    def _lost_child(self) -> str | None:
        """A process that Lightning has started on this node and that a signal has killed. Lightning kills this one,
        too, when it sees it."""
        children = getattr(self._trainer.strategy.launcher, "procs", ())
        for rank, child in enumerate(children, self._rank + 1):
            if (status := child.poll()) is not None and status < 0:
                return f"rank {rank} (process {child.pid}) was killed by {signal.Signals(-status).name}"
        return None

    def _look_for_a_kill(self, now: float) -> None:
        """A launcher that has lost one process terminates the others, and kills them soon after: those that wait for
        the lost one cannot stop by themselves, and leave their word before."""
        if NOTES.since is not None and now - max(NOTES.since, self._last) > GRACE / 2 and not self._warned:
            self._warned = True
            self._write(f"asked to stop {now - NOTES.since:.0f} s ago, and waiting for something ever since")

    def _arm(self, seconds: float) -> None:
        """A clock outside of the interpreter, for code that never lets this thread run."""
        faulthandler.dump_traceback_later(max(seconds, 1.0), exit=True, file=2)

    def _end(self, why: str) -> None:
        self._write(why)
        print(
            f"gear-lightning: error: rank {self._rank} stopped in: {self._phase}; {why}; see {self._report}",
            file=sys.stderr,
        )
        sys.stderr.flush()
        time.sleep(3 * PAUSE)  # the others write theirs
        self._arm(self.seconds + GRACE)
        WRITER.wait(patience=6 * GRACE)
        os._exit(STATUS)

    def _write(self, why: str, trace: str | None = None) -> None:
        """The report of this process. Never raises, and never communicates."""
        now = time.monotonic()
        if self._report is None:
            return
        try:
            self._report.parent.mkdir(parents=True, exist_ok=True)
            with self._report.open("w") as file:
                print(f"{why}\n", file=file)
                print(f"rank {self._rank} of {self._world}, process {os.getpid()} on {socket.gethostname()}", file=file)
                print(f"time: {time.strftime('%Y-%m-%d %H:%M:%S %z')}", file=file)
                steps = self._trainer.global_step
                print(f"iteration {self._trainer.current_epoch}, after {steps} optimizer steps", file=file)
                print(f"phase: {self._phase} ({now - self._last:.0f} s ago)\n", file=file)
                for rank in range(self._world) if self._world > 1 else ():
                    text, when = self._others.get(rank, (" not heard of", self._last))
                    print(f"rank {rank}: {text.partition(' ')[2]} ({now - when:.0f} s ago)", file=file)
                print(f"\n{trace or 'stacks, innermost call first:'}", file=file, flush=True)
                if trace is None:
                    faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError as error:
            print(f"{self._report} cannot be written: {error.strerror}", file=sys.stderr)
