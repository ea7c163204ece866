"""The checks of ``gear-lightning doctor``: versions and GPUs of a machine, and problems of a recipe on it."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ..distributed.strategy_rules import whole_replicas
from .memory import Strategy
from .recipe import Recipe, idle, refused
from .refusals import named

PACKAGES = ("torch", "lightning", "pytorch-lightning", "transformers", "deepspeed", "peft")
MALICIOUS = ("2.6.2", "2.6.3")  # of lightning and pytorch-lightning: GHSA-w37p-236h-pfx3


@dataclass(frozen=True)
class Machine:
    """Versions of packages (None: not installed), and the GPUs that torch finds."""

    versions: dict[str, str | None]
    gpus: tuple[str, ...] = ()
    memory_gib: tuple[float, ...] = ()
    bf16: bool = True


def look_at_machine() -> Machine:
    """Return a description of this machine."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    versions["CUDA"] = torch.version.cuda
    versions["NCCL"] = None
    if not torch.cuda.is_available():
        return Machine(versions)
    from torch.cuda import nccl

    versions["NCCL"] = ".".join(map(str, nccl.version()))
    seen = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    # bfloat16 needs compute capability 8; torch also reports support for its emulation on older GPUs
    return Machine(
        versions,
        tuple(f"{p.name} ({p.total_memory / 2**30:.0f} GiB)" for p in seen),
        tuple(p.total_memory / 2**30 for p in seen),
        all(p.major >= 8 for p in seen) or torch.version.hip is not None,
    )


def package_problems(versions: dict[str, str | None]) -> list[str]:
    """Return the problems of the installed versions."""
    found = []
    one, other, deepspeed = versions["lightning"], versions["pytorch-lightning"], versions["deepspeed"]
    if one != other:
        found.append(
            f"lightning {one} and pytorch-lightning {other} differ: "
            f"pip install lightning=={one} pytorch-lightning=={one}"
        )
    for name in ("lightning", "pytorch-lightning"):
        if versions[name] in MALICIOUS:
            found.append(
                f"{name} {versions[name]} is a malicious upload (GHSA-w37p-236h-pfx3): remove this environment and "
                "change every credential that it could read"
            )
    if deepspeed is None:
        found.append("deepspeed is not installed: no zero1, zero2, zero3; pip install 'deepspeed>=0.19,<0.20'")
    elif deepspeed.split(".")[:2] != ["0", "19"]:
        found.append(f"deepspeed {deepspeed}: zero1 to zero3 are tested with 0.19; pip install 'deepspeed>=0.19,<0.20'")
    return found


def problems(recipe: Recipe, machine: Machine, model: Any, gpus: int, strategy: Strategy | None) -> list[str]:
    """Return the problems of a recipe, each with what to do.

    Args:
        recipe: the recipe.
        machine: the machine on which it would run.
        model: the policy, on the meta device, without adapters.
        gpus: number of processes.
        strategy: the recipe's strategy; None for one that this package does not know.
    """
    budgets, trainer = recipe.generation.budgets, recipe.trainer
    found = [*refused(recipe, model, gpus), *package_problems(machine.versions), *idle(recipe)]
    on_gpu = trainer["accelerator"] in ("gpu", "cuda")
    if on_gpu and not machine.gpus:
        why = "no CUDA device is found" if machine.versions["CUDA"] else "this torch is built for CPUs only"
        found.append(f"trainer.accelerator={trainer['accelerator']}, but {why}")
    if machine.gpus and trainer["accelerator"] != "cpu" and not machine.bf16 and "bf16" in str(trainer["precision"]):
        found.append(f"trainer.precision={trainer['precision']}: a GPU here has no bfloat16; use 32-true")
    name, options = named(trainer)
    if strategy is None:
        found.append(f"trainer.strategy={name}: not tested with this package")
    if budgets.tokens >= budgets.context:
        found.append(
            f"generation.budgets.tokens={budgets.tokens} leaves no space for a prompt in context={budgets.context}"
        )
    if strategy != "fsdp" and not getattr(model, "_no_split_modules", None):
        found.append(f"{type(model).__name__} does not list its layers (_no_split_modules): fsdp cannot shard it")
    if strategy == "fsdp" and (message := whole_replicas(int(options.get("replicas") or 1), gpus)):
        found.append(message)
    if strategy == "ddp" and gpus > 1 and not options.get("gradient_as_bucket_view"):
        found.append(f"trainer.strategy={name} keeps gradients twice: use --config configs/strategy/ddp.yaml")
    config = model.config.get_text_config()
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        found.append(f"{type(model).__name__} is a mixture of experts: the estimate of its activations is too low")
    return found
