"""The output head in float32 on a model that computes in lower precision.

A logit of 20 is rounded by up to 0.06 in bfloat16, in the teacher's pass as in the policy's, and their difference is
the credit signal. The layers below keep their precision.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError

HeadPrecision = Literal["float32", "bfloat16"]


class Float32Head(nn.Linear):
    """An output head that computes in float32 whatever its weights are kept in, outside of autocast."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(input.float(), self.weight.float(), bias)


def head_in_float32(precision: HeadPrecision | None, trainer_precision: str) -> bool:
    """Whether the head has to be told to compute in float32.

    Args:
        precision: as asked for; None: float32 under autocast, elsewhere that of the weights.
        trainer_precision: ``trainer.precision``.

    Raises:
        UserError: the model computes in another precision than the head is asked for.
    """
    mixed = trainer_precision.endswith("-mixed")
    low = mixed or trainer_precision in ("bf16-true", "16-true")
    if precision == "bfloat16" and not trainer_precision.startswith("bf16"):
        raise UserError(
            f"model.head_precision=bfloat16 does not go with trainer.precision={trainer_precision}; leave it out, or "
            "use bf16-mixed or bf16-true"
        )
    return low and (precision == "float32" or (precision is None and mixed))


def use_float32_head(model: Any) -> Any:
    """The model with a head that computes in float32, in place. What samples and what trains both call it.

    Raises:
        UserError: the head is not a linear layer.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise UserError(
            f"model.head_precision=float32: the output head of {type(model).__name__} is a {type(head).__name__} and "
            "not a linear layer; use model.head_precision=bfloat16"
        )
    head.__class__ = Float32Head
    return model
