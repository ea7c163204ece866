"""Rollouts that are generated on a thread, while the policy is updated."""

import threading
from collections.abc import Callable

from ..rollout import Rollout

Report = Callable[[int, int, int], None]  # (finished rollouts, all rollouts, sampled tokens)


class Flight:
    """A rollout phase on a thread.

    Args:
        stop: whether the run ends; called on the thread.
        report: progress, which is reported only while the rollouts are waited for.
        keeps_weights: whether all conversations must be finished with the weights they began with.
    """

    def __init__(self, stop: Callable[[], bool], report: Report, keeps_weights: bool = False):
        self._stop, self._report = stop, report
        self.keeps_weights = keeps_weights
        self._canceled = self._awaited = False
        self._rollouts: list[Rollout] = []
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def stop(self) -> bool:
        """Return whether the rollouts must end now."""
        return self._canceled or self._stop()

    def report(self, finished: int, rollouts: int, tokens: int) -> None:
        """Report progress."""
        if self._awaited:
            self._report(finished, rollouts, tokens)

    def start(self, play: Callable[[], list[Rollout]]) -> None:
        """Generate the rollouts on a thread."""

        def run() -> None:
            try:
                self._rollouts = play()
            except BaseException as error:  # raised again where the rollouts are needed
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True, name="rollouts")
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether the thread has ended."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the rollouts have ended."""
        self._awaited = True
        assert self._thread is not None
        self._thread.join()
        self._awaited = False

    def result(self) -> list[Rollout]:
        """Wait for the rollouts.

        Raises:
            BaseException: what generating them has raised.
        """
        self.wait()
        if self._error is not None:
            raise self._error
        return self._rollouts

    def cancel(self) -> None:
        """End the rollouts."""
        self._canceled = True
        if self._thread is not None:
            self.wait()
