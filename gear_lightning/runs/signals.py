"""Signals that ask a run to stop are noted when they come, and acted upon where all processes can."""

import os
import signal
import sys
import threading
import time
from typing import Any

STOP, REQUEUE = 1, 2
MEANING = {signal.SIGINT: STOP, signal.SIGTERM: STOP, signal.SIGUSR1: REQUEUE, signal.SIGUSR2: REQUEUE}


class SignalNotes:
    """What this process has been asked.

    Python runs handlers in the main thread between two of its instructions, that is not while it waits in a collective
    for the others. A pipe that the interpreter writes to from its own handler, and a thread that reads it, note a
    signal at any time.
    """

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self.since: float | None = None  # time.monotonic() of the first one
        self._pipe: tuple[int, int] | None = None
        self._before: dict[signal.Signals, Any] = {}  # handlers

    @property
    def wanted(self) -> int:
        """0, `STOP`, or `REQUEUE`: stop and be started again."""
        return max((MEANING[number] for number in self.received), default=0)

    def watch(self, *numbers: signal.Signals) -> list[signal.Signals]:
        """Note these signals from now on, in place of what they did. Only the main thread can.

        Returns:
            Those that were not watched before, for `release`.
        """
        fresh = [number for number in numbers if number not in self._before]
        if threading.current_thread() is not threading.main_thread():
            return []
        if self._pipe is None:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            threading.Thread(target=self._listen, daemon=True, name="signals").start()
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in fresh:
            self._before[number] = signal.signal(number, lambda *_: None)
        return fresh

    def release(self, numbers: list[signal.Signals]) -> None:
        """Let these signals do what they did before."""
        for number in numbers:
            signal.signal(number, self._before.pop(number))
        if numbers and not self._before:
            signal.set_wakeup_fd(-1)

    def forget(self) -> None:
        """Take what has been asked as done."""
        self.received.clear()
        self.since = None

    def _listen(self) -> None:
        assert self._pipe is not None
        while data := os.read(self._pipe[0], 64):
            for number in data:
                if number in set(MEANING):
                    self._note(signal.Signals(number))

    def _note(self, number: signal.Signals) -> None:
        if number == signal.SIGINT and number in self.received:
            print("\nstopped at once", file=sys.stderr, flush=True)
            os._exit(128 + number)
        if number not in self.received:
            self.received.append(number)
            self.since = self.since or time.monotonic()
            again = "; Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            print(f"\n{number.name}: stopping at the next safe place{again}", file=sys.stderr, flush=True)


NOTES = SignalNotes()
