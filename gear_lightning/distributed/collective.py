"""Collectives of Python objects, and errors that all ranks raise together.

If only one rank raised, the others would wait for it in their next collective.
"""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import UserError

T = TypeVar("T")


def gather(state: T) -> list[T]:
    """Return every rank's state, in order of rank. All ranks must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, state)
    return gathered


def gather_on_first(state: T) -> list[T] | None:
    """Return every rank's state in order of rank on rank 0, and None on the other ranks. All ranks must call it.

    Rank 0 receives the states one after another. Tensors should be in CPU memory, because they are received on the
    device from which they were sent.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    group = _on_cpu()
    if dist.get_rank():
        dist.send_object_list([state], dst=0, group=group)
        return None
    states: list[T] = [state]
    for rank in range(1, dist.get_world_size()):
        received: list[Any] = [None]
        dist.recv_object_list(received, src=rank, group=group)
        states += received
    return states


_cpu_groups: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


def _on_cpu() -> Any:
    """Return a group of all processes that uses no device memory; None for the default. All ranks must call it."""
    if dist.get_backend() == "gloo":
        return None
    if dist.group.WORLD not in _cpu_groups:
        _cpu_groups[dist.group.WORLD] = dist.new_group(backend="gloo")
    return _cpu_groups[dist.group.WORLD]


def place() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; (0, 1) before the process group is initialized."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def run_on_all_ranks(function: Callable[[], T]) -> T:
    """Call a function on all ranks, and raise on all of them if it raises on any.

    Raises:
        UserError: the function raised on another rank; has the message of the first such rank.
        Exception: the function raised it on this rank.
    """
    result, mine = None, None
    try:
        result = function()
    except Exception as error:
        mine = error
    message = None if mine is None else str(mine) if isinstance(mine, UserError) else f"{type(mine).__name__}: {mine}"
    failed = [(rank, text) for rank, text in enumerate(gather(message)) if text is not None]
    if mine is not None:
        raise mine
    if failed:
        rank, text = failed[0]
        raise UserError(f"{text} (rank {rank})")
    return result  # pyright: ignore[reportReturnType]


def check_same(
    what: dict[str, str],
    kind: str = "another config",
    advice: str = "start all processes with the same files and options",
) -> None:
    """Raise on all ranks if a rank has other values than rank 0. All ranks must call it.

    Args:
        what: this rank's values.
        kind: what differs, for the message.
        advice: what to do if values differ, for the message.

    Raises:
        UserError: the values differ; names the first rank and key.
    """
    first, *others = gather(what)
    for rank, theirs in enumerate(others, 1):
        for key in sorted(first.keys() | theirs.keys()):
            mine, other = first.get(key, "not given"), theirs.get(key, "not given")
            if mine != other:
                raise UserError(
                    f"rank {rank} has {kind} than rank 0: {key} is {other} there and {mine} on rank 0; {advice}"
                )
