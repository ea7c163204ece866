"""Optimizers for ``model.optimizer`` in addition to torch's own."""

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
    """AdamW with its two moving averages in 8 bits: 2 bytes per parameter instead of 8 (torchao; extra: torchao).

    Every 256 values share a scale. A tensor of fewer than 4096 values, or whose size is not divisible by 256, keeps its
    own precision. The kernels are compiled in the first step, which needs a C compiler and takes some seconds.

    Args:
        lr: learning rate.
        betas: decay rates of the averages of the gradient and of its square.
        eps: added to the square root of the second average.
        weight_decay: decoupled weight decay, multiplied by the learning rate.
        bf16_stochastic_round: round the new weights stochastically. For bfloat16 weights
            (``trainer.precision=bf16-true``), where nearest rounding would discard small steps.

    Raises:
        UserError: torchao is not installed.
    """
    require_extra("torchao")
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it reports kernels for GPUs that are not present
    from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

    return partial(
        AdamW8bit, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bf16_stochastic_round=bf16_stochastic_round
    )


MARK = "8-bit average"  # key of the dict that represents one in a checkpoint


def plain_states(states: Any) -> Any:
    """Return optimizer states with 8-bit averages converted to dicts of plain tensors.

    Such a checkpoint can be loaded with ``weights_only=True`` if torchao is not installed, and by Lightning, whose
    ``map_location`` is a function, with which torch cannot load tensor subclasses.
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
    """Return the optimizer states that `plain_states` converted.

    Raises:
        UserError: there are 8-bit averages, but torchao is not installed.
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
    """Return a state with its 8-bit average as floats.

    Quantizing it again moves a value by less than one of its 256 levels.
    """
    return state.dequantize() if type(state).__name__ == "OptimState8bit" else state


def as_kept(optimizer: Any, parameter: Any, name: str, value: Tensor) -> Tensor:
    """Return floats in the format in which the optimizer stores the state of that name, for example 8 bits.

    Args:
        optimizer: a torch optimizer.
        parameter: the parameter of this state: unsharded, this rank's part, or a ``DTensor``.
        name: name of the state.
        value: the floats, laid out as the parameter.
    """
    if not hasattr(optimizer, "_new_buffer"):  # only torchao's optimizers have it
        return value
    kept = optimizer._new_buffer(parameter, name == "exp_avg")
    if isinstance(kept, DTensor):
        kept.to_local().copy_(value.to_local() if isinstance(value, DTensor) else value)
    else:
        kept.copy_(value)
    return kept
