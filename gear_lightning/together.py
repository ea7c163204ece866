"""Errors that every rank must hear of: one rank's failure would leave the others waiting for it."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from .errors import UserError

T = TypeVar("T")


def gather(state: T) -> list[T]:
    """Every rank's state, in order of rank. All ranks must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, state)
    return gathered


def together(function: Callable[[], T]) -> T:
    """Call a function on all ranks, and fail on all of them where it fails on one.

    Raises:
        UserError: what the function raised on this rank, else what it raised on the first rank where it failed.
    """
    result, mine = None, None
    try:
        result = function()
    except UserError as error:
        mine = error
    failed = [(rank, text) for rank, text in enumerate(gather(None if mine is None else str(mine))) if text is not None]
    if mine is not None:
        raise mine
    if failed:
        rank, text = failed[0]
        raise UserError(f"{text} (rank {rank})")
    return result  # pyright: ignore[reportReturnType]
