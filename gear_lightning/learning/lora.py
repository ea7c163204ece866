"""Low-rank adapters on a frozen policy: the base weights are stored once, for the policy and its teacher.

An adapted layer computes W x + (alpha / rank) B A x (LoRA, arXiv 2106.09685). Each layer holds A and B of the policy
and of the teacher; `active` selects the pair that is used. The model keeps its Hugging Face class. Adapters are float32
whatever the precision of the base: see `Float32Linear`.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..auto_classes import text_parts
from ..errors import UserError, require_extra

POLICY, TEACHER = "policy", "teacher"  # names of the adapters; they are part of the keys in a checkpoint
MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}  # model types, as in peft
SEED = 0  # of the initial adapters: equal on all processes and in all runs


class Float32Linear(nn.Linear):
    """A or B of an adapter: float32 weights that compute in the precision of the layer's input.

    In bfloat16, an Adam step of 1e-5 would be smaller than half the distance to the next number for most elements of A,
    and would be lost. The product is computed in the input's precision, as under autocast: in training, in the
    teacher's pass and in sampling, and without a float32 copy of the input for the backward pass.
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
    """Train low-rank adapters on frozen weights instead of all weights.

    They have no effect at the start (B = 0), and are float32 whatever ``trainer.precision``.

    Args:
        rank: of the adapters.
        alpha: adapters are scaled by alpha / rank.
        targets: layers to adapt: names of linear layers in the model, e.g. ``[q_proj, v_proj]``, or ``all-linear`` for
            every linear layer except the output head. Layers of an image encoder, routers and some projections of Mamba
            cannot be adapted.
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
        """Return the options as plain data: ``LoRA(**plain)`` restores them."""
        return asdict(self)

    def layers(self, model: Any) -> list[str]:
        """Return the full names of the layers that will be adapted.

        Raises:
            UserError: a target matches no linear layer, or a layer that shares its weight with another module.
        """
        from transformers.pytorch_utils import Conv1D

        head, reached = model.get_output_embeddings(), {id(m) for part in text_parts(model) for m in part.modules()}
        found = [(name, part) for name, part in model.named_modules() if id(part) in reached]
        kinds, kept_plain = nn.Linear | Conv1D, _kept_plain(model)
        linear = {n: p for n, p in found if isinstance(p, kinds) and not kept_plain(n.rpartition(".")[2], p)}
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
                "so adapters could not be merged; remove it from lora.targets"
            )
        return found

    def adapt(self, model: Any) -> None:
        """Freeze the model and add the policy's adapters, in place. Its weights must be whole (not sharded).

        Raises:
            UserError: peft is not installed, or see `layers`.
        """
        require_extra("peft")
        from peft import LoraConfig, TaskType

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]  (typed int, but floats work)
            target_modules=self.layers(model),
            lora_dropout=0.0,  # sampler, teacher and update must see one distribution
            task_type=TaskType.CAUSAL_LM,
        )
        _inject(model, config, POLICY)


def _kept_plain(model: Any) -> Callable[[str, nn.Module], bool]:
    """Return a function of a layer's name and the layer that returns whether it cannot have adapters.

    Routers that are linear layers have several outputs (Llama 4). Recurrent layers of Mamba read the weights of some
    layers instead of calling them; peft refuses ``out_proj`` of these models.
    """
    mamba = getattr(model.config.get_text_config(), "model_type", None) in MAMBA

    def kept(name: str, part: nn.Module) -> bool:
        return type(part).__name__.endswith("Router") or name == "dt_proj" or (mamba and name == "out_proj")

    return kept


@contextmanager
def _as_named() -> Iterator[None]:
    """Keep peft from renaming targets within the context.

    For mixtures of experts it takes ``gate_proj`` and others for names of transformers 4, where they were the experts,
    and adapts the experts' parameters instead of the dense layers and shared experts that have these names now.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # older versions of peft rename nothing
        yield
        return
    original = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = original


def _inject(model: Any, config: Any, name: str) -> None:
    from peft import inject_adapter_in_model

    others = vars(model).pop("peft_config", {})  # peft would warn about a second adapter
    # on the CPU and from its own seed: equal on every device, and the run's random state does not change
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(SEED)
        with _as_named():
            inject_adapter_in_model(config, model, adapter_name=name)
        for layer in _adapted(model):
            _make_float32(layer, name)
    model.peft_config = {**others, name: config}
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(_belongs(key, POLICY))


def _make_float32(layer: Any, name: str) -> None:
    """Replace adapters that peft cast to the base's precision by float32 ones with initial values.

    A is uniform in +-1 / sqrt(inputs), as in nn.Linear and peft, and B = 0.
    """
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
    """Return whether a parameter, by its key, belongs to the adapter of that name."""
    return f".lora_A.{name}." in key or f".lora_B.{name}." in key


def _adapted(model: nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [part for part in model.modules() if isinstance(part, LoraLayer)]


def is_adapted(model: nn.Module) -> bool:
    """Return whether `LoRA.adapt` was called on the model."""
    return POLICY in getattr(model, "peft_config", {})


def has_teacher(model: nn.Module) -> bool:
    """Return whether `add_teacher` was called on the model."""
    return TEACHER in getattr(model, "peft_config", {})


def adapter_keys(model: nn.Module, name: str) -> list[str]:
    """Return the names of one adapter's parameters (`POLICY` or `TEACHER`), in the same order for both."""
    return [key for key, _ in model.named_parameters() if _belongs(key, name)]


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Return the parameters of one adapter, in the same order for both adapters."""
    return [parameter for key, parameter in model.named_parameters() if _belongs(key, name)]


def is_adapter(key: str) -> bool:
    """Return whether a key of a state dict belongs to an adapter."""
    return _belongs(key, POLICY) or _belongs(key, TEACHER)


def without_teacher(states: dict[str, Any]) -> dict[str, Any]:
    """Return the state dict without the teacher's adapters."""
    return {key: value for key, value in states.items() if not _belongs(key, TEACHER)}


@torch.no_grad()
def add_teacher(policy: nn.Module) -> None:
    """Add a second, frozen adapter with values equal to the policy's, bit for bit."""
    _inject(policy, copy.deepcopy(policy.peft_config[POLICY]), TEACHER)  # pyright: ignore
    pairs = zip(adapter_parameters(policy, TEACHER), adapter_parameters(policy, POLICY), strict=True)
    for theirs, ours in pairs:
        if not ours.is_meta:  # on meta, another process has the values
            theirs.data = ours.detach().clone()


@contextmanager
def active(model: nn.Module, name: str | None) -> Iterator[None]:
    """Use another adapter within the context; None: only the base weights.

    peft's own switch also changes ``requires_grad``, and a backward of the policy's pass may still follow. This
    function changes only the selected adapter, and restores it even after an exception.
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
    """Restore the model's plain layers, in place.

    Args:
        model: with the policy's adapters.
        merge: add the adapters to the base weights; if False, discard them.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in [(n, part) for n, part in model.named_modules() if isinstance(part, LoraLayer)]:
        if merge:
            layer.merge(adapter_names=[POLICY])
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write the policy's adapters in the form that ``PeftModel.from_pretrained(base, folder)`` loads.

    Args:
        model: with the policy's adapters.
        folder: an existing directory.
        base: directory or hub id of the base model, recorded in ``adapter_config.json``.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    states = get_peft_model_state_dict(model, adapter_name=POLICY, save_embedding_layers=False)
    named = {f"base_model.model.{key}": value.contiguous() for key, value in states.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config[POLICY])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
