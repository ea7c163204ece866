"""Output head in float32 for a model that computes in lower precision.

bfloat16 rounds a logit of 20 by up to 0.06, in the teacher's pass and in the policy's, and the credit signal is the
difference of the two. The layers below the head keep their precision.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError

HeadPrecision = Literal["float32", "bfloat16"]


class Float32Head(nn.Linear):
    """An output head that computes in float32, whatever the dtype of its weights, outside of autocast."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(input.float(), self.weight.float(), bias)


def head_in_float32(precision: HeadPrecision | None, trainer_precision: str) -> bool:
    """Return whether the head must be switched to float32.

    Args:
        precision: requested precision; None: float32 under autocast, otherwise that of the weights.
        trainer_precision: ``trainer.precision``.

    Raises:
        UserError: the requested precision of the head is not available with ``trainer.precision``.
    """
    mixed = trainer_precision.endswith("-mixed")
    low = mixed or trainer_precision in ("bf16-true", "16-true")
    if precision == "bfloat16" and not trainer_precision.startswith("bf16"):
        raise UserError(
            f"model.head_precision=bfloat16 cannot be combined with trainer.precision={trainer_precision}; remove it, "
            "or use bf16-mixed or bf16-true"
        )
    return low and (precision == "float32" or (precision is None and mixed))


def use_float32_head(model: Any) -> Any:
    """Switch the model's head to float32, in place, and return the model. Sampling and training both call this.

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
