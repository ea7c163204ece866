"""Low-rank adapters on a frozen policy: the base weights are stored once, for the policy and its teacher.

An adapted layer computes W x + (alpha / rank) B A x (LoRA, arXiv 2106.09685). A and B of the policy and those of the
teacher lie side by side in the layer; `active` switches which pair takes part. The model stays the Hugging Face class
that it was. Adapters are float32 whatever the precision of the base: see `Float32Linear`.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError, require_extra

POLICY, TEACHER = "policy", "teacher"  # names of the adapters; they are part of the keys in a checkpoint
SEED = 0  # of the starting adapters: equal on all processes and in all runs


class Float32Linear(nn.Linear):
    """A or B of an adapter: float32 weights that take part in the precision of the layer's input.

    In bfloat16 an Adam step of 1e-5 would be smaller than half the distance to the next number for most elements of A,
    and would be lost. The product is computed in the input's precision, as autocast does: in training, in the teacher's
    pass and in sampling alike, and without a float32 copy of the input for the backward pass.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the weights, but never to a lower precision: Lightning and DeepSpeed cast whole modules."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            lower = moved.is_floating_point() and moved.dtype.itemsize < tensor.dtype.itemsize
            return tensor.to(moved.device) if lower else moved

        return super()._apply(keep, recurse)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype))


@dataclass(frozen=True)
class LoRA:
    """Train low-rank adapters on frozen weights in place of all weights. They start without effect (B = 0), and are
    float32 whatever ``trainer.precision``.

    Args:
        rank: of the adapters.
        alpha: adapters are scaled by alpha / rank.
        targets: layers to adapt: names of linear layers as the model has them, e.g. ``[q_proj, v_proj]``, or
            ``all-linear`` for every linear layer but the output head.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: list[str] | Literal["all-linear"] = "all-linear"

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora.rank={self.rank} must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha={self.alpha} must be above 0, and finite")
        if not self.targets or (isinstance(self.targets, str) and self.targets != "all-linear"):
            raise UserError(f"lora.targets={self.targets!r} must be all-linear, or a list of names of linear layers")

    def __str__(self) -> str:
        targets = self.targets if isinstance(self.targets, str) else "+".join(sorted(set(self.targets)))
        return f"rank {self.rank}, alpha {self.alpha:g}, targets {targets}"

    def plain(self) -> dict[str, Any]:
        """The options as plain data: ``LoRA(**plain)`` is this again."""
        return asdict(self)

    def layers(self, model: Any) -> list[str]:
        """Full names of the layers that will be adapted.

        Raises:
            UserError: a target is the name of no linear layer, or of one that shares its weight with another part.
        """
        from transformers.pytorch_utils import Conv1D

        linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D)}
        head = model.get_output_embeddings()
        if self.targets == "all-linear":
            found = [name for name, part in linear.items() if part is not head]
        else:
            matches = {t: [n for n in linear if n == t or n.endswith("." + t)] for t in self.targets}
            missing = [target for target, names in matches.items() if not names]
            if missing:
                known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
                raise UserError(
                    f"lora.targets: {', '.join(missing)} matches no linear layer of {type(model).__name__}; "
                    f"it has {known}"
                )
            found = [name for name in linear if any(name in names for names in matches.values())]
        if not found:
            raise UserError(f"lora.targets={self.targets}: {type(model).__name__} has no linear layer to adapt")
        if any(linear[name] is head for name in found) and head.weight is model.get_input_embeddings().weight:
            raise UserError(
                f"lora.targets: the output head of {type(model).__name__} shares its weight with the embedding, "
                "and could not be merged; leave it out"
            )
        return found

    def adapt(self, model: Any) -> None:
        """Freeze the model and put the policy's adapters into it, in place. Its weights must be whole (not sharded).

        Raises:
            UserError: peft is not installed, or see `layers`.
        """
        require_extra("peft")
        from peft import LoraConfig, TaskType

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]  (typed int, used as a number)
            target_modules=self.layers(model),
            lora_dropout=0.0,  # sampler, teacher and update must see one distribution
            task_type=TaskType.CAUSAL_LM,
        )
        _inject(model, config, POLICY)


def _inject(model: Any, config: Any, name: str) -> None:
    from peft import inject_adapter_in_model

    others = vars(model).pop("peft_config", {})  # peft would warn of a second adapter
    # on the CPU and from its own seed: equal on every device, and the run's random state stays as it is
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(SEED)
        inject_adapter_in_model(config, model, adapter_name=name)
        for layer in _adapted(model):
            _make_float32(layer, name)
    model.peft_config = {**others, name: config}
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(_belongs(key, POLICY))


def _make_float32(layer: Any, name: str) -> None:
    """Put float32 starting weights in the place of those that peft has cast to the base's precision: A uniform in
    +-1 / sqrt(inputs), as nn.Linear and peft have it, and B = 0."""
    device = layer.get_base_layer().weight.device
    for parts in (layer.lora_A, layer.lora_B):
        size = parts[name].in_features, parts[name].out_features
        made = Float32Linear(*size, bias=False, dtype=torch.float32, device="meta" if device.type == "meta" else None)
        if parts is layer.lora_B:
            nn.init.zeros_(made.weight)
        parts[name] = made.to(device)
    layer.cast_input_dtype_enabled = False  # the weights are cast to the input's precision, and not the reverse
    layer._active_adapter = [POLICY]


def _belongs(key: str, name: str) -> bool:
    """Whether a parameter, by its key, belongs to the adapter of that name."""
    return f".lora_A.{name}." in key or f".lora_B.{name}." in key


def _adapted(model: nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [part for part in model.modules() if isinstance(part, LoraLayer)]


def is_adapted(model: nn.Module) -> bool:
    """Whether `LoRA.adapt` was called on the model."""
    return POLICY in getattr(model, "peft_config", {})


def has_teacher(model: nn.Module) -> bool:
    """Whether `add_teacher` was called on the model."""
    return TEACHER in getattr(model, "peft_config", {})


def adapter_keys(model: nn.Module, name: str) -> list[str]:
    """Names of one adapter's parameters (`POLICY` or `TEACHER`), in the same order for both."""
    return [key for key, _ in model.named_parameters() if _belongs(key, name)]


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Parameters of one adapter, in the same order."""
    return [parameter for key, parameter in model.named_parameters() if _belongs(key, name)]


def is_adapter(key: str) -> bool:
    """Whether a key of a state dict belongs to an adapter."""
    return _belongs(key, POLICY) or _belongs(key, TEACHER)


def without_teacher(states: dict[str, Any]) -> dict[str, Any]:
    """A state dict less the teacher's adapters."""
    return {key: value for key, value in states.items() if not _belongs(key, TEACHER)}


@torch.no_grad()
def add_teacher(policy: nn.Module) -> None:
    """Put a second, frozen adapter beside the policy's, equal to it to the bit."""
    _inject(policy, copy.deepcopy(policy.peft_config[POLICY]), TEACHER)  # pyright: ignore
    pairs = zip(adapter_parameters(policy, TEACHER), adapter_parameters(policy, POLICY), strict=True)
    for theirs, ours in pairs:
        if not ours.is_meta:  # else another process has the values
            theirs.data = ours.detach().clone()


@contextmanager
def active(model: nn.Module, name: str | None) -> Iterator[None]:
    """Compute with another adapter for a while; None: with the base weights alone.

    peft's own switch also changes what requires a gradient, and the policy's pass may still wait for its backward: here
    only the choice of the adapter changes, and is put back whatever happens.
    """
    layers = _adapted(model)
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [] if name is None else [name]
        yield
    finally:
        for layer, choice in zip(layers, before, strict=True):
            layer._active_adapter = choice


def remove(model: Any, *, merge: bool) -> None:
    """Give the model its plain layers back, in place.

    Args:
        model: with the policy's adapters.
        merge: add them to the base weights; else they are dropped.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in [(n, part) for n, part in model.named_modules() if isinstance(part, LoraLayer)]:
        if merge:
            layer.merge(adapter_names=[POLICY])
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write the policy's adapters as ``PeftModel.from_pretrained(base, folder)`` loads them.

    Args:
        model: with the policy's adapters.
        folder: an existing directory.
        base: directory or hub id of the base model, noted in ``adapter_config.json``.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    states = get_peft_model_state_dict(model, adapter_name=POLICY, save_embedding_layers=False)
    named = {f"base_model.model.{key}": value.contiguous() for key, value in states.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config[POLICY])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
