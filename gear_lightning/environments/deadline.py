"""Calls of external code with deadlines, on threads that are abandoned if a call does not return."""

import itertools
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .awaiting import FORKED, give_up
from .base import EnvironmentFailure, FloodError, RewardError, TransientError
from .checks import as_text

MANY = 64  # abandoned calls from which on the user is warned

_abandoned: list[threading.Thread] = []  # threads whose call had not returned at the last check
_warned = False


@dataclass(eq=False)
class Call:
    """A call.

    Attributes:
        key: who asked for it.
        function: what is called.
        seconds: its deadline, from its start.
        result: what the function returned.
        error: why there is no result: `TimeoutError`: the deadline has passed. An async call is canceled; any other
            stays on a daemon thread, which ends when the call returns. `RewardError`: the function raised one.
            `EnvironmentFailure`: it raised another exception, which the text names. A `FloodError` or `TransientError`
            keeps its type, and an `OSError` becomes a `TransientError`.
        started: when it began, on the clock of `time.monotonic`; None if it waits.
    """

    key: Any
    function: Callable[[], Any]
    seconds: float
    result: Any = None
    error: Exception | None = None
    started: float | None = None
    thread: "threading.Thread | None" = field(default=None, repr=False)


class CallPool:
    """Makes calls, each with a deadline, side by side on threads. It is used by one thread.

    Args:
        workers: most calls at the same time.
    """

    def __init__(self, workers: int = 1) -> None:
        self._workers = workers
        self._folder = _here()
        self._waiting: queue.PriorityQueue = queue.PriorityQueue()  # (priority, number, call)
        self._done: queue.SimpleQueue[tuple[Call, Any, Exception | None]] = queue.SimpleQueue()
        self._number = itertools.count()
        self._open: set[Call] = set()  # calls without an outcome
        self._threads: set[threading.Thread] = set()

    @property
    def busy(self) -> int:
        """Number of calls whose outcome `finished` has not returned."""
        return len(self._open)

    @property
    def ready(self) -> int:
        """Number of calls that have returned, and whose outcome `finished` has not returned."""
        return self._done.qsize()

    def __contains__(self, call: Call) -> bool:
        return call in self._open

    def start(self, key: Any, function: Callable[[], Any], seconds: float, priority: int = 0) -> Call:
        """Make a call as soon as a thread is free: those with the smallest priority first."""
        call = Call(key, function, seconds)
        self._open.add(call)
        self._waiting.put((priority, next(self._number), call))
        if len(self._threads) < min(self._workers, len(self._open)):
            self._add_thread()
        return call

    def finished(self, wait: float | None = 0.0) -> list[Call]:
        """Return calls that have ended. Wait up to this number of seconds (None: without limit) for the first one."""
        until = None if wait is None else time.monotonic() + wait
        found = self._collect() + self._expired()
        while self._open and not found and (until is None or time.monotonic() < until):
            try:
                returned = [self._done.get(timeout=self._patience(until))]
            except queue.Empty:
                returned = []
            found = self._collect(returned) + self._expired()
        return found

    def _patience(self, until: float | None) -> float:
        """Return the seconds to the next deadline, or to ``until``."""
        now = time.monotonic()
        ends = [(call.started or now) + call.seconds for call in self._open]
        ends += [] if until is None else [until]
        return max(min(ends) - now, 0.0) + 1e-4

    def __call__(self, function: Callable[[], Any], seconds: float) -> Any:
        """Call a function and return its result.

        Raises:
            Exception: see `Call.error`.
        """
        mine = self.start(None, function, seconds)
        while mine not in self.finished(None):
            continue
        if mine.error is not None:
            raise mine.error
        return mine.result

    def cancel_waiting(self) -> list[Call]:
        """Cancel the calls that have not begun, and return them."""
        found = []
        while True:
            try:
                call = self._waiting.get_nowait()[2]
            except queue.Empty:
                break
            found.append(call)
        self._open.difference_update(found)
        return found

    def close(self) -> None:
        """End the threads after their calls, and wait for the exited processes that calls forked."""
        self.cancel_waiting()
        for _ in self._threads:
            self._waiting.put((0, next(self._number), None))
        self._threads.clear()
        _reap_forks()

    def _add_thread(self) -> None:
        # threads that a call starts inherit the daemon flag, so none of them keeps the process from exiting
        thread = threading.Thread(target=self._serve, daemon=True, name="environment")
        self._threads.add(thread)
        thread.start()

    def _serve(self) -> None:
        process, me = os.getpid(), threading.current_thread()
        while (call := self._waiting.get()[2]) is not None:
            call.thread, call.started = me, time.monotonic()
            result, failure = None, None
            try:
                result = call.function()
            except BaseException as error:  # even SystemExit in a tool counts as a failure of the tool
                failure = _plain_error(error)
            if os.getpid() != process:
                os._exit(FORKED)  # the call forked, and this is the child: it must not continue as a second trainer
            _return_to(self._folder)
            del call.function  # free the call's objects
            self._done.put((call, result, failure))
            del call, result, failure
            if me not in self._threads:  # abandoned, or closed
                return

    def _collect(self, returned: list[tuple[Call, Any, Exception | None]] | None = None) -> list[Call]:
        """Return calls with their outcomes: those of ``returned``, and all further ones that have returned."""
        returned, found = list(returned or ()), []
        while self._done.qsize():
            returned.append(self._done.get())
        for call, result, error in returned:
            if call in self._open:  # else it was abandoned
                self._open.remove(call)
                call.result, call.error = result, error
                found.append(call)
        return found

    def _expired(self) -> list[Call]:
        """Abandon the calls whose deadline has passed."""
        now = time.monotonic()
        found = [c for c in self._open if c.started is not None and now >= c.started + c.seconds]
        for call in found:
            self._open.remove(call)
            call.error = TimeoutError(f"no result within {call.seconds:g} s")
            thread = call.thread
            assert thread is not None
            self._threads.discard(thread)
            _abandon(thread)
            _return_to(self._folder)
            if len(self._threads) < min(self._workers, len(self._open)):
                self._add_thread()
        return found


def _plain_error(error: BaseException) -> Exception:
    """Return an error with the same meaning and a short text, without the traceback, whose frames keep the call's
    objects alive."""
    text, kind = as_text(error), type(error).__name__
    for known in (FloodError, TransientError, EnvironmentFailure, RewardError):
        if isinstance(error, known):
            return known(text)
    if isinstance(error, OSError):  # its type decides whether the call is retried
        return TimeoutError(text) if isinstance(error, TimeoutError) else TransientError(f"{kind}: {text}")
    return EnvironmentFailure(f"{kind}: {text}")


def _here() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # the directory was removed
        return None


def _return_to(folder: str | None) -> None:
    """Undo a change of the working directory, because the run's paths may be relative."""
    if folder is not None and _here() != folder and os.path.isdir(folder):
        os.chdir(folder)


def _abandon(thread: threading.Thread) -> None:
    """Cancel what an abandoned thread awaits. Warn once when there are many of them."""
    global _warned
    give_up(thread)
    _abandoned[:] = [other for other in _abandoned if other.is_alive()]
    _abandoned.append(thread)
    if len(_abandoned) >= MANY and not _warned:
        _warned = True
        warnings.warn(
            f"{len(_abandoned)} calls of environments, tools or rewards have not returned, and each keeps a thread: "
            "run the environment in a separate process, which can be killed "
            "(generation.environment: gear_lightning.environments.sandbox.Isolated)",
            stacklevel=2,
        )


def _reap_forks() -> None:
    """Wait for exited children with status `FORKED`. Other children are waited for by the code that started them."""
    threads = f"/proc/{os.getpid()}/task"
    try:
        children = [pid for thread in os.listdir(threads) for pid in _read(f"{threads}/{thread}/children").split()]
    except OSError:
        return  # not Linux: the children stay zombies until this process exits
    for pid in map(int, children):
        try:
            dead = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if dead is not None and dead.si_status == FORKED:
                os.waitpid(pid, 0)
        except ChildProcessError:
            continue


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:  # the thread has ended, or the kernel does not provide this file
        return ""
