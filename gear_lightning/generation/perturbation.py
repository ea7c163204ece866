"""How far rounding moves a model's outputs, measured on the model itself.

The embeddings of the input are multiplied by 1 + eps or 1 - eps, eps being one unit in the last place of the precision
that the model computes in. Every later operation then rounds differently, as it does in any other arrangement of the
same computation (other batch, kernels or cache), and a router's near ties fall differently too. By as much as that
changes the outputs, any two right computations may differ.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MATMUL = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}  # float32 matrix products on a GPU: TF32, bfloat16


def unit(model: Any) -> float:
    """One unit in the last place, relative, of the narrowest type that the model computes in, in the context of the
    caller (autocast, precision of matrix products on a GPU)."""
    kind = next(model.parameters()).device.type
    eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    if torch.is_autocast_enabled(kind):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(kind)).eps)
    return max(eps, MATMUL[torch.get_float32_matmul_precision()]) if kind == "cuda" else eps


def low_precision(model: Any) -> bool:
    """Whether the model computes below float32, in the context of the caller."""
    return unit(model) > torch.finfo(torch.float32).eps


@contextmanager
def rounded_anew(model: Any) -> Iterator[None]:
    """Let the model's forwards round differently inside. Weights and random states stay as they are."""
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
