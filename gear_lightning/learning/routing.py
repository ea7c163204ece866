"""How evenly a mixture of experts uses its experts, and a loss that makes the use more even."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..logits import decoder


@dataclass
class Routed:
    """What one router decided.

    Attributes:
        logits: of the experts, before any bias; with gradient.
        experts: that each token was sent to.
    """

    logits: Float[Tensor, "batch seq experts"]
    experts: Int[Tensor, "batch seq chosen"]


def routers(model: Any) -> list[tuple[nn.Module, int]]:
    """Return a model's routers, and the place of the router logits in the output of each; empty without experts."""
    body = decoder(model)
    recorded = (getattr(body, "_can_record_outputs", None) or {}).get("router_logits") or []
    found = []
    for name, part in body.named_modules():
        for kind in recorded if isinstance(recorded, list) else [recorded]:
            within = getattr(kind, "layer_name", None)
            if isinstance(part, kind.target_class) and (within is None or within in name):
                found.append((part, kind.index))
    return found


@contextmanager
def watched(model: Any, size: torch.Size) -> Iterator[list[Routed]]:
    """Yield a list to which each router adds its decisions in a forward of the policy within this context.

    Args:
        model: the policy.
        size: number of rows and columns of the forward's tokens.
    """
    seen: list[Routed] = []
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1

    def take(_: nn.Module, __: Any, output: tuple[Any, ...], place: int) -> None:
        logits = output[place].reshape(*size, -1)
        experts = next((x for x in output if isinstance(x, Tensor) and not x.is_floating_point()), None)
        experts = logits.detach().topk(chosen).indices if experts is None else experts.reshape(*size, -1)
        seen.append(Routed(logits, experts))

    handles = [part.register_forward_hook(partial(take, place=place)) for part, place in routers(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _per_row(routed: Routed, valid: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch experts"]:
    """Return how many tokens of each row were sent to each expert."""
    sent = torch.zeros_like(routed.logits, dtype=torch.float32).scatter_(-1, routed.experts, 1.0)
    return (sent * valid[..., None]).sum(1)


def expert_counts(routed: list[Routed], valid: Bool[Tensor, "batch seq"]) -> Float[Tensor, "layers experts"]:
    """Return how many tokens each layer has sent to each of its experts."""
    return torch.stack([_per_row(layer, valid).sum(0) for layer in routed])


def balance_loss(routed: list[Routed], valid: Bool[Tensor, "batch seq"]) -> Float[Tensor, ""]:
    """Return the balance loss of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20), summed over rows.

    For one row and layer it is ``sum over experts of f P``: P is the expert's mean probability (softmax of the router's
    logits), f is its share of the row's tokens times the number of experts. It is 1 if all experts are used evenly. The
    result is the mean over layers. Each row counts by itself: a loss on the shares of a micro-batch, as in the Switch
    Transformer, would depend on the split into micro-batches.

    Args:
        routed: from `watched`.
        valid: tokens that count; a row without any adds 0.
    """
    tokens, total = valid.sum(1, keepdim=True).clamp_min(1), routed[0].logits.new_zeros((), dtype=torch.float32)
    for layer in routed:
        counts = _per_row(layer, valid)
        shares = counts * counts.shape[-1] / (tokens * layer.experts.shape[-1])
        probabilities = (layer.logits.float().softmax(-1) * valid[..., None]).sum(1) / tokens
        total = total + (shares * probabilities).sum()
    return total / len(routed)
