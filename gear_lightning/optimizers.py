"""Optimizers beyond torch's own, for ``model.optimizer``."""

import logging
from functools import partial
from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.distributed.tensor import DTensor

from .errors import require_extra


def adamw_8bit(
    lr: float = 1e-6,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bf16_stochastic_round: bool = False,
) -> OptimizerCallable:
    """AdamW whose two averages are kept in 8 bits: 2 bytes a parameter in place of 8 (torchao; extra: torchao).

    Each 256 values share a scale; a tensor of fewer than 4096 values, or whose size 256 does not divide, stays in its
    own precision. Its kernels are compiled in the first step, which needs a C compiler and takes some seconds.

    Args:
        lr: learning rate.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the square root of the second average.
        weight_decay: decoupled, times the learning rate.
        bf16_stochastic_round: round the new weights up or down at random, for bfloat16 weights
            (``trainer.precision=bf16-true``), where a small step would be rounded away.

    Raises:
        UserError: torchao is not installed.
    """
    require_extra("torchao")
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it tells of kernels for GPUs that are not here
    from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

    return partial(
        AdamW8bit, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bf16_stochastic_round=bf16_stochastic_round
    )


MARK = "8-bit average"  # key of the dict that stands for one in a checkpoint


def plain_states(states: Any) -> Any:
    """Optimizer states with their 8-bit averages as dicts of plain tensors.

    A checkpoint is then loaded with ``weights_only=True`` where torchao is not installed, and by Lightning, whose
    ``map_location`` is a function: torch cannot load a wrapper of tensors so.
    """
    if isinstance(states, dict):
        return {key: plain_states(value) for key, value in states.items()}
    if isinstance(states, list | tuple):
        return type(states)(map(plain_states, states))
    if type(states).__name__ != "OptimState8bit":
        return states
    names, (signed, dtype) = states.__tensor_flatten__()
    return {MARK: {name: getattr(states, name) for name in names}, "signed": signed, "dtype": dtype}


def states_from_plain(states: Any) -> Any:
    """Inverse of `plain_states`.

    Raises:
        UserError: there are 8-bit averages, and torchao is not installed.
    """
    if isinstance(states, dict) and MARK in states:
        require_extra("torchao")
        from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore[reportMissingImports]

        return OptimState8bit(**states[MARK], signed=states["signed"], dtype=states["dtype"])
    if isinstance(states, dict):
        return {key: states_from_plain(value) for key, value in states.items()}
    if isinstance(states, list | tuple):
        return type(states)(map(states_from_plain, states))
    return states


def in_floats(state: Any) -> Any:
    """A state with its 8-bit average as floats; quantised again, a value moves by less than one of its 256 levels."""
    return state.dequantize() if type(state).__name__ == "OptimState8bit" else state


def as_kept(optimizer: Any, parameter: Any, name: str, value: Tensor) -> Tensor:
    """Floats as the optimizer keeps the state of that name: in 8 bits where it does.

    Args:
        optimizer: a torch optimizer.
        parameter: of this state; whole, this rank's part, or a ``DTensor``.
        name: of the state.
        value: laid out as the parameter.
    """
    if not hasattr(optimizer, "_new_buffer"):  # torchao's
        return value
    kept = optimizer._new_buffer(parameter, name == "exp_avg")
    if isinstance(kept, DTensor):
        kept.to_local().copy_(value.to_local() if isinstance(value, DTensor) else value)
    else:
        kept.copy_(value)
    return kept
