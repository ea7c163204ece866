"""A Python interpreter as a tool. Each call runs in its own confined process."""

import math
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import UserError
from ..rewards import RewardChoice
from .base import Task
from .sandbox import Limits, Network, hang_up, plain_variables, require_confinement, start
from .tools import ToolEnvironment, ToolError, unknown_tool

CALL = Limits(cpu_seconds=5, memory_mb=512, file_mb=16, processes=8)


def python(code: str) -> str:
    """Run a Python program and give what it prints.

    Args:
        code: the program. Each is run afresh, in an empty directory that is removed afterwards.
    """
    return run_python(code)


def run_python(
    code: str, *, seconds: float = 10.0, limits: Limits = CALL, network: Network = "none", output_bytes: int = 10_000
) -> str:
    """Run a program and return its output (stdout and stderr), followed by its exit status if that is not 0.

    Args:
        code: the program.
        seconds: wall-clock limit. When it is reached, the output so far is returned with a note.
        limits: limits of its processes.
        network: ``none`` for no network, ``allow`` for network access.
        output_bytes: maximum size of the output. The program is killed when it prints more.

    Raises:
        ToolError: the program cannot be encoded as UTF-8.
        UserError: this machine cannot confine processes.
    """
    require_confinement(network)
    with TemporaryDirectory(prefix="python-tool-", ignore_cleanup_errors=True) as folder:
        try:
            Path(folder, "main.py").write_text(code, encoding="utf-8")
        except UnicodeEncodeError:
            raise ToolError("the program holds half a character") from None
        environ = plain_variables() | {"HOME": folder, "TMPDIR": folder}
        command = [sys.executable, "-I", "-B", "-X", "utf8", "main.py"]
        options = {"network": network == "allow", "limits": limits.as_dict(), "command": command}
        keeper, line = start(options, environ, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            printed, note = _read(keeper, seconds, output_bytes)
        finally:
            hang_up(line)  # the keeper kills the remaining processes and exits
            keeper.communicate()
    printed = printed.replace(folder + os.sep, "")  # a traceback must be the same in every run
    if not note and keeper.returncode:
        note = f"[exit status {keeper.returncode}]"
    return "\n".join(part for part in (printed.rstrip("\n"), note) if part)


def _read(keeper: subprocess.Popen, seconds: float, output_bytes: int) -> tuple[str, str]:
    """Return what a process prints until it exits, prints too much, or takes too long, and a note in the last two
    cases."""
    assert keeper.stdout is not None
    data, note, until = bytearray(), "", time.monotonic() + seconds
    with selectors.DefaultSelector() as ready:
        ready.register(keeper.stdout, selectors.EVENT_READ)
        while True:
            if not ready.select(max(0.0, until - time.monotonic())):
                note = f"[ended after {seconds:g} s]"
                break
            part = os.read(keeper.stdout.fileno(), 1 << 16)
            data += part
            if len(data) > output_bytes:
                note = f"[ended after {output_bytes:,} bytes of output]"
                break
            if not part:
                keeper.wait()
                break
    return data[:output_bytes].decode("utf-8", "replace"), note


class PythonTool(ToolEnvironment):
    """Answers calls of ``python(code)`` by running the program. The first message without a call is the final answer.

    Each call is a new process with limits, without network, in an empty temporary directory, without the trainer's
    environment variables, under ``python -I`` of the trainer's own interpreter. This protects the run and the machine
    from a program's mistakes: endless loops, forks, memory, large files, network requests. It does not protect against
    an attacker: the program can read every file that the user can read (keys, answers of data sets), write where the
    user may write, fill the disk with many files, reach local services through sockets in the file system, and attack
    the shared kernel. Run untrusted models in a container or virtual machine that contains nothing but the run. Linux
    only.

    A task enables the tool by listing it (`JsonlTasks`: ``tools: [gear_lightning.environments.python_tool.python]``).

    Args:
        reward: as in `gear_lightning.environments.tools.ToolEnvironment`.
        max_calls: maximum number of tool calls in an episode.
        seconds: wall-clock limit of one call. All calls of a message together must take less than
            ``budgets.step_seconds``.
        limits: limits of one call.
        network: ``none`` for no network, ``allow`` for network access; see
            `gear_lightning.environments.sandbox.Isolated`.
        output_bytes: maximum size of a program's output. A program that prints more is killed, and the tool result
            contains a note.
    """

    def __init__(
        self,
        reward: RewardChoice | None = None,
        max_calls: int = 16,
        seconds: float = 10.0,
        limits: Limits = CALL,
        network: Network = "none",
        output_bytes: int = 10_000,
    ):
        super().__init__(reward, max_calls)
        for name, value in (("seconds", seconds), ("output_bytes", output_bytes)):
            if not 0 < value < math.inf:
                raise UserError(f"{name}={value}: must be above 0 and finite")
        self.seconds = seconds
        self.limits = limits
        self.network: Network = network
        self.output_bytes = output_bytes

    def check(self, task: Task) -> None:
        super().check(task)
        require_confinement(self.network)
        for tool in task.tools:
            if (name := tool["function"]["name"]) != "python":
                raise UserError(f"task {task.id} lists the tool {name!r}, but PythonTool provides only python")

    def read_arguments(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return arguments  # `call` checks them

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        if name != "python":
            raise unknown_tool(name, ["python"])
        code = arguments.get("code")
        if not isinstance(code, str) or len(arguments) > 1:
            raise ToolError("python takes one argument, code, which is text")
        return run_python(
            code,
            seconds=self.seconds,
            limits=self.limits,
            network=self.network,
            output_bytes=self.output_bytes,
        )
