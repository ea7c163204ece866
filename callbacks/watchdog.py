"""End a job that hangs or in which a process fails, with a report from every process."""

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
PAUSE = 1.0  # seconds between two checks
STATUS = 124  # the exit status of timeout(1)


class Watchdog(L.Callback):
    """Ends the job if no process makes progress for too long, or if one process fails while others wait for it.

    Each process then writes ``RUN/crash/rank_R.txt``: the reason, its phase, iteration, optimizer steps and rollouts,
    the time since it and the other processes last made progress, and the stack of every thread. Progress is a rollout,
    a micro-batch or a part of a checkpoint of any process: a process that waits for a slow one is not stuck. The
    watchdog also works if a tool or reward never releases the interpreter lock. A checkpoint that is being written is
    finished first, as long as it makes progress.

    Args:
        seconds: maximum time without any progress. 0: no watchdog.
    """

    def __init__(self, seconds: float = 1800.0):
        if not 0 <= seconds < math.inf:
            raise UserError(f"watchdog.seconds={seconds}: must be at least 0 and finite")
        self.seconds = seconds
        self._beats = 0
        self._written = 0  # bytes of checkpoints
        self._phase = "start-up"
        self._last = time.monotonic()
        self._others: dict[int, tuple[str, float]] = {}  # rank -> (its last message, when that changed)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._peers: Peers | None = None
        self._report: Path | None = None  # set in setup
        self._warned = False

    # -- progress -----------------------------------------------------------------------------------------------------

    def _beat(self, phase: str) -> None:
        self._beats += 1
        self._phase = phase
        self._last = time.monotonic()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._trainer, self._rank, self._world = trainer, trainer.global_rank, trainer.world_size
        self._report = Path(trainer.default_root_dir) / "crash" / f"rank_{self._rank}.txt"
        if stage == "fit" and self._report.exists():  # from an earlier start
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
        self._exchange()
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
        self._shut_down()

    def _shut_down(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
            faulthandler.cancel_dump_traceback_later()
        self._thread = self._peers = None
        self._stop = threading.Event()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Stopped) and self._warned and self._report is not None:
            self._report.unlink(missing_ok=True)  # the process was only slow to reach a place to stop
        mine = not isinstance(exception, Stopped | KeyboardInterrupt)
        if mine and not isinstance(exception, UserError):  # its message says what to fix
            self._write(f"{type(exception).__name__}: {exception}", "".join(traceback.format_exception(exception)))
            note = getattr(exception, "add_note", None)  # from Python 3.11 on: the last line of the traceback
            if note is not None:
                note(f"report: {self._report}; to resume: run the same command with --ckpt_path last")
        if mine and self._peers is not None:
            text = (str(exception).strip().splitlines() or [""])[0]
            self._peers.post("failed", f"rank {self._rank} failed: {type(exception).__name__}: {text}")
            time.sleep(2 * PAUSE)  # let the others read it before this process ends, and the store with it
        self._shut_down()  # the process may continue after the exception

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        pause = min(PAUSE, self.seconds / 4)
        moved, failed = time.monotonic(), None
        while not self._stop.wait(pause):
            if WRITER.progress != self._written:
                self._written = WRITER.progress
                self._beat(self._phase)
            moved = max(moved, self._last, self._exchange())
            now = time.monotonic()
            idle = now - moved
            self._arm(self.seconds - idle + GRACE)
            if failed is None and (heard := self._peers and self._peers.read("failed")):
                failed = (heard["failed"], now)
            self._report_unmet_stop(now)
            if lost := self._killed_child():
                self._end(lost)
            if failed is not None and now - failed[1] > GRACE:
                self._end(failed[0])
            elif idle > self.seconds:
                self._end(f"no process has made progress for {idle:.0f} s")

    def _exchange(self) -> float:
        """Exchange progress with the other processes. Return the local time of the last progress of any of them."""
        if self._peers is None:
            return 0.0
        self._peers.post(f"rank{self._rank}", f"{self._beats} {self._phase}")
        heard = self._peers.read(*(f"rank{rank}" for rank in range(self._world)))
        if not heard:  # rank 0 has ended: use only the progress of this process
            return 0.0
        for name, text in heard.items():
            rank = int(name.removeprefix("rank"))
            if self._others.get(rank, ("",))[0] != text:
                self._others[rank] = (text, time.monotonic())
        return max(when for _, when in self._others.values())

    def _killed_child(self) -> str | None:
        """Return a message if a signal has killed a process that Lightning started on this node, else None.

        Lightning kills this process too when it notices.
        """
        children = getattr(self._trainer.strategy.launcher, "procs", ())
        for rank, child in enumerate(children, self._rank + 1):
            if (status := child.poll()) is not None and status < 0:
                return f"rank {rank} (process {child.pid}) was killed by {signal.Signals(-status).name}"
        return None

    def _report_unmet_stop(self, now: float) -> None:
        """Write the report if this process was asked to stop but has made no progress since.

        A launcher that has lost one process terminates the others and kills them soon after. Those that wait for the
        lost process cannot stop by themselves, so they write their reports before they are killed.
        """
        if NOTES.since is not None and now - max(NOTES.since, self._last) > GRACE / 2 and not self._warned:
            self._warned = True
            self._write(f"asked to stop {now - NOTES.since:.0f} s ago, and no progress since then")

    def _arm(self, seconds: float) -> None:
        """Start a timer outside of the interpreter, for code that never lets this thread run."""
        faulthandler.dump_traceback_later(max(seconds, 1.0), exit=True, file=2)

    def _end(self, why: str) -> None:
        self._write(why)
        print(
            f"gear-lightning: error: rank {self._rank} stopped in: {self._phase}; {why}; see {self._report}",
            file=sys.stderr,
        )
        sys.stderr.flush()
        time.sleep(3 * PAUSE)  # let the other processes write their reports
        self._arm(self.seconds + GRACE)
        WRITER.wait(patience=6 * GRACE)
        os._exit(STATUS)

    def _write(self, why: str, trace: str | None = None) -> None:
        """Write the report of this process. It never raises and never communicates."""
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
                    text, when = self._others.get(rank, (" no report", self._last))
                    print(f"rank {rank}: {text.partition(' ')[2]} ({now - when:.0f} s ago)", file=file)
                print(f"\n{trace or 'stacks, innermost call first:'}", file=file, flush=True)
                if trace is None:
                    faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError as error:
            print(f"{self._report} cannot be written: {error.strerror}", file=sys.stderr)
