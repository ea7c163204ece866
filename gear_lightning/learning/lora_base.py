"""Frozen base weights under adapters: checkpoints omit them if the base model can be loaded again.

A checkpoint then holds their fingerprint instead, which does not depend on the strategy: see
`gear_lightning.distributed.sharding.fingerprint`.
"""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ..auto_classes import auto_class
from ..distributed.sharding import fingerprint, local, rest
from ..errors import UserError
from .lora import is_adapter

PREFIX = "policy."  # prefix of the policy's weights in a checkpoint


def frozen_names(states: dict[str, Any]) -> list[str]:
    """Return the keys of a checkpoint's frozen weights (and of the model's buffers)."""
    return [key for key in states if key.startswith(PREFIX) and not is_adapter(key)]


def _frozen(named: Any) -> list[Any]:
    """Return the frozen weights, in an order that does not depend on the adapters."""
    plain = {key.replace(".base_layer.", "."): value for key, value in named if not is_adapter(key)}
    return [plain[key] for key in sorted(plain)]


def _precision(weights: list[Any]) -> torch.dtype:
    return next((w.dtype for w in weights if w.is_floating_point()), torch.float32)


def identify(policy: Any) -> dict[str, str]:
    """Return the base's identity: its precision in training -> fingerprint. All ranks must call it.

    For float32 weights the identity also contains their fingerprint when rounded to bfloat16, for an evaluation in that
    precision.
    """
    rest(policy)
    weights = _frozen(policy.named_parameters())
    precision = _precision(weights)
    several = [precision, torch.bfloat16] if precision == torch.float32 else [precision]
    return {_name(dtype): fingerprint(weights, dtype) for dtype in several}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def check_base(policy: Any, identity: dict[str, str], where: str, trained_on: str) -> None:
    """Check a model's frozen weights against those that a checkpoint's adapters were trained on.

    The weights are then rounded to the precision that they had in training. All ranks must call it.

    Args:
        policy: with or without adapters, whole or sharded.
        identity: result of `identify` in training.
        where: path or hub id that the model was loaded from.
        trained_on: path or hub id that the model was loaded from in training.

    Raises:
        UserError: the weights differ; the message names both.
    """
    rest(policy)
    weights = _frozen(policy.named_parameters())
    then, now = getattr(torch, next(iter(identity))), _precision(weights)
    dtype = then if then.itemsize < now.itemsize else now
    if _name(dtype) in identity and (mine := fingerprint(weights, dtype)) != identity[_name(dtype)]:
        raise UserError(
            f"the checkpoint holds adapters without their base weights, and those of {where} differ from the ones used "
            f"in training (fingerprint {mine}, in training {identity[_name(dtype)]}); use the model that "
            f"{trained_on} was at that time"
        )
    if then.itemsize < now.itemsize:
        for weight in weights:
            local(weight).copy_(local(weight).to(then))


def same_weights(policy: Any, states: dict[str, Any]) -> bool:
    """Return whether a checkpoint that holds frozen weights has the same ones as this policy. All ranks must call it.

    Call it before the checkpoint overwrites the policy's weights.
    """
    rest(policy)
    mine = dict(policy.named_parameters())
    theirs = {key: states[PREFIX + key] for key in mine if PREFIX + key in states}
    dtype = _precision(_frozen(theirs.items()))
    return fingerprint(_frozen(mine.items()), dtype) == fingerprint(_frozen(theirs.items()), dtype)


def take_up(module: Any, checkpoint: dict[str, Any], fitting: bool) -> None:
    """Prepare a module with adapters for the weights of a checkpoint, with or without frozen ones.

    All ranks must call it.

    Args:
        module: the `GearModule`; its ``base`` is the base that its own checkpoints will record.
        checkpoint: without the parts that an evaluation does not load.
        fitting: whether the module will be trained.

    Raises:
        UserError: the checkpoint's adapters were trained on another base, or it holds only some of the weights.
    """
    lora, states = checkpoint["lora"], checkpoint["state_dict"]
    mine = module.state_dict(keep_vars=True)
    frozen = frozen_names(mine)
    module.strict_loading = True
    if any(key in states for key in frozen):  # they replace those that were loaded
        if lora["base"] is None or not fitting:
            module.base = None
        elif module.base is not None and not same_weights(module.policy, states):
            rank_zero_warn(
                f"The checkpoint's frozen weights are not those of {module.base}, and replace them: the checkpoints "
                "of this run hold them too."
            )
            module.base = None
        return
    odd = sorted((mine.keys() - set(frozen)) ^ states.keys())
    if odd or not lora.get("frozen"):
        raise UserError(f"the checkpoint's weights are not this model's: {', '.join(odd[:3])} ({len(odd)} in total)")
    where = module.base or f"model.policy ({type(module.source).__name__})"
    check_base(module.policy, lora["frozen"], where, lora["base"])
    module.strict_loading = False  # the frozen weights stay as they were loaded


def load_base(lora: dict[str, Any], base: str | None) -> Any:
    """Load the base model of a checkpoint that holds only adapters, in float32, rounded as in training.

    Args:
        lora: the checkpoint's record of its adapters.
        base: directory or hub id of the base. None: the one that the checkpoint names, without any download.

    Raises:
        UserError: the model cannot be loaded, or is not the one that the adapters were trained on.
    """
    from transformers import AutoConfig

    where = base or lora["base"]
    try:
        local = {"trust_remote_code": False, "local_files_only": base is None}
        config = AutoConfig.from_pretrained(where, **local)
        model = auto_class(config).from_pretrained(where, dtype=torch.float32, **local)
    except Exception as error:  # a broken model can raise any exception
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the checkpoint holds adapters without the model that they were trained on, and that model, {where}, "
            f"cannot be loaded ({first}); give its directory or hub id with --base"
        ) from None
    check_base(model, lora["frozen"], where, lora["base"])
    return model


def add_adapters(model: Any, states: dict[str, Tensor]) -> None:
    """Load the policy's adapters into a model that already has its frozen weights.

    Raises:
        ValueError: adapters are missing, or the keys are not those of adapters.
    """
    wanted = {key for key in model.state_dict() if is_adapter(key)}
    if odd := sorted(wanted ^ states.keys()):
        raise ValueError(f"its weights are not those of the adapters: {', '.join(odd[:3])} ({len(odd)} in total)")
    model.load_state_dict(states, strict=False)
