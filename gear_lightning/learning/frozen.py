"""Storage of a micro-batch's first scoring for later inner epochs: old log-probs, teacher statistics and credit.

The data are plain CPU tensors of the action tokens only, in the same form in memory and in a checkpoint. `recall`
returns them on the device of the batch.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..batch import Credit, TokenStats

Scored = tuple[Float[Tensor, "batch seq"], TokenStats | None, Credit]  # old log-probs, teacher, credit
Kept = dict[str, Any]  # as plain data: "old_logprobs", and the fields of "teacher" and "credit"

OUTSIDE = {"weights": 1, "anchor": -1}  # value of a field outside the action tokens; 0 for fields not listed


def keep(scored: Scored, mask: Bool[Tensor, "batch seq"], top_k: int | None) -> Kept:
    """Return the data to keep of a micro-batch.

    Args:
        scored: old log-probs, teacher statistics and credit.
        mask: action tokens.
        top_k: number of the policy's most likely tokens whose teacher log-probs later epochs need. None: later epochs
            need no teacher statistics.
    """
    old_logprobs, teacher, credit = scored
    where = mask.nonzero(as_tuple=True)

    def small(values: Tensor) -> Tensor:
        kind = torch.int32 if values.dtype == torch.int64 else values.dtype  # ids and positions
        return values.detach()[where].to("cpu", kind)

    def fields(source: TokenStats | Credit) -> dict[str, Tensor]:
        given = {name: value for name, value in vars(source).items() if value is not None}
        if not top_k:
            given = {name: value for name, value in given.items() if not name.startswith("top_")}
        # a credit rule may need more of them; they are sorted by probability
        return {name: small(v[..., :top_k] if name.startswith("top_") else v) for name, v in given.items()}

    return {
        "old_logprobs": small(old_logprobs),
        "teacher": None if teacher is None or top_k is None else fields(teacher),
        "credit": fields(credit),
    }


def recall(kept: Kept, mask: Bool[Tensor, "batch seq"]) -> Scored:
    """Return the inverse of `keep`, on the device of ``mask``."""
    whole = kept["old_logprobs"].dim() == 2  # checkpoints of older versions hold all columns

    def spread(name: str, values: Tensor) -> Tensor:
        values = values.to(mask.device, torch.int64 if values.dtype == torch.int32 else values.dtype)
        if whole:
            return values
        empty = values.new_full((*mask.shape, *values.shape[1:]), OUTSIDE.get(name, 0))
        return empty.masked_scatter(mask.reshape(*mask.shape, *[1] * (values.dim() - 1)), values)

    def fields(source: dict[str, Tensor]) -> dict[str, Any]:
        return {name: spread(name, values) for name, values in source.items() if values is not None}

    teacher = None if kept["teacher"] is None else TokenStats(**fields(kept["teacher"]))
    return spread("old_logprobs", kept["old_logprobs"]), teacher, Credit(**fields(kept["credit"]))
