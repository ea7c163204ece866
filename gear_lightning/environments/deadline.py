"""Calls of foreign code with a deadline, on a thread that is given up where the call does not come back."""

import os
import queue
import threading
import warnings
from collections.abc import Callable
from typing import Any

from .base import EnvironmentFailure, FloodError, RewardError, TransientError
from .checks import as_text

FORKED = 70  # exit status of a fork of this process that came back out of a call
MANY = 64  # calls left behind at which the user hears of it

_left_behind: list[threading.Thread] = []  # threads whose call had not come back when last looked at
_told = False


class _Worker:
    """A thread that runs calls one after another; given up for good when one hangs."""

    def __init__(self, folder: str | None) -> None:
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._folder = folder
        # threads that a call starts inherit the daemon flag: none of them keeps the process from ending
        self.thread = threading.Thread(target=self._serve, daemon=True, name="environment")
        self.thread.start()

    def _serve(self) -> None:
        process = os.getpid()
        while (call := self._calls.get()) is not None:
            function, answer = call
            try:
                found = function(), None
            except BaseException as error:  # even SystemExit of a tool is that tool's failure
                found = None, _told_of(error)
            if os.getpid() != process:
                os._exit(FORKED)  # the call forked, and this is the child: it must not go on as a second trainer
            _return_to(self._folder)
            answer.put(found)
            del call, function, answer, found  # nothing of a call is kept until the next one

    def stop(self) -> None:
        """End the thread after the calls that it has."""
        self._calls.put(None)

    def start(self, function: Callable[[], Any]) -> "queue.SimpleQueue":
        answer: queue.SimpleQueue = queue.SimpleQueue()
        self._calls.put((function, answer))
        return answer


class DeadlineRunner:
    """Runs functions with a deadline, on a thread that is replaced when a function does not come back in time."""

    def __init__(self) -> None:
        self._folder = _here()
        self._worker = _Worker(self._folder)

    def close(self) -> None:
        """Let the thread go, and bury the forks of calls."""
        self._worker.stop()
        _reap_forks()

    def __call__(self, function: Callable[[], Any], seconds: float) -> Any:
        """The function's result.

        Raises:
            TimeoutError: no result in time; the call is left behind on a daemon thread, which ends when it comes back.
            RewardError: the function raised one.
            EnvironmentFailure: it raised something else, which the text names; a `FloodError` or `TransientError`
                where it was one, or an `OSError`.
        """
        answer = self._worker.start(function)
        try:
            result, error = answer.get(timeout=seconds)
        except queue.Empty:
            _leave(self._worker)
            _return_to(self._folder)
            self._worker = _Worker(self._folder)
            raise TimeoutError(f"no answer within {seconds:g} s") from None
        if error is not None:
            raise error
        return result


def _told_of(error: BaseException) -> Exception:
    """An error without its traceback, whose frames hold what the call held, and with a text that is short and made."""
    text, kind = as_text(error), type(error).__name__
    for known in (FloodError, TransientError, EnvironmentFailure, RewardError):
        if isinstance(error, known):
            return known(text)
    if isinstance(error, OSError):  # its kind decides whether another try helps
        return TimeoutError(text) if isinstance(error, TimeoutError) else TransientError(f"{kind}: {text}")
    return EnvironmentFailure(f"{kind}: {text}")


def _here() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _return_to(folder: str | None) -> None:
    """Undo a change of the working directory, for the run's paths may be relative."""
    if folder is not None and _here() != folder and os.path.isdir(folder):
        os.chdir(folder)


def _leave(worker: _Worker) -> None:
    """Give a worker up; tell the user, once, where there are many such."""
    global _told
    worker.stop()
    _left_behind[:] = [thread for thread in _left_behind if thread.is_alive()]
    _left_behind.append(worker.thread)
    if len(_left_behind) >= MANY and not _told:
        _told = True
        warnings.warn(
            f"{len(_left_behind)} calls of environments, tools or rewards have not come back, and each keeps a thread: "
            "play the environment in a process of its own, which can be ended "
            "(generation.environment: gear_lightning.environments.sandbox.Isolated)",
            stacklevel=2,
        )


def _reap_forks() -> None:
    """Take the exit status of dead children with `FORKED`; no other's, for whoever started those waits for them."""
    threads = f"/proc/{os.getpid()}/task"
    try:
        children = [pid for thread in os.listdir(threads) for pid in _read(f"{threads}/{thread}/children").split()]
    except OSError:
        return  # not Linux: they are buried with this process
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
    except OSError:  # the thread has ended, or the kernel does not tell
        return ""
