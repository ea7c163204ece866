"""File operations that run during training, in one thread and in order: write a checkpoint, link it, remove older ones.

Lightning's ``AsyncCheckpointIO`` is not suitable: it wraps a ``CheckpointIO``, which sharded strategies do not use;
linking and removal do not wait for its file; it keeps any number of copies; and it reports an error only on rank 0.
"""

import contextlib
import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed.collective import run_on_all_ranks

ATOMS = (str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device, torch.Size)


class Writer:
    """Runs file operations in a background thread.

    The thread runs while there is work. It is not a daemon: the interpreter waits for it at exit.

    If one operation raises, those queued behind it are dropped: no link is made to a file that could not be written,
    and no older file is removed. Only rank 0 adds work. `settle` raises the error on all ranks.

    Attributes:
        progress: bytes written so far; shows whether the work advances.
        seconds: duration of the newest work given to `add`.
        size: bytes of the newest checkpoint.
        beside: whether a checkpoint that is saved now should be written in the background.
        complained: whether a warning that it cannot be written in the background was given.
    """

    def __init__(self) -> None:
        self.progress = 0
        self.seconds = 0.0
        self.size = 0
        self.beside = self.complained = False
        self._changed = threading.Condition()
        self._waiting: deque[Callable[[], Any]] = deque()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._open = False  # whether the result of the newest save has not been shared with all ranks

    @property
    def busy(self) -> bool:
        """Whether there is work left."""
        return self._thread is not None

    def add(self, work: Callable[[], Any]) -> None:
        """Run this in the thread, after all queued work."""

        def timed() -> None:
            started = time.monotonic()
            work()
            self.seconds = time.monotonic() - started

        with self._changed:
            self._waiting.append(timed)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="checkpoint writer", daemon=False)
                self._thread.start()

    def then(self, work: Callable[[], Any]) -> None:
        """Run this after all queued work: at once if the queue is empty, never if an operation has failed."""
        with self._changed:
            if self._thread is not None:
                self._waiting.append(work)
                return
        if self._error is None:
            work()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._thread = None
                    self._changed.notify_all()
                    return
                work = self._waiting.popleft()
            try:
                work()
            except BaseException as error:  # for the main thread
                with self._changed:
                    self._error = error
                    self._waiting.clear()
            del work  # frees the copy of the checkpoint

    def wait(self, patience: float | None = None) -> bool:
        """Wait on this rank until there is no work left.

        Args:
            patience: seconds without `progress` after which to stop waiting. None: no limit.

        Returns:
            Whether all work is done.
        """
        seen, since = self.progress, time.monotonic()
        with self._changed:
            while self.busy:
                self._changed.wait(1.0)
                if self.progress != seen:
                    seen, since = self.progress, time.monotonic()
                elif patience is not None and time.monotonic() - since > patience:
                    return False
        return True

    def take_error(self) -> BaseException | None:
        """Return the error that work on this rank has raised, and clear it. None if there is none."""
        error, self._error = self._error, None
        return error

    @contextmanager
    def saving(self, beside: bool) -> Iterator[None]:
        """Context in which a checkpoint is saved, on all ranks.

        Args:
            beside: whether the checkpoint may be written in the background.
        """
        self.beside, self._open = beside, True
        try:
            yield
        finally:
            self.beside = False

    def settle(self, wait: bool = True) -> None:
        """Raise on all ranks if the work since the newest save has failed. All ranks must call it.

        Args:
            wait: wait until rank 0 has no work left.

        Raises:
            Exception: on rank 0, the error that its work has raised.
            UserError: on the other ranks.
        """
        if not self._open:
            return

        def fail() -> None:
            if wait:
                self.wait()
            if (error := self.take_error()) is not None:
                raise error

        self._open = not wait
        run_on_all_ranks(fail)


WRITER = Writer()


# -- copies -----------------------------------------------------------------------------------------------------------


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(part)


def nbytes(values: Any) -> int:
    """Return the bytes of the tensors in nested data; tensors that share the same memory count once."""
    return sum({_place(tensor): tensor.numel() * tensor.element_size() for tensor in tensors_of(values)}.values())


def _place(tensor: Tensor) -> tuple[Any, ...]:
    where = tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return *where, tensor.shape, tensor.stride(), tensor.dtype


@torch.no_grad()
def snapshot(value: Any, done: dict[tuple[Any, ...], Tensor] | None = None) -> Any:
    """Return an independent copy of nested data in CPU memory. Tensors that share memory still share it in the copy."""
    done = {} if done is None else done
    if isinstance(value, Tensor):
        place = _place(value)
        if place not in done:
            done[place] = value.detach().to("cpu", copy=True)
        return done[place]
    if isinstance(value, ATOMS):
        return value
    if isinstance(value, dict):
        made = copy.copy(value)  # keeps class and attributes, which a state_dict has
        for key, part in value.items():
            made[key] = snapshot(part, done)
        return made
    if isinstance(value, list | tuple):
        parts = [snapshot(part, done) for part in value]
        make = getattr(value, "_make", type(value))  # named tuples have _make
        return make(parts)
    return copy.deepcopy(value)


def free_memory() -> int:
    """Return the free bytes of CPU memory: the minimum of the machine's and of its control group's."""
    found = [1 << 62]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = iter(Path("/proc/meminfo").read_text().splitlines())
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    for group, limit, used, cache in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            place = Path(group)
            stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            taken = int((place / used).read_text()) - int(stat.get(cache, 0))
            found.append(int((place / limit).read_text()) - taken)
    return max(0, min(found))
