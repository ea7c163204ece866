"""What both engines with vLLM need: the kind of log-probs, seeds, the comparison with the policy after an update."""

import hashlib
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..serving.client import ServerError
from .engine import Sampling

PROBE = 64  # tokens whose log-probs are compared after each update
# Largest mean difference of log-probs, in nats, that rounding explains. Measured on a CPU: 5e-6 in float32, 0.06 in
# bfloat16; stale weights, or keys and values of older weights, differ by 0.1 and more in float32.
ROUNDING = {"float32": 1e-3}
COARSE = 0.15


class Probe:
    """Fixed ids, and their log-probs by the policy's own forward.

    Args:
        model: the policy.
        vocabulary: number of its ids.
        longest: longest context that vLLM takes, tokens.

    Attributes:
        ids: the ids.
    """

    @torch.no_grad()
    def __init__(self, model: Any, vocabulary: int, longest: int):
        draws = np.random.Generator(np.random.Philox(0)).integers(0, vocabulary, min(PROBE, longest - 1))
        self.ids: list[int] = draws.tolist()
        device = model.get_output_embeddings().weight.device
        logits = model(input_ids=torch.tensor([self.ids], device=device), use_cache=False).logits[0, :-1].float()
        wanted = torch.tensor(self.ids[1:], device=device)[:, None]
        self._ours = logits.log_softmax(-1).gather(-1, wanted)[:, 0].cpu()
        self._name = type(model).__name__

    def check(self, theirs: list[float], dtype: str, who: str) -> None:
        """Compare log-probs of the ids after the first.

        Args:
            theirs: vLLM's.
            dtype: in which vLLM computes.
            who: names vLLM in the message.

        Raises:
            ServerError: they differ by more than rounding.
        """
        gap, dtype = (torch.tensor(theirs) - self._ours).abs().mean().item(), dtype.removeprefix("torch.")
        if not gap <= ROUNDING.get(dtype, COARSE):
            raise ServerError(
                f"{who} does not compute what the policy computes: after an update of its weights, log-probs differ by "
                f"{gap:.2g} nats on average. This vLLM may not support the model ({self._name}, {dtype}); use another "
                "engine"
            )


def logprobs_mode(sampling: Sampling) -> str | None:
    """Return vLLM's mode in which the log-probs are those of softmax(logits / temperature); None if any is right:
    greedy turns are not learned from.

    Raises:
        UserError: there is none.
    """
    if sampling.temperature == 0:
        return None
    if sampling.temperature == 1:
        return "raw_logprobs"
    if sampling.top_p < 1 or sampling.top_k:
        raise UserError(
            f"vLLM does not give the log-probs that learning needs for temperature={sampling.temperature:g} together "
            f"with top_p={sampling.top_p:g}, top_k={sampling.top_k}: use temperature 1, or neither top_p nor top_k"
        )
    return "processed_logprobs"


def seed_of(seed: tuple[int, ...]) -> int:
    """Return a request's seed as a number of 63 bits."""
    return int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:8], "big") >> 1
