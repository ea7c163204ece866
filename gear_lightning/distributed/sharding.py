"""Sharded parameters: this rank's part, the full tensor, and conversions between them.

A parameter is unsharded (one process, DDP, ZeRO-1 and -2), a ``DTensor`` (FSDP2), or DeepSpeed's (ZeRO-3: ``ds_tensor``
holds this rank's part, flattened and padded). Code that must work in all these cases uses these functions.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable
from functools import wraps
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

F = TypeVar("F", bound=Callable)


def is_zero3(parameter: Any) -> bool:
    """Return whether DeepSpeed has partitioned the parameter."""
    return hasattr(parameter, "ds_tensor")


def is_sharded(model: nn.Module) -> bool:
    """Return whether any parameter of the model is sharded."""
    return any(isinstance(p, DTensor) or is_zero3(p) for p in model.parameters())


def shape(parameter: Any) -> torch.Size:
    """Return the shape of the full parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def local(parameter: Any) -> Tensor:
    """Return this rank's part, which shares memory with the parameter; under ZeRO-3 flattened, including padding."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return parameter.ds_tensor.data if is_zero3(parameter) else parameter.data


def stored(parameter: Any) -> Any:
    """Return the tensor whose memory holds this rank's part of an unsharded or a ZeRO-3 parameter."""
    return parameter.ds_tensor if is_zero3(parameter) else parameter


def _zero3_length(parameter: Any) -> int:
    """Return the number of elements of this rank's part that are not padding."""
    size = parameter.ds_tensor.numel()
    return max(0, min(size, shape(parameter).numel() - dist.get_rank(parameter.ds_process_group) * size))


def whole_of(parameter: Any, part: Tensor) -> Tensor:
    """Return the full tensor of which every rank holds a part, laid out as `local` of the parameter. Collective."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        part = part.to(mesh.device_type)  # it may be in CPU memory
        size = {"shape": parameter.shape, "stride": parameter.stride()}
        return DTensor.from_local(part, mesh, parameter.placements, run_check=False, **size).full_tensor()
    if not is_zero3(parameter):
        return part
    part = part.to(parameter.device)
    world = dist.get_world_size(parameter.ds_process_group)
    whole = part.new_empty(world * part.numel())
    dist.all_gather_into_tensor(whole, part.contiguous(), group=parameter.ds_process_group)
    return whole[: shape(parameter).numel()].view(shape(parameter))


def part_of(parameter: Any, whole: Tensor) -> Tensor:
    """Return the part of a full tensor, known to every rank, that corresponds to `local` of the parameter."""
    if isinstance(parameter, DTensor):
        return shard_like(parameter, whole).to_local()
    if not is_zero3(parameter):
        return whole
    size, length = parameter.ds_tensor.numel(), _zero3_length(parameter)
    start = dist.get_rank(parameter.ds_process_group) * size
    return nn.functional.pad(whole.flatten()[start : start + length], (0, size - length))


def full(parameter: Any) -> Tensor:
    """Return the full tensor. All ranks must call it."""
    return whole_of(parameter, local(parameter))


def fill(parameter: Any, whole: Tensor) -> None:
    """Write a full tensor, known to every rank, into the parameter."""
    local(parameter).copy_(part_of(parameter, whole))


def shard_like(parameter: DTensor, whole: Tensor) -> DTensor:
    """Return a full tensor, known to every rank, sharded like the parameter."""
    mesh = parameter.device_mesh
    return distribute_tensor(whole.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)


def rest(model: nn.Module) -> None:
    """Free weights that FSDP2 keeps gathered after a forward, so that `local` returns the parts."""
    from torch.distributed.fsdp import FSDPModule

    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def state_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters that this rank holds."""
    return sum(local(p).numel() * local(p).element_size() for p in model.parameters())


def most(number: int, device: torch.device) -> int:
    """Return the maximum of the ranks' numbers. All ranks must call it."""
    value = torch.tensor(number, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


# -- copies -----------------------------------------------------------------------------------------------------------


def skeleton(model: nn.Module) -> Any:
    """Return the same modules with parameters on the meta device, which use no memory.

    Buffers are copied, and tied parameters stay tied.
    """
    memo = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)  # pyright: ignore[reportArgumentType]


def replace_parameters(model: nn.Module, make: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Replace every parameter by ``make(parameter)``, which is called once for tied parameters."""
    made: dict[int, nn.Parameter] = {}
    for part in list(model.modules()):
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = make(parameter)
                    made[id(made[id(parameter)])] = made[id(parameter)]
                part._parameters[name] = made[id(parameter)]


@torch.no_grad()
def whole_copy(model: Any, blank: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """Return an unsharded copy of a model that may be sharded; weights are gathered one after another. Collective.

    Args:
        model: the model with the weights.
        blank: its `skeleton`, created before it was sharded; None for an unsharded model.
        device: device of the copy.
        dtype: dtype of the copy's weights. None: unchanged.
    """
    rest(model)
    copied = skeleton(blank or model)
    sources = iter(model.parameters())

    def take(parameter: nn.Parameter) -> nn.Parameter:
        value = full(next(sources))
        return nn.Parameter(value.to(device, dtype or value.dtype, copy=True), requires_grad=False)

    replace_parameters(copied, take)
    return copied.to(device).eval()


def fingerprint(model: nn.Module | Iterable[Any], dtype: torch.dtype | None = None) -> str:
    """Return a hash of a model's weights, equal for bitwise equal weights under any sharding. All ranks must call it.

    Args:
        model: a model, sharded or not, or some of a model's parameters.
        dtype: hash the weights as rounded to this dtype.
    """
    sums, groups = [], []
    for parameter in model.parameters() if isinstance(model, nn.Module) else model:
        values = local(parameter)
        if is_zero3(parameter):
            values = values[: _zero3_length(parameter)]
        values = values.to(dtype or values.dtype).contiguous()
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
        total = values.view(integer).sum(dtype=torch.int64)  # for integers the order does not matter
        sums.append(total.to(parameter.device))  # offloaded parts are in CPU memory
        groups.append(_groups(parameter))
    total = torch.stack(sums)
    for group in dict.fromkeys(group for mine in groups for group in mine):  # in the same order on all ranks
        inside = torch.tensor([group in mine for mine in groups], device=total.device)
        part = torch.where(inside, total, 0)
        dist.all_reduce(part, group=group)
        total = torch.where(inside, part, total)
    return hashlib.sha256(total.cpu().numpy().tobytes()).hexdigest()[:16]


def _groups(parameter: Any) -> tuple[Any, ...]:
    """Return the process groups over which the parameter is sharded."""
    if is_zero3(parameter):
        return (parameter.ds_process_group,)
    if not isinstance(parameter, DTensor):
        return ()
    return tuple(
        parameter.device_mesh.get_group(i) for i, place in enumerate(parameter.placements) if isinstance(place, Shard)
    )


# -- forwards ---------------------------------------------------------------------------------------------------------


def forward_of_model(function: F) -> F:
    """Register ``function(model, ...)`` as a forward method of its model.

    FSDP2 gathers weights only around methods that are registered as forwards. It finds the outputs whose gradients it
    waits for only in tuples, lists and dicts of tensors.
    """
    name = f"_gear_{function.__name__}"

    @wraps(function)
    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

        if not isinstance(model, FSDPModule):
            return function(model, *args, **kwargs)
        if not hasattr(model, name):
            setattr(model, name, MethodType(function, model))
            register_fsdp_forward_method(model, name)  # pyright: ignore[reportArgumentType]
        return getattr(model, name)(*args, **kwargs)

    return call  # pyright: ignore[reportReturnType]
