"""Work on files that goes on beside training, in one thread and in order: a checkpoint is written, then the link to it
is made, then older ones are removed.

Lightning's ``AsyncCheckpointIO`` does not fit: it wraps a ``CheckpointIO``, which sharded strategies do not use; link
and removal do not wait for its file; it keeps any number of copies; and it reports an error on rank 0 alone.
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
    """The thread, which lives while there is work. The interpreter does not end before it: it is no daemon.

    Work that raises ends what waits behind it: no link is made to a file that could not be written, and nothing is
    removed for it. Only rank 0 gives work; `settle` tells all ranks of the error.

    Attributes:
        progress: bytes written so far, to see whether work moves.
        seconds: that the newest work given to `add` took.
        size: bytes of the newest checkpoint.
        beside: whether a checkpoint that is saved now is to be written beside training.
        complained: whether there has been a warning that it cannot be.
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
        self._open = False  # whether ranks have not heard yet how the newest save has ended

    @property
    def busy(self) -> bool:
        """Whether there is work left."""
        return self._thread is not None

    def add(self, work: Callable[[], Any]) -> None:
        """Do this in the thread, after all else."""

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
        """Do this after what was added: at once where there is nothing, never where something has failed."""
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
            del work  # with the copy that it holds

    def wait(self, patience: float | None = None) -> bool:
        """Wait on this rank until there is no work left.

        Args:
            patience: seconds without `progress` after which to wait no longer. None: wait as long as it takes.

        Returns:
            Whether there is none left.
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
        """What work on this rank has raised, and forget it."""
        error, self._error = self._error, None
        return error

    @contextmanager
    def saving(self, beside: bool) -> Iterator[None]:
        """Around the saving of a checkpoint, on all ranks.

        Args:
            beside: it may be written beside training.
        """
        self.beside, self._open = beside, True
        try:
            yield
        finally:
            self.beside = False

    def settle(self, wait: bool = True) -> None:
        """Raise what has failed since the newest save, on all ranks. All ranks must call it.

        Args:
            wait: until rank 0 has no work left.

        Raises:
            Exception: on rank 0, what its work has raised.
            UserError: on the others.
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


# -- the copy ---------------------------------------------------------------------------------------------------------


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(part)


def nbytes(values: Any) -> int:
    """Bytes of the tensors in nested data; those that are the same count once."""
    return sum({_place(tensor): tensor.numel() * tensor.element_size() for tensor in tensors_of(values)}.values())


def _place(tensor: Tensor) -> tuple[Any, ...]:
    where = tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return *where, tensor.shape, tensor.stride(), tensor.dtype


@torch.no_grad()
def snapshot(value: Any, done: dict[tuple[Any, ...], Tensor] | None = None) -> Any:
    """A copy of nested data in CPU memory that no later change reaches. Tensors that are the same stay the same one."""
    done = {} if done is None else done
    if isinstance(value, Tensor):
        place = _place(value)
        if place not in done:
            done[place] = value.detach().to("cpu", copy=True)
        return done[place]
    if isinstance(value, ATOMS):
        return value
    if isinstance(value, dict):
        made = copy.copy(value)  # with its class and attributes: a state_dict has some
        for key, part in value.items():
            made[key] = snapshot(part, done)
        return made
    if isinstance(value, list | tuple):
        parts = [snapshot(part, done) for part in value]
        make = getattr(value, "_make", type(value))  # of a named tuple
        return make(parts)
    return copy.deepcopy(value)


def free_memory() -> int:
    """Bytes of CPU memory that can still be taken, on the machine and in its control group."""
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
            told = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            taken = int((place / used).read_text()) - int(told.get(cache, 0))
            found.append(int((place / limit).read_text()) - taken)
    return max(0, min(found))
