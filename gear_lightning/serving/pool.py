"""Which servers a process samples with, and to which it gives weights."""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..distributed.collective import gather, place, run_on_all_ranks
from .client import Server
from .launch import Launch
from .own import OwnServer, OwnServers, gpu_names


@dataclass
class Pool:
    """The servers of a process.

    Attributes:
        servers: it samples with them.
        sends: whether it gives them weights: one process does for each server.
        own: servers that it has started.
    """

    servers: list[Server]
    sends: bool
    own: list[OwnServer]

    def close(self) -> None:
        """End the servers that this process has started."""
        for server in self.own:
            server.end()


def share(servers: list[str], rank: int, processes: int) -> tuple[list[str], bool]:
    """Return the servers of a process, and whether it gives them weights. They are assigned to each other in turn."""
    if len(servers) >= processes:
        return servers[rank::processes], True
    return [servers[rank % len(servers)]], rank < len(servers)


def connect_servers(addresses: list[str], seconds: float) -> Pool:
    """Return servers that were started before the run.

    Args:
        addresses: of all servers of the run.
        seconds: limit of their answers.
    """
    mine, sends = share(addresses, *place())
    return Pool([Server(url, seconds) for url in mine], sends, [])


def start_servers(
    options: OwnServers, launch: Callable[[Path], Launch], folder: Path, device: torch.device, seconds: float
) -> Pool:
    """Start servers on each machine. All ranks must call it.

    Args:
        options: the servers.
        launch: returns what they have in common, given a directory for the model's files.
        folder: the run's directory; logs and the model's files are written to ``vllm/HOST`` in it.
        device: where this process trains.
        seconds: limit of their answers.

    Raises:
        UserError: they cannot be started (on all ranks).
    """
    host, names = socket.gethostname(), gpu_names()
    here = names[device.index or 0] if device.type == "cuda" else None
    machines = gather((host, here))
    rank, _ = place()
    mates = [other for other, (name, _) in enumerate(machines) if name == host]
    used = {gpu for name, gpu in machines if name == host and gpu is not None}

    def first_starts() -> list[OwnServer]:
        if rank != mates[0]:
            return []
        logs = folder / "vllm" / host
        return options.start(launch(logs / "model"), options.shares(names, used), logs, seconds)

    own = run_on_all_ranks(first_starts)
    started = gather([(server.server.url, server.advice) for server in own])[mates[0]]
    mine, sends = share([url for url, _ in started], mates.index(rank), len(mates))
    return Pool([Server(url, seconds, dict(started)[url]) for url in mine], sends, own)
