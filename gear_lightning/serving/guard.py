"""Runs a command that must not outlive the process that started it: ``guard.py PID SECONDS COMMAND ...``.

The command gets a session of its own. If the parent ``PID`` ends in any way (SIGKILL included), or if this process gets
SIGTERM, all processes of the session's group get SIGTERM, and SIGKILL after ``SECONDS``. This file is run by its path,
and imports nothing but the standard library, so that it starts at once.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

LOOK = 0.1  # seconds between two looks at the parent
PR_SET_PDEATHSIG = 1


def _end_with_guard() -> None:
    """Let the kernel kill the command if this process is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal(group: int, number: int) -> bool:
    """Send a signal to a group, and return whether it has processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
        return True
    return False


def main(parent: int, seconds: float, command: list[str]) -> int:
    """Run a command, and return its exit status once no process of its group is left."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: asked.append(number))
    child = subprocess.Popen(command, start_new_session=True, preexec_fn=_end_with_guard)
    while child.poll() is None and not asked and os.getppid() == parent:
        time.sleep(LOOK)
    end = time.monotonic() + seconds
    while _signal(child.pid, signal.SIGTERM) and time.monotonic() < end:
        child.poll()  # a process that has ended counts as one of the group until its parent has waited for it
        time.sleep(LOOK)
    _signal(child.pid, signal.SIGKILL)
    return child.wait()


if __name__ == "__main__":
    status = main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
    sys.exit(status if status >= 0 else 128 - status)
