"""The server side of `sandbox.Isolated`: a server that forks a process with resource limits for each rollout.

Requests of the trainer are pickled. Answers are JSON of limited size, because the trainer does not trust them.
"""

import json
import os
import pickle
import resource
import select
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from .awaiting import awaited
from .base import Environment, EnvironmentFailure, FloodError, RewardError, TransientError
from .checks import as_text, checked_messages, checked_step
from .confine import Namespaces, end

LARGEST = 1 << 26  # maximum size of one answer, bytes
_LENGTH = struct.Struct("!Q")


def send(line: socket.socket, data: bytes) -> None:
    """Send one frame."""
    line.sendall(_LENGTH.pack(len(data)) + data)


def receive(line: socket.socket, largest: int | None = None) -> bytes | None:
    """Return the next frame; None if the other side has closed the socket.

    Raises:
        FloodError: the frame has more than ``largest`` bytes; none of them is read.
    """
    header = _exactly(line, _LENGTH.size)
    if header is None:
        return None
    (size,) = _LENGTH.unpack(header)
    if largest is not None and size > largest:
        raise FloodError(f"the environment's process sent {size:,} bytes at once, expected at most {largest:,}")
    return _exactly(line, size)


def _exactly(line: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        try:
            part = line.recv(min(size - len(data), 1 << 20))
        except ConnectionError:
            return None
        if not part:
            return None
        data += part
    return bytes(data)


def serve(line: int, namespaces: Namespaces, limits: dict[str, float]) -> None:
    """Run environments until the trainer closes its socket.

    Args:
        line: file descriptor of the socket to the trainer. The first frame is the pickled environment factory. After
            that, each byte comes with the socket of one rollout.
        namespaces: the namespaces of the rollouts' processes.
        limits: limits of each process, see `sandbox.Limits`.
    """
    control = socket.socket(fileno=line)
    pickled = receive(control)
    if pickled is None:
        return
    try:
        factory = pickle.loads(pickled)
        send(control, b"")
    except BaseException as error:  # importing a module can raise any exception
        send(control, f"{type(error).__name__}: {as_text(error)}".encode("utf-8", "replace"))
        return
    _Server(control, factory, namespaces, limits).run()


class _Server:
    def __init__(
        self,
        control: socket.socket,
        factory: Callable[[], Environment],
        namespaces: Namespaces,
        limits: dict[str, float],
    ):
        self.control, self.factory, self.namespaces, self.limits = control, factory, namespaces, limits
        self.rollouts: dict[int, tuple[int, socket.socket]] = {}  # file descriptor -> process, socket to the trainer
        self.poll = select.poll()

    def run(self) -> None:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each running rollout needs one
        woken, wake = os.pipe()
        os.set_blocking(woken, False)
        os.set_blocking(wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self.poll.register(self.control, select.POLLIN)
        self.poll.register(woken, select.POLLIN)
        try:
            while True:
                for place, _ in self.poll.poll():
                    if place == woken:
                        with suppress(BlockingIOError):
                            os.read(woken, 1 << 10)
                    elif place != self.control.fileno():
                        self.poll.unregister(place)  # the trainer has closed this rollout's socket
                        end(self.rollouts[place][0])
                    elif not self.accept():
                        return
                self.reap()
        finally:
            for process, _ in self.rollouts.values():
                end(process)

    def accept(self) -> bool:
        """Start a process for the next rollout. Return False if the trainer has closed its socket."""
        data, places, _, _ = socket.recv_fds(self.control, 1, 1)
        if not data:
            return False
        if not places:  # the limit of file descriptors is reached; the trainer finds the rollout's socket closed
            return True
        line = socket.socket(fileno=places[0])
        try:
            process = self.namespaces.fork_apart()
        except OSError as error:
            send_json(line, {"died": f"no process could be started for the rollout: {error}"})
            line.close()
            return True
        if process == 0:
            self.run_rollout(line)
        self.rollouts[line.fileno()] = process, line
        self.poll.register(line, 0)  # reports only hang-up: the rollout's process reads the data
        return True

    def reap(self) -> None:
        """Wait for each process that has exited, and report it to the trainer."""
        while True:
            try:
                process, status, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            for place, (known, line) in list(self.rollouts.items()):
                if known == process:
                    with suppress(KeyError):
                        self.poll.unregister(place)
                    send_json(line, {"died": self.cause(status, used.ru_utime + used.ru_stime)})
                    line.close()
                    del self.rollouts[place]

    def cause(self, status: int, seconds: float) -> str:
        code = os.waitstatus_to_exitcode(status)
        if code >= 0:
            return f"exit status {code}"
        if -code == signal.SIGKILL and seconds >= self.limits["cpu_seconds"]:
            return f"it used more processor time than limits.cpu_seconds={self.limits['cpu_seconds']:g}"
        return f"killed by {signal.Signals(-code).name}"

    def run_rollout(self, line: socket.socket) -> NoReturn:
        """Run one rollout, in this forked process."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.control.close()
            for _, other in self.rollouts.values():
                other.close()
            self.namespaces.confine(self.limits)
            answers = _Rollout(self.factory)
            while (call := receive(line)) is not None:
                answer = answers(*pickle.loads(call))
                if os.getpid() != answers.process:  # the environment forked, and this is the child
                    break
                send_json(line, answer)
        finally:
            os._exit(0)


def send_json(line: socket.socket, answer: dict[str, Any]) -> None:
    """Send an answer as JSON. Ignore errors: the trainer may have closed the socket."""
    with suppress(OSError):
        send(line, json.dumps(answer).encode())


class _Rollout:
    """Runs one environment, one call at a time."""

    def __init__(self, factory: Callable[[], Environment]):
        self.factory = factory
        self.process = os.getpid()

    def __call__(self, name: str, *arguments: Any) -> dict[str, Any]:
        try:
            return getattr(self, name)(*arguments)
        except BaseException as error:  # SystemExit also counts as a failure of the environment
            return {"error": _kind(error), "text": _text(error)}

    def reset(self, task: Any, seed: int) -> dict[str, Any]:
        self.environment = awaited(self.factory())
        return {"messages": checked_messages(awaited(self.environment.reset(task, seed=seed)), "reset", LARGEST)}

    def step(self, message: Any) -> dict[str, Any]:
        return vars(checked_step(awaited(self.environment.step(message)), LARGEST))

    def close(self) -> dict[str, Any]:
        awaited(self.environment.close())
        return {}


_KINDS = (
    (RewardError, "reward"),
    (FloodError, "flood"),
    (TransientError, "transient"),
    (TimeoutError, "timeout"),
    (OSError, "transient"),
)


def _kind(error: BaseException) -> str:
    return next((name for kind, name in _KINDS if isinstance(error, kind)), "failure")


def _text(error: BaseException) -> str:
    complete = isinstance(error, RewardError | EnvironmentFailure | TimeoutError)
    return as_text(error) if complete else f"{type(error).__name__}: {as_text(error)}"
