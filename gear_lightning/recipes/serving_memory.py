"""Estimate the bytes that a vLLM server needs, from the model's shape, and how many conversations fit.

A server holds the weights (adapters merged) in its dtype, and the keys and values of all open conversations:

- weights: parameters x bytes of the dtype;
- a token: 2 (key and value) x layers x key and value heads x width of a head x bytes of the dtype;
- a conversation: the tokens of its context, in whole blocks.

Models with sliding windows or compressed keys and values need less. With tensor parallelism each GPU holds its share of
both. Activations, CUDA graphs and the CUDA context are not included.
"""

import math
from collections import Counter
from dataclasses import dataclass
from urllib.parse import urlsplit

from ..serving.launch import BLOCK
from .model_shape import ModelShape

GPU_BLOCK = 16  # tokens of a block of vLLM's cache on GPUs
SHARE = 0.9  # of a GPU's memory that vLLM uses by default
GIB = 1 << 30


@dataclass(frozen=True)
class Served:
    """What the servers of a recipe hold.

    Args:
        servers: their addresses.
        shape: sizes of the model.
        dtype: name of the dtype in which it is served.
        context: longest conversation, tokens.
        together: conversations that all processes have open at the same time.
        block: tokens of a block of the cache.
        option: where the size of a server's cache is set.
    """

    servers: tuple[str, ...]
    shape: ModelShape
    dtype: str
    context: int
    together: int
    block: int
    option: str = "gear-lightning serve --kv-gib"

    @property
    def element(self) -> int:
        """Bytes of a number."""
        return 4 if self.dtype == "float32" else 2

    @property
    def weights(self) -> int:
        """Bytes of the weights, adapters merged."""
        merged = self.shape.parameters - (self.shape.trainable if self.shape.adapted else 0)
        return merged * self.element

    @property
    def token(self) -> int:
        """Bytes of the keys and values of a token."""
        return 2 * self.shape.layers * self.shape.kv_heads * self.shape.head_dim * self.element

    @property
    def conversation(self) -> int:
        """Bytes of the keys and values of the longest conversation."""
        return -(-self.context // self.block) * self.block * self.token

    @property
    def each(self) -> int:
        """Conversations that a server has open at the same time."""
        return -(-self.together // len(self.servers))

    @property
    def cache(self) -> int:
        """Bytes of the keys and values of all conversations of a server."""
        return self.each * self.conversation

    def tokens(self, cache: float) -> int:
        """Return the tokens that a cache of a number of bytes holds (vLLM's ``GPU KV cache size``)."""
        return int(cache // (self.block * self.token)) * self.block

    def describe(self, training: str, place: str, memory: float | None, peak: int | None) -> str:
        """Return lines about the servers.

        Args:
            training: where the recipe trains, such as ``8 GPUs``.
            place: GPU or process.
            memory: GiB of a GPU; None if it is not known.
            peak: the estimate of a training process, bytes; None if there is none.
        """
        count, hosts = len(self.servers), Counter(map(_host, self.servers))
        where = ", ".join(f"{number} on {host}" for host, number in hosts.items())
        context, whole = f"a conversation of {self.context:,} tokens", self.weights + self.cache
        weights, token = f"{_size(self.weights)} of {self.dtype} weights", f"{self.token / 1024:g} KiB"
        wanted = f"{self.option} {math.ceil(10 * self.cache / GIB) / 10:.1f}"
        first = f"{weights}; {token} of keys and values per token, {_size(self.conversation)} for {context}"
        second = f"{self.each:,} conversations at once need {_size(self.cache)}: {wanted}"
        lines = [
            f"sampling   {count} vLLM server{'s' * (count > 1)} ({where}), besides the {training} that train",
            f"a server   {first}",
            f"           {second}; with less, some wait for others",
        ]
        if memory is not None:
            room = int(SHARE * memory * GIB) - self.weights
            lines.append(
                f"           a GPU of {memory:g} GiB holds weights and {room // self.conversation:,} conversations "
                f"({self.tokens(room):,} tokens), at vLLM's default of {SHARE:.0%} of its memory"
                if room >= self.conversation
                else f"           a GPU of {memory:g} GiB does not hold weights and {context}: give --vllm "
                "'--tensor-parallel-size 2'"
            )
        if peak is not None:
            lines.append(
                f"           on a {place} that also trains, they come on top of the trainer's peak: {_size(peak)} + "
                f"{_size(whole)} = {_size(peak + whole)}"
            )
        return "\n".join(lines)


def block_of(on_gpu: bool) -> int:
    """Return the tokens of a block of the cache."""
    return GPU_BLOCK if on_gpu else BLOCK


def _host(url: str) -> str:
    return urlsplit(url).hostname or url


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.1f} MiB"
