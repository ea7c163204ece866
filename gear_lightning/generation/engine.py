"""Base class of generation engines, which sample the policy's turns.

An engine works turn by turn: `submit` requests a turn, `poll` returns the finished turns, `release` drops a
conversation. The randomness of a turn depends only on its request, so the samples do not depend on the batch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed.sharding import forward_of_model
from ..errors import UserError
from ..logits import decoder, output_logits


@dataclass(frozen=True)
class Sampling:
    """Sampling options.

    Args:
        temperature: temperature of the softmax. 0: always the most likely token.
        top_p: sample from the smallest set of tokens with at least this probability.
        top_k: sample from this number of most likely tokens. 0: from all tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1 and self.top_k >= 0):
            raise UserError(f"{self}: out of range; use temperature >= 0 and finite, 0 < top_p <= 1, top_k >= 0")

    @property
    def scoring_temperature(self) -> float:
        """Temperature of the log-probs: the sampling temperature, or 1 for greedy sampling."""
        return self.temperature or 1.0


@dataclass
class TurnRequest:
    """A request for one turn.

    Attributes:
        key: the conversation. A later request with the same key extends the ids of the earlier one, unless the
            conversation was released in between.
        ids: the whole context, up to the start of the policy's turn.
        max_tokens: maximum length of the turn.
        seed: seed of this turn's draws.
    """

    key: int
    ids: list[int]
    max_tokens: int
    seed: tuple[int, ...]


@dataclass
class SampledTurn:
    """A finished turn.

    Attributes:
        key: the conversation.
        ids: sampled ids, including the stop token.
        logprobs: nats, of softmax(logits / temperature) before top-p and top-k, and at temperature 0 of
            softmax(logits). The trainer computes the same quantity, so the two differ only numerically. The effect of
            top-p, top-k or greedy sampling on a token's probability is not included.
        stopped: whether the policy sampled a stop token; False if ``max_tokens`` cut the turn short.
        version: `GenerationEngine.version` of the weights that sampled it. None: those at the phase's begin.
    """

    key: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    version: int | None = None


@forward_of_model
def next_logits(model: Any, last: Tensor, ids: Tensor, **cache: Any) -> Tensor:
    """Return the logits [rows, ids] after the id at position ``last`` [rows] of each row of ``ids`` [rows, seq]."""
    hidden = decoder(model)(input_ids=ids, **cache).last_hidden_state
    return output_logits(model, hidden[torch.arange(len(last), device=ids.device), last])


@dataclass(frozen=True)
class RunFacts:
    """What an engine may need to know of a run besides its model.

    Attributes:
        folder: the run directory.
        context: longest context, tokens.
        sampling: how tokens are sampled in training.
        dtype: name of the dtype in which the policy samples.
        write_model: writes the policy's configuration and tokenizer, without weights, to a directory.
    """

    folder: Path
    context: int
    sampling: Sampling
    dtype: str
    write_model: Callable[[Path], None]


def _nothing() -> None:
    """Default of `GenerationEngine.before_forward`: do nothing."""


def _never() -> bool:
    """Default of `GenerationEngine.interrupted`."""
    return False


class GenerationEngine(ABC):
    """Samples turns from the policy's current weights.

    An engine must call ``before_forward`` before every forward of the model: if weights are gathered layer by layer,
    all ranks must take part in each forward. ``interrupted`` says that requests are waiting to be submitted: `poll`
    should then return what is finished, even if it is nothing, so that they join the batch.

    Attributes:
        continuous: whether a request costs the running ones nothing when it joins them, so that it need not wait for
            others.
        detached: whether it samples outside of this process, with weights of its own that `begin` hands over: then
            rollouts can be sampled on a thread while the policy is updated.
        version: optimizer steps of the weights that the next `begin` hands over.
    """

    continuous = False
    detached = False
    version = 0

    before_forward: Callable[[], None] = staticmethod(_nothing)
    interrupted: Callable[[], bool] = staticmethod(_never)

    def fingerprint(self, dtype: torch.dtype | None) -> str | None:
        """Return `sharding.fingerprint` of the weights that the engine samples with, rounded to ``dtype``; None if the
        engine cannot compute it. All ranks call it."""
        return None

    def prepare(self, facts: RunFacts) -> None:  # noqa: B027
        """Take the facts of the run. All ranks call it before the first `begin`; once for each stage."""

    def close(self) -> None:  # noqa: B027
        """Free what has outlived rollout phases. All ranks call it at the end of a run; a later `begin` may follow."""

    def check(self, model: Any) -> None:  # noqa: B027
        """Raise `UserError` if the engine does not support models of this class and config."""

    def check_context(self, tokens: int) -> None:  # noqa: B027
        """Raise `UserError` if the engine does not take contexts of this many tokens, response included."""

    def metrics(self) -> Iterable[tuple[str, float, int]]:
        """Return (name, mean, number of values) of what was measured since the last call."""
        return ()

    def fork(self) -> "GenerationEngine":
        """Return an engine for a rollout phase of its own, beside that of this one, with the same weights. Only for a
        detached engine, whose `begin` may then be called while other phases are open: it waits for the turns that are
        being sampled, and hands the new weights over."""
        raise NotImplementedError(f"{type(self).__name__} has one rollout phase at a time")

    @abstractmethod
    def begin(self, model: Any, sampling: Sampling, stop_ids: set[int]) -> None:
        """Start a rollout phase with these weights."""

    @abstractmethod
    def submit(self, request: TurnRequest) -> None:
        """Request a turn."""

    @abstractmethod
    def poll(self) -> list[SampledTurn]:
        """Sample until at least one submitted turn is finished, or until ``interrupted``. Return the finished turns."""

    @abstractmethod
    def release(self, key: int) -> None:
        """Drop a conversation."""

    @abstractmethod
    def end(self) -> None:
        """End the rollout phase and free its memory."""


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    Args:
        logits: [rows, vocab].
        uniforms: [rows] in [0, 1); the same number and distribution always give the same token.
        sampling: temperature, top-p, top-k.

    Returns:
        Token ids [rows], and their log-probs [rows] in nats before top-p and top-k.
    """
    logprobs = (logits.float() / sampling.scoring_temperature).log_softmax(-1)
    if sampling.temperature == 0:
        ids = logprobs.argmax(-1)
    else:
        probs = logprobs.exp().double()
        if sampling.top_k or sampling.top_p < 1:
            ordered, order = probs.sort(-1, descending=True)
            drop = ordered.cumsum(-1) - ordered >= sampling.top_p
            if sampling.top_k:
                drop[:, sampling.top_k :] = True
            probs = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(drop, 0))
        total = probs.cumsum(-1)
        target = (uniforms[:, None] * total[:, -1:]).to(total)
        ids = torch.searchsorted(total, target, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
    return ids, logprobs.gather(-1, ids[:, None]).squeeze(-1)
