"""Start ``python -m gear_lightning`` without the seconds of importing, by forking a process that has imported it.

`QuickStart` creates an executable that replaces the interpreter. Called with ``-m gear_lightning...`` or
``-m restart_runs``, it passes its arguments, environment, working directory and standard streams to the server,
forwards signals, and ends with the exit status of the fork; if it is killed, so is the fork. Called with other
arguments, it runs the interpreter. It is not suitable for tests of process groups.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
if sys.argv[1:2] != ["-m"] or not sys.argv[2].startswith(("gear_lightning", "restart_runs")):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
asked = json.dumps({{"arguments": sys.argv[2:], "environment": dict(os.environ), "folder": os.getcwd()}}).encode()
socket.send_fds(server, [len(asked).to_bytes(8, "big")], [0, 1, 2])
server.sendall(asked)
answers = server.makefile("rb")
child = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: os.kill(child, number))
status = int(answers.readline() or b"1")
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""


class QuickStart:
    """The server, and ``executable``, the file that replaces the interpreter."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="quick-")
        address = str(Path(self._folder.name) / "socket")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = root
        self._server = subprocess.Popen(
            [sys.executable, __file__, address], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert self._server.stdout is not None
        assert "ready\n" in iter(self._server.stdout.readline, ""), "the server did not start"
        self.executable = str(Path(self._folder.name) / "python")
        Path(self.executable).write_text(CLIENT.format(python=sys.executable, address=address))
        os.chmod(self.executable, 0o755)

    def stop(self) -> None:
        """End the server. Running forks continue."""
        self._server.kill()
        self._server.wait()
        self._folder.cleanup()


def end_with(run: Callable[[], None]) -> NoReturn:
    """Call a function in a fork, and exit like an interpreter that has run it."""
    status = 1
    try:
        run()
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _become(asked: bytes, streams: list[int], line: socket.socket, executable: str) -> None:
    """Become the requested process."""
    import runpy

    told = json.loads(asked)
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(told["folder"])
    os.environ.clear()
    os.environ.update(told["environment"])
    sys.executable = executable
    module, *sys.argv[1:] = told["arguments"]
    sys.argv[0] = "-m"
    paths = [told["folder"], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*paths, *(path for path in sys.path if path not in paths)]

    def end_with_the_client() -> None:
        if not line.recv(1):
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_the_client, daemon=True).start()
    from lightning.fabric.utilities.rank_zero import _get_rank
    from lightning.pytorch.utilities import rank_zero_only

    rank_zero_only.rank = _get_rank() or 0  # Lightning has read the rank when it was imported
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _serve(address: str) -> None:
    executable = str(Path(address).with_name("python"))
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(32)
    print("ready", flush=True)
    while True:
        line, _ = listening.accept()
        size, streams, _, _ = socket.recv_fds(line, 8, 3)
        told, wanted = b"", int.from_bytes(size, "big")
        while len(told) < wanted and (piece := line.recv(wanted - len(told))):
            told += piece
        if (child := os.fork()) == 0:
            listening.close()
            end_with(partial(_become, told, streams, line, executable))
        for stream in streams:
            os.close(stream)
        line.sendall(f"{child}\n".encode())
        threading.Thread(target=_send_exit_status, args=(child, line), daemon=True).start()


def _send_exit_status(child: int, line: socket.socket) -> None:
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):  # the client has ended
        line.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    line.close()


if __name__ == "__main__":
    import deepspeed  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import gear_lightning.recipes.cli  # noqa: F401

    _serve(sys.argv[1])
