"""Convert DeepSpeed ZeRO's optimizer state, kept in flat pieces, to the full tensors of a plain optimizer, and back.

Stages 1 and 2 hold one flat float32 piece per parameter group and rank; ``_hp_mapping`` of a parameter gives the
position of its part in the piece. Stage 3 holds every parameter's part at an offset of a flat sub-group. Neither has a
public interface for writing state before the first step.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..optimizers import as_kept, in_floats
from .sharding import is_zero3, shape


def _pieces(optimizer: Any) -> list[Tensor]:
    """Return the flat tensors that are the parameters of the wrapped optimizer."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(optimizer.fp32_partitioned_groups_flat)
    return list(optimizer.single_partition_of_fp32_groups)


def _place(optimizer: Any, parameter: Any) -> tuple[Tensor, slice, slice] | None:
    """Return (flat piece, slice of it, slice of the flat parameter) of this rank's part; None if it has no part."""
    if is_zero3(parameter):
        piece, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = dist.get_rank(parameter.ds_process_group) * size
        count = max(0, min(size, shape(parameter).numel() - start))
        flat = optimizer.fp32_partitioned_groups_flat[piece]
        return flat, slice(offset, offset + count), slice(start, start + count)
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
    group = next(i for i, members in enumerate(optimizer.bit16_groups) if any(p is parameter for p in members))
    flat = optimizer.single_partition_of_fp32_groups[group]
    return flat, slice(there.start, there.start + there.numel), slice(here.start, here.start + here.numel)


def _split(optimizer: Any) -> tuple[list[str], dict[str, Any]]:
    """Return the names of the states that are shaped like the parameter, and the other states with their values."""
    for flat in _pieces(optimizer):
        state = optimizer.optimizer.state.get(flat)
        if state:
            like = [k for k, v in state.items() if isinstance(v, Tensor) and v.shape == flat.shape]
            return like, {k: v for k, v in state.items() if k not in like}
    return [], {}


def whole_state(optimizer: Any, parameters: list[Any], keep: Callable[[Tensor], Any]) -> dict[str, Any]:
    """Return what ``state_dict`` of the plain optimizer would return. All ranks must call it.

    Args:
        optimizer: DeepSpeed's optimizer.
        parameters: the parameters, in the order of the plain optimizer.
        keep: called on each full tensor as soon as it is gathered; its result is stored.
    """
    names, others = _split(optimizer)
    floats = {  # (flat piece, name) -> state
        (id(flat), name): in_floats(mine[name])
        for flat in _pieces(optimizer)
        if (mine := optimizer.optimizer.state.get(flat))
        for name in names
    }
    state: dict[int, dict[str, Any]] = {}
    for i, parameter in enumerate(parameters):
        state[i] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in others.items()} if names or others else {}
        for name in names:
            state[i][name] = keep(_whole(optimizer, parameter, name, floats))
    groups = []
    for group, members in zip(optimizer.optimizer.param_groups, _members(optimizer, parameters), strict=True):
        groups.append({**{k: copy.deepcopy(v) for k, v in group.items() if k != "params"}, "params": members})
    return {"state": {i: s for i, s in state.items() if s}, "param_groups": groups}


def _members(optimizer: Any, parameters: list[Any]) -> Iterator[list[int]]:
    """Yield the positions of each group's parameters."""
    number = {id(p): i for i, p in enumerate(parameters)}
    if not hasattr(optimizer, "sub_group_to_group_id"):
        for group in optimizer.bit16_groups:
            yield sorted(number[id(p)] for p in group)
        return
    for group in range(len(optimizer.optimizer.param_groups)):
        mine = [s for s, g in optimizer.sub_group_to_group_id.items() if g == group]
        yield sorted(number[id(p)] for s in mine for p in optimizer.fp16_groups[s])


def _whole(optimizer: Any, parameter: Any, name: str, floats: dict[tuple[int, str], Tensor]) -> Tensor:
    place = _place(optimizer, parameter)
    device = parameter.device
    whole = torch.zeros(shape(parameter).numel(), device=device, dtype=torch.float32)
    if place is not None:
        flat, there, here = place
        whole[here] = floats[id(flat), name][there].to(device, torch.float32)
    dist.all_reduce(whole, group=parameter.ds_process_group if is_zero3(parameter) else parameter._dp_group)
    return whole.reshape(shape(parameter))


def load_whole_state(optimizer: Any, parameters: list[Any], saved: Mapping[str, Any]) -> None:
    """Load the state that ``state_dict`` of a plain optimizer, or `whole_state`, has returned.

    Args:
        optimizer: DeepSpeed's optimizer.
        parameters: the parameters, in the order of the plain optimizer.
        saved: the state with full tensors, known to every rank.
    """
    for group, values in zip(optimizer.optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({k: v for k, v in values.items() if k != "params"})
    state = optimizer.optimizer.state
    for i, parameter in enumerate(parameters):
        place = _place(optimizer, parameter)
        if place is None or i not in saved["state"]:
            continue
        flat, there, here = place
        for name, value in saved["state"][i].items():
            if isinstance(value, Tensor) and value.shape == shape(parameter) and value.dim():
                if name not in state[flat]:
                    state[flat][name] = torch.zeros_like(flat)
                state[flat][name][there] = value.flatten()[here].to(flat)
            else:
                state[flat][name] = value.clone() if isinstance(value, Tensor) else value
    for flat in _pieces(optimizer):
        mine = state[flat]
        for name in [k for k, v in mine.items() if isinstance(v, Tensor) and v.shape == flat.shape]:
            mine[name] = as_kept(optimizer.optimizer, flat, name, mine[name])


def keep_idle_steps_idle(optimizer: Any) -> None:
    """Make a ZeRO optimizer keep weights and states unchanged if the full gradient is 0.

    For a non-finite gradient it does so itself. It has no hook between computing the norm and the step, so this wraps
    the step of each flat group.
    """
    step = optimizer._optimizer_step

    def step_on_a_gradient(group: int) -> None:
        if float(optimizer._global_grad_norm) > 0:
            step(group)

    optimizer._optimizer_step = step_on_a_gradient


def whole_gradient(parameter: Any) -> Tensor | None:
    """Return the full gradient of a parameter under any strategy, before clipping. All ranks must call it.

    Call it between the backward pass and the optimizer's step.

    Returns:
        The sum over all ranks and micro-batches; None if the parameter has no gradient.
    """
    if is_zero3(parameter) or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    gradient = parameter.grad
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def piece_bytes(optimizer: Any) -> int:
    """Return the bytes of the flat pieces that a ZeRO optimizer holds on this rank; 0 for any other optimizer."""
    optimizer = getattr(optimizer, "_optimizer", optimizer)
    if not hasattr(optimizer, "refresh_fp32_params"):
        return 0
    return sum(piece.numel() * piece.element_size() for piece in _pieces(optimizer))
