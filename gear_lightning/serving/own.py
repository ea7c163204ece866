"""vLLM servers that a run starts itself, and that end with it."""

import contextlib
import math
import os
import shlex
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info

from ..errors import UserError
from .client import Server, ServerError
from .launch import Launch

GUARD = Path(__file__).with_name("guard.py")
GRACE = 10.0  # seconds that a server gets to end
SLICE = 0.2  # seconds between two questions whether a server answers
NEWS = 30.0  # seconds between two lines about a server that does not answer yet
LAST = 15  # lines of a log that an error shows


@dataclass(frozen=True)
class OwnServers:
    """Servers that the run starts on each of its machines, and ends when it ends.

    Args:
        python: Python of the environment with vLLM.
        gpus: the servers' GPUs on each machine, by their numbers in the run's processes. The run must not train on
            them. Empty: one server on CPUs, if the run trains on CPUs.
        gpus_per_server: tensor-parallel size of each server; ``gpus`` is divided among as many as possible.
        kv_gib: memory of a server's key-value cache, GiB. Null: vLLM's default; 2 on CPUs.
        vllm: further options of vLLM, as on a command line.
        seconds: limit of the start; below that of the strategy's collectives, because other processes wait.
    """

    python: Path = Path(".venv-vllm/bin/python")
    gpus: list[int] | tuple[int, ...] = ()
    gpus_per_server: int = 1
    kv_gib: float | None = None
    vllm: str = ""
    seconds: float = 540.0

    def __post_init__(self):
        name = "generation.engine.start"
        if len(set(self.gpus)) != len(self.gpus) or any(gpu < 0 for gpu in self.gpus):
            raise UserError(f"{name}.gpus={list(self.gpus)}: give each GPU once, by its number")
        each = self.gpus_per_server
        if each < 1 or len(self.gpus) % each or (each > 1 and not self.gpus):
            raise UserError(f"{name}.gpus_per_server={each} does not divide the {len(self.gpus)} GPUs of {name}.gpus")
        if self.kv_gib is not None and not 0 < self.kv_gib < math.inf:
            raise UserError(f"{name}.kv_gib={self.kv_gib}: must be above 0 and finite")
        if not 0 < self.seconds < math.inf:
            raise UserError(f"{name}.seconds={self.seconds}: must be above 0 and finite")
        try:
            shlex.split(self.vllm)
        except ValueError as error:
            raise UserError(f"{name}.vllm={self.vllm!r}: {error}") from None

    def shares(self, seen: list[str], used: set[str]) -> list[list[int]]:
        """Return the GPUs of each server; a server on CPUs has none.

        Args:
            seen: names of the GPUs that this process sees, by number.
            used: names of the GPUs that the run trains on.

        Raises:
            UserError: a GPU is not there, or the run trains on it; or the run trains on GPUs, and none is given.
        """
        name = f"generation.engine.start.gpus={list(self.gpus)}"
        if not self.gpus:
            if used:
                raise UserError(f"{name}: the run trains on GPUs; name other GPUs for the servers")
            return [[]]
        for gpu in self.gpus:
            if gpu >= len(seen):
                raise UserError(f"{name}: there is no GPU {gpu}; this process sees {len(seen)}")
            if seen[gpu] in used:
                raise UserError(
                    f"{name}: the run trains on GPU {gpu}; leave it out, or let the run train on other GPUs "
                    "(trainer.devices)"
                )
        return [list(self.gpus[i : i + self.gpus_per_server]) for i in range(0, len(self.gpus), self.gpus_per_server)]

    def start(self, launch: Launch, shares: list[list[int]], logs: Path, seconds: float) -> list["OwnServer"]:
        """Start servers, and wait until they answer.

        Args:
            launch: what they have in common.
            shares: GPUs of each, see `shares`.
            logs: directory of their logs.
            seconds: limit of their answers.

        Raises:
            ServerError: one of them died, or did not answer in time; all have been ended.
        """
        if not launch.python.exists():
            raise UserError(
                f"generation.engine.start.python={self.python}: there is no such Python; install vLLM in an "
                "environment of its own (make vllm), or name its Python"
            )
        made: list[OwnServer] = []
        try:
            for number, gpus in enumerate(shares):
                options = f"{launch.options} {self.vllm}"
                if len(gpus) > 1:
                    options = f"--tensor-parallel-size {len(gpus)} {options}"
                mine = replace(launch, port=free_port(), options=options)
                made.append(OwnServer(mine, gpus, logs / f"server{number}.log", seconds))
            for server in made:
                server.wait(self.seconds)
        except BaseException:
            for server in made:
                server.end()
            raise
        return made


class OwnServer:
    """A server that runs below a guard (`guard.py`), which ends it with this process.

    Args:
        launch: the server.
        gpus: its GPUs.
        log: file for its output.
        seconds: limit of its answers.
    """

    def __init__(self, launch: Launch, gpus: list[int], log: Path, seconds: float):
        self.log = log
        self.advice = f"look at {log}, and resume with --ckpt_path last, which starts a new one"
        self.server = Server(f"http://{launch.host}:{launch.port}", seconds, self.advice)
        environment = launch.environment()
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible(gpu) for gpu in gpus)
        log.parent.mkdir(parents=True, exist_ok=True)
        guard = [sys.executable, "-I", str(GUARD), str(os.getpid()), str(GRACE)]
        with log.open("ab") as output:
            self._from = output.tell()
            self._process = subprocess.Popen(
                [*guard, *launch.command()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # signals to the run's group do not reach the guard
            )
        self.end = weakref.finalize(self, _end, self._process, os.getpid())

    def wait(self, seconds: float) -> None:
        """Wait until the server answers.

        Raises:
            ServerError: it has died, or has not answered in time.
        """
        start = news = time.monotonic()
        while not self.server.answers():
            now = time.monotonic()
            if self._process.poll() is not None:
                raise ServerError(f"the vLLM server {self.server.url} ended while it started; {self._said()}")
            if now - start > seconds:
                raise ServerError(
                    f"the vLLM server {self.server.url} does not answer after {seconds:g} s "
                    f"(generation.engine.start.seconds); {self._said()}"
                )
            if now - news > NEWS:
                news = now
                rank_zero_info(f"The vLLM server {self.server.url} is starting ({now - start:.0f} s): {self.log}")
            time.sleep(SLICE)
        rank_zero_info(f"The vLLM server {self.server.url} answers. Its log: {self.log}")

    def _said(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self._from)
            lines = file.read().decode(errors="replace").splitlines()
        return f"the end of its log {self.log}:\n" + "\n".join(lines[-LAST:])


def _end(process: subprocess.Popen, owner: int) -> None:
    """End a server through its guard, and wait for it."""
    if os.getpid() != owner:  # a fork of the process that started it
        return
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE + 5)


def free_port() -> int:
    """Return an unused port of this machine."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def visible(gpu: int) -> str:
    """Return what ``CUDA_VISIBLE_DEVICES`` calls a GPU that this process calls by this number."""
    given = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    return given[gpu] if given else str(gpu)


def gpu_names() -> list[str]:
    """Return a name for each GPU that this process sees, the same in every process of the machine."""
    if not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_properties(gpu).uuid) for gpu in range(torch.cuda.device_count())]
