"""Sends tensors from a trainer to the workers of a server through a process group of their own.

The trainer is rank 0, and the workers are ranks 1 to N. The group exists for one update and is no part of the default
group of either side. It uses NCCL if all members are on GPUs, and Gloo otherwise. Both sides run this module: vLLM's
processes import it as ``gear_broadcast``, so it needs nothing but torch.
"""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore

SLICE = 0.02  # seconds between two looks at what has arrived
Manifest = list[tuple[str, str, list[int]]]  # name, dtype, shape


class BroadcastError(RuntimeError):
    """The other side has failed, or has not taken part in time."""


def manifest(tensors: dict[str, Tensor]) -> Manifest:
    """Return the names, dtypes and shapes of tensors, in order."""
    return [(name, str(one.dtype).removeprefix("torch."), list(one.shape)) for name, one in tensors.items()]


def address_towards(host: str) -> str:
    """Return the address of this machine that a host can reach.

    Raises:
        OSError: there is no way to the host.
    """
    found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, place = min(found, key=lambda one: one[0] != socket.AF_INET)
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)  # sends nothing
        return probe.getsockname()[0]


class _Group:
    """A process group apart from the default one."""

    def __init__(self, store: Any, rank: int, size: int, backend: str, seconds: float, address: str):
        self._limit, self._seconds, self.backend = timedelta(seconds=seconds), seconds, backend
        store = PrefixStore(backend, store)
        if backend == "nccl":
            options: Any = dist.ProcessGroupNCCL.Options()
            options._timeout = 10 * self._limit  # `_wait` ends earlier; NCCL's own limit ends the whole process
            self._group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            options = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
            options._timeout = self._limit
            options._devices = [ProcessGroupGloo.create_device(hostname=address)]
            self._group = ProcessGroupGloo(store, rank, size, options)

    def broadcast(self, tensor: Tensor) -> None:
        """Send a tensor from rank 0 to the others, and wait for it."""
        work = self._group.broadcast(tensor, 0)
        if self.backend == "nccl":
            end = time.monotonic() + self._seconds
            while not work.is_completed():
                if time.monotonic() > end:
                    raise BroadcastError(f"a tensor has not arrived within {self._seconds:g} s")
        work.wait()

    def close(self) -> None:
        """Close the connections; what the other members wait for fails."""
        group, self._group = self._group, None
        if group is not None and self.backend == "nccl":
            group.abort()


class Sender:
    """The trainer's side of one update.

    Args:
        host: the server's host.
        seconds: limit of the meeting, and of each tensor.

    Raises:
        BroadcastError: there is no way to the host.
    """

    def __init__(self, host: str, seconds: float):
        self._seconds = seconds
        self._group: _Group | None = None
        try:
            self._address = address_towards(host)
            self._store: Any = TCPStore(
                self._address, 0, None, True, timedelta(seconds=seconds), wait_for_workers=False
            )
        except (OSError, RuntimeError) as error:
            raise BroadcastError(f"{host}: {error}") from None

    def invitation(self) -> dict[str, Any]:
        """Return what the workers need to take part, see `receiving`."""
        return {"host": self._address, "port": self._store.port, "seconds": self._seconds}

    def meet(self, device: torch.device, given_up: Callable[[], bool]) -> bool:
        """Wait for all workers and form the group.

        Args:
            device: where the tensors are.
            given_up: whether the server has refused the update.

        Returns:
            False if it has refused.

        Raises:
            BroadcastError: not all workers have come in time.
        """
        end = time.monotonic() + self._seconds
        if not self._await(["worker1"], end, given_up):
            return False
        workers = json.loads(self._store.get("worker1"))["workers"]
        expected = [f"worker{rank}" for rank in range(1, workers + 1)]
        if not self._await(expected, end, given_up):
            return False
        kinds = {json.loads(self._store.get(name))["device"] for name in expected}
        self.backend = "nccl" if kinds | {device.type} == {"cuda"} else "gloo"
        self._device = device if self.backend == "nccl" else torch.device("cpu")
        with _told(), _on(self._device):
            self._store.set("backend", self.backend)
            self._group = _Group(self._store, 0, workers + 1, self.backend, self._seconds, self._address)
        return True

    def _await(self, names: list[str], end: float, given_up: Callable[[], bool]) -> bool:
        while not self._store.check(names):
            if given_up():
                return False
            if time.monotonic() > end:
                raise BroadcastError(f"its workers have not come within {self._seconds:g} s")
            time.sleep(SLICE)
        return True

    def send(self, tensors: Iterable[Tensor]) -> None:
        """Send tensors to all workers, one after another.

        Raises:
            BroadcastError: a worker has failed, or has not taken a tensor in time.
        """
        assert self._group is not None
        with _told(), _on(self._device):
            for tensor in tensors:
                self._group.broadcast(tensor.detach().to(self._device).contiguous())

    def close(self) -> None:
        """Close the connections; what the workers wait for fails."""
        if self._group is not None:
            self._group.close()
        self._store = None


@contextlib.contextmanager
def receiving(
    host: str, port: int, seconds: float, tensors: Manifest, worker: int, workers: int, device: torch.device
) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Take part in an update, and yield an iterator of (name, tensor), one after another.

    Args:
        host: address of the trainer.
        port: port of its store.
        seconds: limit of the meeting, and of each tensor.
        tensors: what is sent, see `manifest`.
        worker: number of this worker, from 0.
        workers: number of all workers of the server.
        device: where the worker's model is.

    Raises:
        BroadcastError: the trainer has failed, or has not sent in time.
        ValueError: not all tensors were read.
    """
    limit, left = timedelta(seconds=seconds), len(tensors)
    with _told():
        address = address_towards(host)
        store: Any = TCPStore(host, port, None, False, limit, wait_for_workers=False)
        store.set(f"worker{worker + 1}", json.dumps({"workers": workers, "device": device.type}))
        store.wait(["backend"], limit)
        backend = store.get("backend").decode()
    place = device if backend == "nccl" else torch.device("cpu")
    with _told(), _on(place):
        group = _Group(store, worker + 1, workers + 1, backend, seconds, address)

    def arriving() -> Iterator[tuple[str, Tensor]]:
        nonlocal left
        for name, dtype, shape in tensors:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=place)
            with _told(), _on(place):
                group.broadcast(tensor)
            left -= 1
            yield name, tensor

    try:
        yield arriving()
        if left:
            raise ValueError(f"{left} of {len(tensors)} tensors were not read")
    finally:
        group.close()
        del store


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Raise what torch raises as `BroadcastError`, in one line."""
    try:
        yield
    except BroadcastError:
        raise
    except (RuntimeError, OSError) as error:
        raise BroadcastError(" ".join(str(error).split("Exception raised from")[0].split())[:300]) from None
