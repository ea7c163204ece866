"""Errors that every rank must hear of: one rank's failure would leave the others waiting for it."""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import UserError

T = TypeVar("T")


def gather(state: T) -> list[T]:
    """Every rank's state, in order of rank. All ranks must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, state)
    return gathered


def gather_on_first(state: T) -> list[T] | None:
    """Every rank's state, in order of rank, on rank 0, which reads one after the other; None elsewhere. All ranks must
    call it. Tensors should lie in CPU memory: they come back on the device that they were on."""
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
    """A group of all processes that needs no device memory. All ranks must call it."""
    if dist.get_backend() == "gloo":
        return None
    if dist.group.WORLD not in _cpu_groups:
        _cpu_groups[dist.group.WORLD] = dist.new_group(backend="gloo")
    return _cpu_groups[dist.group.WORLD]


def place() -> tuple[int, int]:
    """This process's rank, and how many ranks there are; (0, 1) before they have found each other."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def run_on_all_ranks(function: Callable[[], T]) -> T:
    """Call a function on all ranks, and fail on all of them where it fails on one.

    Raises:
        UserError: what the function raised on the first rank where it failed, if it did not raise on this one.
        Exception: what the function raised on this rank.
    """
    result, mine = None, None
    try:
        result = function()
    except Exception as error:
        mine = error
    told = None if mine is None else str(mine) if isinstance(mine, UserError) else f"{type(mine).__name__}: {mine}"
    failed = [(rank, text) for rank, text in enumerate(gather(told)) if text is not None]
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
    """Fail on all ranks where one has other values than rank 0. All ranks must call it.

    Args:
        what: this rank's values.
        kind: what a rank that differs has.
        advice: what to do then.

    Raises:
        UserError: names the first rank and key that differ.
    """
    first, *others = gather(what)
    for rank, theirs in enumerate(others, 1):
        for key in sorted(first.keys() | theirs.keys()):
            mine, other = first.get(key, "not given"), theirs.get(key, "not given")
            if mine != other:
                raise UserError(
                    f"rank {rank} has {kind} than rank 0: {key} is {other} there and {mine} on rank 0; {advice}"
                )
