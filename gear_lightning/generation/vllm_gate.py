"""What the phases of a `VLLMEngine` share: which weights the servers have, and when turns must wait for new ones."""

import contextlib
import threading
from collections.abc import Iterator


class Gate:
    """Lets turns through side by side, and updates of the weights alone.

    Attributes:
        weights: fingerprint of the weights that the servers have; None while it is unknown.
        version: optimizer steps of these weights.
        cached: tokens of prompts that were found in the servers' caches.
        prompted: tokens of all prompts.
    """

    def __init__(self) -> None:
        self.weights: str | None = None
        self.version = self.cached = self.prompted = 0
        self._changed = threading.Condition()
        self._turns, self._closed = 0, False

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no update is in progress; in the context, none begins."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._turns += 1
        try:
            yield
        finally:
            with self._changed:
                self._turns -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """Wait until the turns that have begun have ended; in the context, none begins."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._turns)
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()
