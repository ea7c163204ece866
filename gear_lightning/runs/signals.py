"""Record signals that ask a run to stop; the run acts on them later, where all processes can stop together."""

import os
import signal
import sys
import threading
import time
from typing import Any

STOP, REQUEUE = 1, 2
MEANING = {signal.SIGINT: STOP, signal.SIGTERM: STOP, signal.SIGUSR1: REQUEUE, signal.SIGUSR2: REQUEUE}


class SignalNotes:
    """Signals that this process has received.

    Python runs signal handlers in the main thread between two bytecode instructions, so not while the main thread waits
    in a collective. Therefore the interpreter's own C handler writes signals to a pipe, and a thread reads it. This
    records a signal at any time.
    """

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self.since: float | None = None  # time.monotonic() of the first one
        self._pipe: tuple[int, int] | None = None
        self._before: dict[signal.Signals, Any] = {}  # handlers

    @property
    def wanted(self) -> int:
        """0, `STOP`, or `REQUEUE` (stop and be started again)."""
        return max((MEANING[number] for number in self.received), default=0)

    def watch(self, *numbers: signal.Signals) -> list[signal.Signals]:
        """Record these signals from now on, instead of running their handlers. Only the main thread can do this.

        Returns:
            The signals that were not watched before, for `release`.
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
        """Restore the earlier handlers of these signals."""
        for number in numbers:
            signal.signal(number, self._before.pop(number))
        if numbers and not self._before:
            signal.set_wakeup_fd(-1)

    def forget(self) -> None:
        """Clear the received signals."""
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
