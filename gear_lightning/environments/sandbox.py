"""Runs environments in separate processes, with resource limits and without network."""

import atexit
import functools
import json
import math
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UserError
from . import confine
from .awaiting import awaited
from .base import Environment, EnvironmentFailure, FloodError, Message, RewardError, Task, TransientError
from .checks import CheckedStep, refuse_generator_methods
from .served import LARGEST, receive, send, serve

Network = Literal["none", "allow"]

START_SECONDS = 300  # for the import of an environment's modules
CLOSE_SECONDS = 5  # for an environment's own close
_PLAIN = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH")  # variables without secrets


@dataclass(frozen=True)
class Limits:
    """Resource limits of a confined process. All except ``processes`` apply to each process separately.

    Args:
        cpu_seconds: processor time.
        memory_mb: address space beyond what the interpreter and the environment's modules use at the start.
        file_mb: size of each file that the process writes. The number of files is not limited.
        processes: total number of processes and threads of one rollout or call.
    """

    cpu_seconds: float = 60.0
    memory_mb: float = 1024.0
    file_mb: float = 64.0
    processes: int = 16

    def __post_init__(self):
        for name, value in self.as_dict().items():
            if not 0 < value < math.inf:
                raise UserError(f"limits.{name}={value}: must be above 0 and finite")

    def as_dict(self) -> dict[str, float]:
        """Return the limits as a dict, in the format of `confine`."""
        return {
            "cpu_seconds": self.cpu_seconds,
            "memory_mb": self.memory_mb,
            "file_mb": self.file_mb,
            "processes": self.processes,
        }


class Isolated(Environment):
    """Runs another environment in separate processes, one for each rollout.

    Effects of the environment and of its reward are limited to its rollout: a process that hangs, floods, forks,
    crashes or exceeds a limit fails only that rollout, and every process that it started is killed at the end of the
    rollout, also if the trainer is killed. The processes have no access to the network or to the trainer's environment
    variables, and cannot gain privileges. They can access the user's files: this does not protect against an attacker.
    Their output is discarded. Linux only.

    The environment's module is imported once, in a server process that forks one process for each rollout, so no state
    carries over from one episode to the next. The trainer imports the module too, to check the tasks before training.
    Only messages and numbers are sent back.

    Args:
        environment: creates the environment: a class in an importable module, with its options.
        limits: limits of each rollout.
        network: ``none`` for no network, ``allow`` for network access. If the kernel permits no namespaces, ``none`` is
            rejected; with ``allow``, the processes are then killed by their session, and ``limits.processes`` is not
            enforced.
        variables: names of the trainer's environment variables that the environment sees, besides ``PATH``, the
            language, the time zone, ``TMPDIR`` and ``LD_LIBRARY_PATH``.
    """

    def __init__(
        self,
        environment: Callable[[], Environment],
        limits: Limits = Limits(),
        network: Network = "none",
        variables: Sequence[str] = (),
    ):
        self.environment = environment
        self.limits = limits
        self.network: Network = network
        self.variables = tuple(variables)
        self._line: socket.socket | None = None
        self._asking = False

    def check(self, task: Task) -> None:
        require_confinement(self.network)
        try:
            inner: Environment = awaited(self.environment())
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"Isolated: the environment cannot be created: {type(error).__name__}: {error}") from error
        refuse_generator_methods(inner)
        awaited(inner.check(task))
        self.reports_decisions = inner.reports_decisions
        try:
            pickle.dumps(task)
        except Exception as error:
            raise UserError(f"task {task.id} cannot be sent to another process: {error}") from error
        self._server()

    def reset(self, task: Task, *, seed: int) -> list[Message]:
        super().reset(task, seed=seed)
        self._line = self._server().open()
        return self._ask("reset", task, seed)["messages"]

    def step(self, message: Message) -> CheckedStep:
        return CheckedStep(**self._ask("step", message))

    def close(self) -> None:
        line, self._line = self._line, None
        if line is None:
            return
        try:
            if not self._asking:
                line.settimeout(CLOSE_SECONDS)
                self._ask_on(line, "close")
        finally:
            hang_up(line)  # ends the process, and wakes a thread that still waits for it

    def _server(self) -> "_Server":
        try:
            factory = pickle.dumps(_bare(self.environment))
        except Exception as error:
            raise UserError(
                f"Isolated cannot send its environment to another process ({error}); use a class of an importable "
                "module, or a functools.partial of one"
            ) from error
        return server(factory, self.limits, self.network, self.variables)

    def _ask(self, name: str, *arguments: Any) -> dict[str, Any]:
        assert self._line is not None
        return self._ask_on(self._line, name, *arguments)

    def _ask_on(self, line: socket.socket, name: str, *arguments: Any) -> dict[str, Any]:
        self._asking = True  # until the answer arrives
        with suppress(ConnectionError):  # the process has exited; the cause can still be read from the socket
            send(line, pickle.dumps((name, *arguments)))
        data = receive(line, LARGEST)
        if data is None:
            raise EnvironmentFailure("the environment's process has exited")
        answer = json.loads(data)
        if "died" in answer:
            raise EnvironmentFailure(f"the environment's process has exited: {answer['died']}")
        self._asking = False
        if "error" in answer:
            raise _ERRORS[answer["error"]](answer["text"])
        return answer


def _bare(factory: Any) -> Any:
    """Return a factory without the wrapper that the command line's parser adds, which cannot be pickled."""
    wrapped = isinstance(factory, functools.partial) and factory.func.__module__.startswith("jsonargparse")
    if not wrapped or not factory.args or not isinstance(factory.args[-1], type):
        return factory
    return functools.partial(factory.args[-1], **{name: _bare(value) for name, value in factory.keywords.items()})


_ERRORS = {
    "reward": RewardError,
    "flood": FloodError,
    "timeout": TimeoutError,
    "transient": TransientError,
    "failure": EnvironmentFailure,
}


def hang_up(line: socket.socket) -> None:
    """Close a socket, and wake threads that wait for it."""
    with suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
    line.close()


# -- processes --------------------------------------------------------------------------------------------------------


def start(config: dict[str, Any], environ: dict[str, str], **options: Any) -> tuple[subprocess.Popen, socket.socket]:
    """Start a confined process.

    Args:
        config: options of the process, see `confine.main`.
        environ: its environment variables.
        options: options of `subprocess.Popen`.

    Returns:
        Its keeper, and the trainer's end of the socket to it. The process ends when the socket is closed.
    """
    mine, theirs = socket.socketpair()
    with theirs:
        config = {"trainer": os.getpid(), "line": theirs.fileno(), **config}
        site = [] if "call" in config else ["-S"]
        keeper = subprocess.Popen(
            [sys.executable, "-I", *site, confine.__file__, json.dumps(config)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environ,
            start_new_session=True,  # only the trainer must receive the terminal's interrupts
            **options,
        )
    return keeper, mine


def plain_variables(names: Sequence[str] = ()) -> dict[str, str]:
    """Return environment variables for a confined process: those without secrets, and those in ``names``."""
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # limits.processes counts threads too
    return one_thread | {name: os.environ[name] for name in (*_PLAIN, *names) if name in os.environ}


@functools.cache
def require_confinement(network: Network) -> None:
    """Check that this machine can confine processes.

    Raises:
        UserError: the kernel does not permit it, or this is not Linux.
    """
    if not sys.platform.startswith("linux"):
        raise UserError("processes with resource limits need Linux")
    options = {
        "network": network == "allow",
        "limits": Limits().as_dict(),
        "command": [sys.executable, "-I", "-S", "-c", ""],
    }
    keeper, line = start(options, plain_variables(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with line:
        output = keeper.communicate()[0].decode(errors="replace").strip()
    if keeper.returncode == confine.REFUSED:
        raise UserError(
            f"this kernel or container permits no namespaces ({output}), so network access cannot be blocked; permit "
            "unprivileged user namespaces, or set network: allow"
        )
    if keeper.returncode:
        raise UserError(f"a process with resource limits cannot be started: {output}")


class _Server:
    """The server process, which forks the processes of rollouts."""

    def __init__(self, factory: bytes, limits: Limits, network: Network, variables: tuple[str, ...]):
        require_confinement(network)
        config = {"network": network == "allow", "limits": limits.as_dict(), "path": sys.path}
        config["call"] = [serve.__module__, serve.__name__]
        nothing = subprocess.DEVNULL
        self.keeper, self.line = start(config, plain_variables(variables), stdout=nothing, stderr=nothing)
        self.owner = os.getpid()
        self.line.settimeout(START_SECONDS)
        try:
            send(self.line, factory)
            wrong = receive(self.line)
        except TimeoutError:
            wrong = b"no answer within %d s" % START_SECONDS
        if wrong != b"":
            self.close()
            reason = "the process exited immediately" if wrong is None else wrong.decode(errors="replace")
            raise UserError(f"the environment cannot be loaded in a separate process: {reason}")
        self.line.settimeout(None)

    def alive(self) -> bool:
        """Return whether the server can be used; False in a fork of the process that started it."""
        return self.owner == os.getpid() and self.keeper.poll() is None

    def open(self) -> socket.socket:
        """Start a process for one rollout. Return the socket to it; the process ends when the socket is closed."""
        mine, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self.line, [b"+"], [theirs.fileno()])
        return mine

    def close(self) -> None:
        """End the server and all its rollouts."""
        if self.owner != os.getpid():
            self.line.close()  # a fork of the trainer only closes its copy of the socket
            return
        hang_up(self.line)
        try:
            self.keeper.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.keeper.kill()
            self.keeper.wait()


_servers: dict[tuple, _Server] = {}
_lock = threading.Lock()


def server(factory: bytes, limits: Limits, network: Network, variables: tuple[str, ...]) -> _Server:
    """Return the server of an environment; start a new one if there is none or it has exited."""
    key = factory, limits, network, variables
    with _lock:
        if key not in _servers or not _servers[key].alive():
            if key in _servers:
                _servers.pop(key).close()
            _servers[key] = _Server(*key)
        return _servers[key]


@atexit.register
def _close_servers() -> None:
    for one in _servers.values():
        one.close()
    _servers.clear()
