"""Measures how much rounding changes a model's outputs, on the model itself.

The input embeddings are multiplied by 1 + eps or 1 - eps, where eps is one unit in the last place of the model's
compute precision. Every later operation then rounds differently, as in any other arrangement of the same computation
(other batch, kernels or cache), and near ties of a router may be resolved differently. The resulting change of the
outputs is the difference to expect between any two correct computations.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MATMUL = {
    "highest": 0.0,
    "high": 2.0**-10,
    "medium": 2.0**-7,
}  # eps of float32 products on a GPU: TF32, bfloat16


def unit(model: Any) -> float:
    """Return one relative unit in the last place of the narrowest type that the model computes in, in the caller's
    context (autocast, precision of matrix products on a GPU)."""
    kind = next(model.parameters()).device.type
    eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    if torch.is_autocast_enabled(kind):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(kind)).eps)
    return max(eps, MATMUL[torch.get_float32_matmul_precision()]) if kind == "cuda" else eps


def low_precision(model: Any) -> bool:
    """Return whether the model computes in a lower precision than float32, in the caller's context."""
    return unit(model) > torch.finfo(torch.float32).eps


@contextmanager
def rounded_anew(model: Any) -> Iterator[None]:
    """Make the model's forwards round differently inside this context. Weights and random states are unchanged."""
    eps = unit(model)

    def shake(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
        random = torch.Generator().manual_seed(0)
        signs = 2 * torch.randint(0, 2, output.shape[-1:], generator=random) - 1
        return (output.float() * (1 + eps * signs.to(output.device))).to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(shake)
    try:
        yield
    finally:
        handle.remove()
