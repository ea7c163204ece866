"""Provides the weights that rollouts are sampled with: the policy's own, a gathered full copy, or streamed layers."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn

from ..distributed.collective import gather
from ..distributed.sharding import fingerprint, is_sharded, rest, shape, whole_copy
from ..errors import UserError
from .engine import GenerationEngine, next_logits

WeightsMode = Literal["auto", "gather", "stream"]


class SamplingWeights:
    """Provides a model to sample from, with the policy's newest weights.

    Args:
        mode: ``gather``: gather a full copy of the weights on every process. ``stream``: gather the weights layer by
            layer at every token. ``auto``: gather a full copy if it fits into memory, else stream.
    """

    def __init__(self, mode: WeightsMode):
        self.mode = mode
        self.dtype: torch.dtype | None = None
        self._copy: Any = None
        self._version: int | None = None
        self.streamed = False  # whether the newest rollouts were sampled with streamed weights

    @contextmanager
    def open(
        self,
        policy: Any,
        blank: Any,
        version: int,
        cache_bytes: int,
        engine: GenerationEngine,
        dtype: torch.dtype | None,
        streams: bool,
    ) -> Iterator[tuple[Any, Callable[[], None]]]:
        """Yield a model for the engine, and a function that checks that the engine uses it.

        Args:
            policy: the policy, sharded or not.
            blank: its modules without values (`sharding.skeleton`), if it is sharded.
            version: number of optimizer steps it has taken.
            cache_bytes: memory that the engine's keys and values need.
            engine: the engine that will sample.
            dtype: dtype of the gathered copy. None: that of the policy.
            streams: whether a forward of the sharded policy gathers its layers by itself.

        Raises:
            UserError: the mode is ``stream``, but forwards do not gather the layers.
        """
        self.dtype = dtype
        sharded = is_sharded(policy)
        mode = self._mode(policy, sharded, cache_bytes, streams)
        if mode == "own":
            yield policy, lambda: self._check(policy, engine)
            return
        if mode == "gather":
            if self._version != version:
                self.close()
                device = next(policy.parameters()).device
                self._copy, self._version = whole_copy(policy, blank, device, dtype), version
            yield self._copy, lambda: self._check(policy, engine)
            return
        self.streamed = True
        turns = Turns(policy)
        engine.before_forward = turns.take
        try:
            yield policy, lambda: self._check(policy, engine)
            turns.finish()
        finally:
            del engine.before_forward
            rest(policy)

    def close(self) -> None:
        """Free the copy."""
        self._copy = self._version = None

    def _mode(self, policy: Any, sharded: bool, cache_bytes: int, streams: bool) -> str:
        if not sharded:
            return "own" if self.dtype in (None, next(policy.parameters()).dtype) else "gather"
        if self.mode == "stream" and not streams:
            raise UserError(
                "generation.weights=stream works under ZeRO-3 only in training; evaluate with gather, or with "
                "configs/strategy/fsdp.yaml"
            )
        if self.mode != "auto" or not streams:
            return "gather" if self.mode == "auto" else self.mode
        need = sum(shape(p).numel() * (self.dtype or p.dtype).itemsize for p in policy.parameters()) + cache_bytes
        free = 0 if self._copy is not None else _free_bytes(next(policy.parameters()).device)
        fits = self._copy is not None or need < 0.9 * free
        if all(gather(fits)):  # all ranks must use the same mode
            return "gather"
        rank_zero_warn(
            f"A full copy of the weights and the key-value cache ({need / 2**30:.1f} GiB) do not fit into free memory "
            f"({free / 2**30:.1f} GiB): rollouts stream the layers at every token, which is slow. Set "
            "generation.weights_dtype=bfloat16 or model.teacher.park=true, or use more devices."
        )
        return "stream"

    def _check(self, policy: Any, engine: GenerationEngine) -> None:
        """Raise `UserError` if the engine's weights differ from the policy's, or the policies of the ranks differ."""
        theirs = engine.fingerprint(self.dtype)
        ours = fingerprint(policy, self.dtype)
        prints = gather((ours, theirs))
        if len({mine for mine, _ in prints}) > 1:
            raise UserError("the policy's weights differ between processes: " + ", ".join(m for m, _ in prints))
        for rank, (mine, engines) in enumerate(prints):
            if engines not in (None, mine):
                raise UserError(
                    f"stale engine: {type(engine).__name__} samples with weights {engines} on rank {rank}, but the "
                    f"policy has {mine}; an engine must use the model that `begin` receives"
                )


class Turns:
    """Synchronizes the forwards of all ranks if each forward is a collective that gathers weights. A rank that has
    finished its work runs empty forwards until the last rank has finished."""

    def __init__(self, policy: Any):
        self.policy = policy
        self.device = next(policy.parameters()).device

    def _any(self, wanted: bool) -> bool:
        count = torch.tensor(int(wanted), device=self.device)
        dist.all_reduce(count)
        return bool(count)

    def take(self) -> None:
        """Announce a forward to the other ranks. Called before each forward."""
        self._any(True)

    @torch.no_grad()
    def finish(self) -> None:
        """Run empty forwards until no rank needs another forward."""
        place = torch.zeros(1, dtype=torch.long, device=self.device)
        while self._any(False):
            next_logits(self.policy, place, place[None], use_cache=False)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
