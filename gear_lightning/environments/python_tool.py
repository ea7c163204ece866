"""A Python interpreter as a tool, each call in a confined process of its own."""

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
from ..rewards import Reward
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
    """What a program printed, to both streams; with its exit status, where that is not 0.

    Args:
        code: the program.
        seconds: wall clock; what has been printed by then is given with a note.
        limits: of its processes.
        network: ``none``, or ``allow`` it.
        output_bytes: most that it may print. It is ended there.

    Raises:
        ToolError: the program cannot be written down.
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
        told = {"network": network == "allow", "limits": limits.told(), "command": command}
        keeper, line = start(told, environ, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            printed, note = _read(keeper, seconds, output_bytes)
        finally:
            hang_up(line)  # the keeper ends whatever is left, and then itself
            keeper.communicate()
    printed = printed.replace(folder + os.sep, "")  # a traceback must not differ from run to run
    if not note and keeper.returncode:
        note = f"[exit status {keeper.returncode}]"
    return "\n".join(part for part in (printed.rstrip("\n"), note) if part)


def _read(keeper: subprocess.Popen, seconds: float, output_bytes: int) -> tuple[str, str]:
    """What a process prints until it ends, prints too much, or takes too long; and a note on the latter two."""
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
    """Answers calls of ``python(code)`` by running the program; the first message without a call is the final answer.

    Each call is a fresh process with limits, without network, in an empty temporary directory, without the trainer's
    environment variables, under ``python -I`` of the trainer's own interpreter. This keeps a program's mistakes from
    the run and the machine: endless loops, forks, memory, large files, calls to the network. It is no wall against an
    attacker: the program reads every file that the user can read (keys, answers of data sets), writes where the user
    may write, may fill the disk with many files, reaches local services through sockets in the file system, and meets
    the same kernel. Run untrusted models in a container or virtual machine that holds nothing but the run. Linux only.

    A task uses it by listing the tool (`JsonlTasks`: ``tools: [gear_lightning.environments.python_tool.python]``).

    Args:
        reward: scores the transcript; the name of a built-in reward, an import path, or a function.
        max_calls: tool calls in an episode.
        seconds: wall clock of one call. A message's calls together must stay below ``budgets.step_seconds``.
        limits: of one call.
        network: ``none``, or ``allow`` it; see `gear_lightning.environments.sandbox.Isolated`.
        output_bytes: most that a program may print; it is ended there, and the agent is told.
    """

    def __init__(
        self,
        reward: str | Reward | None = None,
        max_calls: int = 16,
        seconds: float = 10.0,
        limits: Limits = CALL,
        network: Network = "none",
        output_bytes: int = 10_000,
    ):
        super().__init__(reward, max_calls)
        for name, value in (("seconds", seconds), ("output_bytes", output_bytes)):
            if not 0 < value < math.inf:
                raise UserError(f"{name}={value} must be above 0, and finite")
        self.seconds = seconds
        self.limits = limits
        self.network: Network = network
        self.output_bytes = output_bytes

    def check(self, task: Task) -> None:
        super().check(task)
        require_confinement(self.network)
        for tool in task.tools:
            if (name := tool["function"]["name"]) != "python":
                raise UserError(f"task {task.id} lists the tool {name!r}, and PythonTool has python alone")

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
