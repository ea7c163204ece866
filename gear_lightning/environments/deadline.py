"""Calls of external code with a deadline, on a thread that is abandoned if the call does not return."""

import os
import queue
import threading
import warnings
from collections.abc import Callable
from typing import Any

from .awaiting import FORKED, give_up
from .base import EnvironmentFailure, FloodError, RewardError, TransientError
from .checks import as_text

MANY = 64  # abandoned calls from which on the user is warned

_abandoned: list[threading.Thread] = []  # threads whose call had not returned at the last check
_warned = False


class _Worker:
    """A thread that runs calls one after another. It is abandoned when a call hangs."""

    def __init__(self, folder: str | None) -> None:
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._folder = folder
        # threads that a call starts inherit the daemon flag, so none of them keeps the process from exiting
        self.thread = threading.Thread(target=self._serve, daemon=True, name="environment")
        self.thread.start()

    def _serve(self) -> None:
        process = os.getpid()
        while (call := self._calls.get()) is not None:
            function, answer = call
            try:
                found = function(), None
            except BaseException as error:  # even SystemExit in a tool counts as a failure of the tool
                found = None, _plain_error(error)
            if os.getpid() != process:
                os._exit(FORKED)  # the call forked, and this is the child: it must not continue as a second trainer
            _return_to(self._folder)
            answer.put(found)
            del call, function, answer, found  # free the call's objects before waiting for the next call

    def stop(self) -> None:
        """End the thread after its queued calls."""
        self._calls.put(None)

    def start(self, function: Callable[[], Any]) -> "queue.SimpleQueue":
        answer: queue.SimpleQueue = queue.SimpleQueue()
        self._calls.put((function, answer))
        return answer


class DeadlineRunner:
    """Runs functions with a deadline, on a thread that is replaced when a function does not return in time."""

    def __init__(self) -> None:
        self._folder = _here()
        self._worker = _Worker(self._folder)

    def close(self) -> None:
        """Stop the thread, and wait for the exited processes that calls forked."""
        self._worker.stop()
        _reap_forks()

    def __call__(self, function: Callable[[], Any], seconds: float) -> Any:
        """Call the function and return its result.

        Raises:
            TimeoutError: no result in time. An async call is canceled; any other stays on a daemon thread, which ends
                when the call returns.
            RewardError: the function raised one.
            EnvironmentFailure: the function raised another exception, which the text names. A `FloodError` or
                `TransientError` keeps its type, and an `OSError` becomes a `TransientError`.
        """
        answer = self._worker.start(function)
        try:
            result, error = answer.get(timeout=seconds)
        except queue.Empty:
            _abandon(self._worker)
            _return_to(self._folder)
            self._worker = _Worker(self._folder)
            raise TimeoutError(f"no result within {seconds:g} s") from None
        if error is not None:
            raise error
        return result


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


def _abandon(worker: _Worker) -> None:
    """Abandon a worker, and cancel what it awaits. Warn once when there are many abandoned workers."""
    global _warned
    worker.stop()
    give_up(worker.thread)
    _abandoned[:] = [thread for thread in _abandoned if thread.is_alive()]
    _abandoned.append(worker.thread)
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
