"""The weights that a server gets: those of a checkpoint, whole, with adapters merged."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def served_weights(model: Any) -> dict[str, Tensor]:
    """Return a model's weights by the names of its checkpoints, tied ones once.

    Active adapters are merged out of place: W + (alpha / rank) B A. Mixtures of experts, whose experts transformers
    stores in one tensor, get one tensor per expert, as in published checkpoints.

    Args:
        model: an unsharded model.
    """
    from transformers.core_model_loading import revert_weight_conversion

    saved = model.state_dict().keys()
    named = [*model.named_parameters(), *(pair for pair in model.named_buffers() if pair[0] in saved)]
    adapted = {name: part for name, part in model.named_modules() if hasattr(part, "get_delta_weight")}
    found = dict[str, Tensor]()
    for name, parameter in named:
        layer = next((layer for layer in adapted if name.startswith(layer + ".")), None)
        if layer is None:
            found[name] = parameter.detach()
        elif name.startswith(f"{layer}.base_layer."):
            found[name.replace(".base_layer.", ".")] = _merged(name, parameter.detach(), adapted[layer])
    return revert_weight_conversion(model, found)


def _merged(name: str, weight: Tensor, layer: Any) -> Tensor:
    if not name.endswith(".base_layer.weight"):
        return weight
    change = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
    return (weight.float() + change).to(weight.dtype)
