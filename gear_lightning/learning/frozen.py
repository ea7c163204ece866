"""What later inner epochs need of a micro-batch's first scoring: old log-probs, teacher stats and credit.

It is kept as plain CPU tensors of the action tokens alone, the same in memory as in a checkpoint, and comes back on the
device of the batch.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..batch import Credit, TokenStats

Scored = tuple[Float[Tensor, "batch seq"], TokenStats | None, Credit]  # old log-probs, teacher, credit
Kept = dict[str, Any]  # the same as plain data: "old_logprobs", and "teacher" and "credit" by field

OUTSIDE = {"weights": 1, "anchor": -1}  # what a field is outside the action tokens; 0 where it is not listed


def keep(scored: Scored, mask: Bool[Tensor, "batch seq"], top_k: int | None) -> Kept:
    """What is to be kept of a micro-batch.

    Args:
        scored: old log-probs, teacher stats and credit.
        mask: action tokens.
        top_k: of how many of the policy's most likely tokens later epochs need the teacher's log-probs. None: they need
            nothing of the teacher.
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
        # a credit rule may have asked for more of them; the likeliest come first
        return {name: small(v[..., :top_k] if name.startswith("top_") else v) for name, v in given.items()}

    return {
        "old_logprobs": small(old_logprobs),
        "teacher": None if teacher is None or top_k is None else fields(teacher),
        "credit": fields(credit),
    }


def recall(kept: Kept, mask: Bool[Tensor, "batch seq"]) -> Scored:
    """Inverse of `keep`, on the device of ``mask``."""
    whole = kept["old_logprobs"].dim() == 2  # in a checkpoint of an older version: all columns

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
