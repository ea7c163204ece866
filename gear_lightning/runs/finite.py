"""Check tensors and checkpoints for non-finite numbers."""

import math
from typing import Any

import torch


def all_finite(parts: Any) -> bool:
    """Return whether tensors hold only finite numbers. Does not copy them."""
    for part in parts:
        if part.is_floating_point() and part.numel():
            low, high = torch.aminmax(part)  # both are NaN if any value is
            if not (math.isfinite(low) and math.isfinite(high)):
                return False
    return True


def non_finite(checkpoint: dict[str, Any]) -> str | None:
    """Return the first tensor with a non-finite number among those that a resume restores; None if there is none."""

    def search(value: Any, name: str) -> str | None:
        if isinstance(value, torch.Tensor):
            return None if all_finite([value]) else name
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return next((found for key, part in items if (found := search(part, f"{name}.{key}")) is not None), None)

    parts = {name: checkpoint.get(name) for name in ("state_dict", "teacher_shadow", "optimizer_states")}
    return next((found for name, part in parts.items() if (found := search(part, name)) is not None), None)
