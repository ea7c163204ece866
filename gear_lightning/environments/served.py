"""The side of `sandbox.Isolated` that plays: a server that forks, for each rollout, a process held to limits.

The trainer pickles what it asks; what comes back is JSON, of which the trainer reads no more than it wants.
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

from .base import Environment, EnvironmentFailure, FloodError, RewardError, TransientError
from .checks import as_text, checked_messages, checked_step
from .confine import Namespaces, end

LARGEST = 1 << 26  # bytes of one answer
_LENGTH = struct.Struct("!Q")


def send(line: socket.socket, data: bytes) -> None:
    """Send one frame."""
    line.sendall(_LENGTH.pack(len(data)) + data)


def receive(line: socket.socket, largest: int | None = None) -> bytes | None:
    """The next frame; None where the other side has hung up.

    Raises:
        FloodError: it has more than ``largest`` bytes; none of them is read.
    """
    header = _exactly(line, _LENGTH.size)
    if header is None:
        return None
    (size,) = _LENGTH.unpack(header)
    if largest is not None and size > largest:
        raise FloodError(f"the environment's process gave {size:,} bytes at once, expected at most {largest:,}")
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
    """Play environments until the trainer hangs up.

    Args:
        line: socket to the trainer. The first frame is the pickled factory of environments; then each byte comes with
            a socket, over which one rollout is played.
        namespaces: where the rollouts' processes live.
        limits: of each, see `sandbox.Limits`.
    """
    control = socket.socket(fileno=line)
    told = receive(control)
    if told is None:
        return
    try:
        factory = pickle.loads(told)
        send(control, b"")
    except BaseException as error:  # modules may raise anything when they are imported
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
        self.playing: dict[int, tuple[int, socket.socket]] = {}  # file descriptor -> process, line to the trainer
        self.poll = select.poll()

    def run(self) -> None:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one for each rollout that is played at the time
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
                        self.poll.unregister(place)  # the trainer has let go of this rollout
                        end(self.playing[place][0])
                    elif not self.take():
                        return
                self.bury()
        finally:
            for process, _ in self.playing.values():
                end(process)

    def take(self) -> bool:
        """Start a process for the next rollout. Returns False where the trainer has hung up."""
        data, places, _, _ = socket.recv_fds(self.control, 1, 1)
        if not data:
            return False
        if not places:  # no room for another descriptor; the trainer finds nobody there
            return True
        line = socket.socket(fileno=places[0])
        try:
            process = self.namespaces.fork_apart()
        except OSError as error:
            tell(line, {"died": f"no process can be started for it: {error}"})
            line.close()
            return True
        if process == 0:
            self.play(line)
        self.playing[line.fileno()] = process, line
        self.poll.register(line, 0)  # hang-up alone: what comes is the process's to read
        return True

    def bury(self) -> None:
        """Tell the trainer of each process that has ended."""
        while True:
            try:
                process, status, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            for place, (known, line) in list(self.playing.items()):
                if known == process:
                    with suppress(KeyError):
                        self.poll.unregister(place)
                    tell(line, {"died": self.cause(status, used.ru_utime + used.ru_stime)})
                    line.close()
                    del self.playing[place]

    def cause(self, status: int, seconds: float) -> str:
        code = os.waitstatus_to_exitcode(status)
        if code >= 0:
            return f"it left with status {code}"
        if -code == signal.SIGKILL and seconds >= self.limits["cpu_seconds"]:
            return f"it took more processor time than limits.cpu_seconds={self.limits['cpu_seconds']:g}"
        return f"it was ended by {signal.Signals(-code).name}"

    def play(self, line: socket.socket) -> NoReturn:
        """Play one rollout, in this forked process."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.control.close()
            for _, other in self.playing.values():
                other.close()
            self.namespaces.confine(self.limits)
            answers = _Rollout(self.factory)
            while (call := receive(line)) is not None:
                answer = answers(*pickle.loads(call))
                if os.getpid() != answers.process:  # the environment forked, and this is the child
                    break
                tell(line, answer)
        finally:
            os._exit(0)


def tell(line: socket.socket, answer: dict[str, Any]) -> None:
    """Send an answer as JSON; nobody may be there to hear it."""
    with suppress(OSError):
        send(line, json.dumps(answer).encode())


class _Rollout:
    """Plays one environment by calls."""

    def __init__(self, factory: Callable[[], Environment]):
        self.factory = factory
        self.process = os.getpid()

    def __call__(self, name: str, *arguments: Any) -> dict[str, Any]:
        try:
            return getattr(self, name)(*arguments)
        except BaseException as error:  # SystemExit too is the environment's failure
            return {"error": _kind(error), "text": _text(error)}

    def reset(self, task: Any, seed: int) -> dict[str, Any]:
        self.environment = self.factory()
        return {"messages": checked_messages(self.environment.reset(task, seed=seed), "reset", LARGEST)}

    def step(self, message: Any) -> dict[str, Any]:
        return vars(checked_step(self.environment.step(message), LARGEST))

    def close(self) -> dict[str, Any]:
        self.environment.close()
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
    told = isinstance(error, RewardError | EnvironmentFailure | TimeoutError)
    return as_text(error) if told else f"{type(error).__name__}: {as_text(error)}"
