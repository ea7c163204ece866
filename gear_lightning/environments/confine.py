"""Starts an isolated process with resource limits. Runs as a script, by its path: standard library only, Linux only.

There are three processes: the trainer, a keeper that runs no external code, and the confined process. The keeper kills
the confined process and all its descendants when the trainer closes its socket to the keeper, or exits for any reason.
"""

import ctypes
import errno
import importlib
import json
import os
import resource
import select
import signal
import sys
from typing import Any

REFUSED = 97  # exit status: the kernel refuses to create namespaces
_USER, _PID, _NET = 0x10000000, 0x20000000, 0x40000000  # CLONE_NEW...
_DEATH_SIGNAL, _NO_NEW_PRIVS, _SECUREBITS = 1, 38, 28  # PR_SET_...
_NO_ROOT = 0b1111  # securebits, locked: root gets no capabilities
_OTHERS, _MANY = 1_000_000_000, 5000  # range of unused user ids, one for each confined process that root starts
_libc = ctypes.CDLL(None, use_errno=True)


def _system(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _is_real_root() -> bool:
    with open("/proc/self/uid_map") as file:
        return os.getuid() == 0 and file.read().split() == ["0", "0", "4294967295"]


def _unshare_user(others: int) -> None:
    """Move into new namespaces, including a user namespace in which the user keeps its id."""
    user, group = os.getuid(), os.getgid()
    if not _is_real_root():
        _system("unshare", _USER | others)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{user} {user} 1")
        _write("/proc/self/gid_map", f"{group} {group} 1")
        return
    # the kernel does not limit the number of root's processes, so each confined process gets a real user id of its own.
    # Only a process outside the namespace can write the id map that allows this.
    reader, writer = os.pipe()
    outside, me = os.fork(), os.getpid()
    if outside == 0:
        try:
            os.close(writer)
            os.read(reader, 1)
            me = os.getppid()
            _write(f"/proc/{me}/uid_map", f"0 0 1\n{_OTHERS} {_OTHERS} {_MANY}\n")
            _write(f"/proc/{me}/gid_map", "0 0 1\n")
            os._exit(0)
        finally:
            os._exit(1)
    os.close(reader)
    try:
        _system("unshare", _USER | others)
    finally:
        os.close(writer)
        _, status = os.waitpid(outside, 0)
    if status:
        raise OSError(errno.EPERM, "uid_map cannot be written")


class Namespaces:
    """User, process and network namespaces for the children of this process.

    Args:
        network: keep network access, and continue without namespaces if the kernel refuses them.

    Raises:
        OSError: the kernel refuses namespaces, and ``network`` is False.
    """

    def __init__(self, network: bool):
        self.root = _is_real_root()
        try:
            _unshare_user(_PID | (0 if network else _NET))
            self.given = True
        except OSError:
            if not network:
                raise
            self.given = False
        self.made = 0

    def fork_apart(self) -> int:
        """Fork a child in a nested process namespace of its own: when the child exits, all its descendants exit."""
        self.made += 1
        if not self.given:
            return os.fork()
        mine, child = os.open("/proc/self/ns/pid", os.O_RDONLY), -1
        try:
            _system("unshare", _PID)
            child = os.fork()
        finally:
            if child:  # the parent's next children must start in the parent's own namespace
                _system("setns", mine, _PID)
            os.close(mine)
        return child

    def confine(self, limits: dict[str, float]) -> None:
        """Apply resource limits to this process, permanently.

        Args:
            limits: see `gear_lightning.environments.sandbox.Limits`.
        """
        if os.getsid(0) != os.getpid():
            os.setsid()
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        mega, cpu = 1 << 20, resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(limits["cpu_seconds"] + cpu.ru_utime + cpu.ru_stime) + 1
        wanted = {
            resource.RLIMIT_CPU: seconds,
            resource.RLIMIT_AS: held + int(limits["memory_mb"] * mega),
            resource.RLIMIT_FSIZE: int(limits["file_mb"] * mega),
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NOFILE: 256,
        }
        if self.given:
            wanted[resource.RLIMIT_NPROC] = int(limits["processes"])
            if self.root:
                os.setresuid(_OTHERS + self.made % _MANY, 0, 0)
            else:
                _unshare_user(0)  # so that its processes are counted separately from the user's other processes
        for limit, value in wanted.items():
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (value, value))
        _system("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
        if self.given:
            _system("prctl", _SECUREBITS, _NO_ROOT, 0, 0, 0)
            header = (ctypes.c_uint32 * 2)(0x20080522, 0)
            _system("capset", header, (ctypes.c_uint32 * 6)())
        _system("prctl", _DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)  # last: a change of user id resets it


def keep(child: int, line: int, trainer: int) -> int:
    """Wait for a child, and kill it when the trainer closes its socket or exits. Return its exit status as a shell
    does."""
    for notice in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(notice, signal.SIG_IGN)  # the trainer handles the job's signals
    ended, poll = os.pidfd_open(child), select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(line, 0)  # reports only hang-up
    while not poll.poll(1000) and os.getppid() == trainer:
        pass
    end(child)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else 128 - status


def end(child: int) -> None:
    """Kill a process and its session. Call it only before the process has been waited for."""
    for kill in (os.killpg, os.kill):
        try:
            kill(child, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # not a group leader yet
            continue


def main() -> None:
    """Run a command, or a Python function with a given ``sys.path``.

    The only argument is JSON: ``trainer`` (process id), ``line`` (file descriptor of the socket), ``network`` (bool),
    ``limits``, and either ``command``, or ``call`` and ``path``. ``call`` is a module and the name of a function that
    takes the file descriptor, the namespaces and the limits.
    """
    options = json.loads(sys.argv[1])
    try:
        namespaces = Namespaces(options["network"])
    except OSError as error:
        print(error, file=sys.stderr)
        raise SystemExit(REFUSED) from None
    child = os.fork()
    if child:
        os._exit(keep(child, options["line"], options["trainer"]))
    if "command" in options:
        os.close(options["line"])
        namespaces.confine(options["limits"])
        os.execv(options["command"][0], options["command"])
    _system("prctl", _DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    os.setsid()
    sys.path[:] = options["path"]
    module, function = options["call"]
    getattr(importlib.import_module(module), function)(options["line"], namespaces, options["limits"])


if __name__ == "__main__":
    main()
