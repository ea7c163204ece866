"""Exports a Lightning checkpoint as a Hugging Face model directory, or as a directory of adapters."""

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ..errors import UserError
from ..learning.shipped import CONFIG, GENERATION, as_json, file_name, merged_config, read_json
from ..runs.checkpoints import check_whole
from .dtypes import DType
from .model_card import model_card


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Args:
        adapter: write only the adapters, in the format of ``PeftModel.from_pretrained``, and the tokenizer. The base
            model is written to ``base/`` if it is not a model directory or hub id (a warm start, a GGUF file).
        dtype: dtype of the weights. ``auto``: that of the checkpoint; float32 if adapters are merged, because rounding
            the sum to bfloat16 would lose most of a small change.
        shard_size: maximum size of a weight file, e.g. ``5GB``. None: the default of transformers (50 GB).
        card: write a model card, ``README.md``: config, data, code version, metrics (see
            `gear_lightning.export.model_card`).
        license: license on the card, e.g. ``apache-2.0``. None: the card names no license.
        base: directory or hub id of the model that the adapters were trained on, if it has moved since. It must have
            the same weights.

    Raises:
        UserError: an unknown dtype, an invalid shard size, or ``license`` without ``card``.
    """

    adapter: bool = False
    dtype: DType = "auto"
    shard_size: str | None = None
    card: bool = True
    license: str | None = None
    base: str | None = None

    def __post_init__(self):
        if self.dtype not in get_args(DType):
            raise UserError(f"--dtype {self.dtype}: use one of {', '.join(get_args(DType))}")
        if self.shard_size is not None and not re.fullmatch(r"[1-9]\d*(KB|MB|GB|TB)", self.shard_size):
            raise UserError(f"--shard-size {self.shard_size}: use a number and a unit, for example 500MB or 5GB")
        if self.license is not None and not self.card:
            raise UserError("--license is written to the model card, which --no-card omits; use only one of them")


def export_checkpoint(checkpoint: Path, folder: Path, options: ExportOptions = ExportOptions(), **changes: Any) -> str:
    """Write the policy of a checkpoint as a directory that ``AutoModelForCausalLM.from_pretrained`` loads,
    or ``AutoModelForImageTextToText`` if the policy is a whole vision-language model.

    The directory also contains the files that the model was published with (see `gear_lightning.learning.shipped`): its
    generation configuration with the stop tokens of training, its configuration with all keys, tokenizer, chat
    templates and terms of use.

    Args:
        checkpoint: a ``.ckpt`` file of this project; loaded with ``weights_only=True``.
        folder: the target directory; must not exist, or be empty. It is written completely or not at all.
        options: options of the export.
        changes: changes of single options, for example ``adapter=True``.

    Returns:
        The Python expression that loads the directory.

    Raises:
        UserError: the file does not exist or is not a checkpoint of this project; the folder is not empty or cannot be
            written; the checkpoint has no adapters; the base model of the adapters is missing or has changed; or a
            weight is not finite in the requested dtype.
    """
    from safetensors import SafetensorError

    options = ExportOptions(**{**vars(options), **changes})
    check_whole(checkpoint)
    check_empty(folder)
    state = _load(checkpoint)
    lora = state.get("lora")
    if options.adapter and lora is None:
        raise UserError(f"{checkpoint}: contains no adapters, all weights were trained; export it without --adapter")
    if options.base is not None and not (lora or {}).get("frozen"):
        raise UserError(f"{checkpoint}: contains all weights of the model; export it without --base")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name + ".partial-"))
        try:
            how = _write(checkpoint, state, partial, folder, options)
            if folder.exists():
                folder.rmdir()
            _open_to_others(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors raises SafetensorError if the disk is full
        raise UserError(f"{folder}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    return how


def _open_to_others(folder: Path) -> None:
    """Set the permissions of a directory and its contents according to the umask. Only the owner can read temporary
    directories and files written by safetensors."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def check_empty(folder: Path) -> None:
    """Check that a directory does not exist or is empty, without changing anything.

    Raises:
        UserError: it is not empty, or not a directory.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty directory")


def _load(checkpoint: Path) -> dict[str, Any]:
    import torch

    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        _ = state["policy_files"], state["state_dict"]
    except Exception as error:
        raise _not_ours(checkpoint, error) from None
    return state


def _not_ours(checkpoint: Path, error: Exception) -> UserError:
    first = (str(error).strip().splitlines() or [""])[0]
    return UserError(f"{checkpoint}: not a checkpoint of gear_lightning ({type(error).__name__}: {first})")


def _write(checkpoint: Path, state: dict[str, Any], partial: Path, folder: Path, options: ExportOptions) -> str:
    """Write everything into ``partial``, which is later renamed to ``folder``. Return the expression that loads it."""
    from ..auto_classes import auto_class

    lora = state.get("lora")
    try:
        files = {file_name(name): data.numpy().tobytes() for name, data in state["policy_files"].items()}
    except Exception as error:
        raise _not_ours(checkpoint, error) from None
    for name, content in files.items():
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_bytes(content)
    configs = {name: read_json(f"{checkpoint}: {name}", files.get(name, b"{}")) for name in (CONFIG, GENERATION)}
    try:
        model = _policy(partial, state["state_dict"], lora, options.base, merge=not options.adapter)
        base = options.base or lora["base"] if lora and options.adapter else None
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from None
    except Exception as error:
        raise _not_ours(checkpoint, error) from None
    _cast(checkpoint, model, options.dtype)
    kind = auto_class(model.config).__name__
    if options.adapter:
        base = _write_adapter(model, partial, folder, base, configs, options)
        how = f"PeftModel.from_pretrained({kind}.from_pretrained({base!r}), {str(folder)!r})"
    else:
        _write_model(model, partial, configs, options)
        how = f"{kind}.from_pretrained({str(folder)!r})"
    if options.card:
        about = {"name": folder.name, "adapter": options.adapter, "license": options.license}
        card = model_card(checkpoint, state, **about, loader=kind)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return how


def _cast(checkpoint: Path, model: Any, dtype: DType) -> None:
    """Cast the weights to another dtype, except those that transformers keeps in float32. Check that all are finite.

    Raises:
        UserError: a weight is not finite.
    """
    import torch

    from ..runs.finite import all_finite

    if dtype != "auto":
        wanted = getattr(torch, dtype)
        kept = set(model._keep_in_fp32_modules_strict or ())
        kept |= set(model._keep_in_fp32_modules or ()) if wanted == torch.float16 else set()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and not kept & set(name.split(".")):
                tensor.data = tensor.data.to(wanted)
    for name, tensor in model.state_dict().items():
        if not all_finite([tensor]):
            why = "" if dtype != "float16" else " in float16; use --dtype bfloat16"
            raise UserError(f"{checkpoint}: {name} contains values that are not finite{why}")


def _write_model(model: Any, place: Path, configs: Mapping[str, dict[str, Any]], options: ExportOptions) -> None:
    """Write weights and configurations. The configurations come from the checkpoint, because those that transformers
    derives from the model lack its stop tokens and sampling defaults."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()
    size = {} if options.shard_size is None else {"max_shard_size": options.shard_size}
    model.save_pretrained(place, **size)
    saved = read_json(CONFIG, (place / CONFIG).read_bytes())
    (place / CONFIG).write_bytes(as_json(merged_config(configs[CONFIG], saved)))
    (place / GENERATION).write_bytes(as_json(configs[GENERATION]))


def _check_size(config: Any, policy: dict[str, Any]) -> None:
    """Check that a configuration matches the size of the weights, before a model of its size is created.

    Raises:
        ValueError: the configuration describes a larger model.
    """
    import torch

    from ..auto_classes import auto_class

    if (config.get_text_config().num_hidden_layers or 0) > len(policy):
        raise ValueError(f"its configuration has more layers than its weights have tensors, {len(policy)}")
    with torch.device("meta"):
        bare = auto_class(config).from_config(config, trust_remote_code=False)
    wanted, there = (sum(x.numel() for x in xs) for xs in (bare.parameters(), policy.values()))
    if wanted > there:
        raise ValueError(f"its configuration describes {wanted:,} weights, but it contains {there:,}")


def _policy(
    folder: Path, weights: dict[str, Any], lora: dict[str, Any] | None, base: str | None, *, merge: bool
) -> Any:
    """Return the policy of a checkpoint.

    Args:
        folder: directory with its configuration.
        weights: the checkpoint's state dict.
        lora: the checkpoint's description of its adapters; None if it has none.
        base: directory or hub id of the base model if the checkpoint does not contain the frozen weights. None: the one
            that the checkpoint names.
        merge: add the adapters to the weights.
    """
    import torch
    from transformers import AutoConfig

    from ..auto_classes import auto_class
    from ..learning.lora import LoRA, remove, without_teacher
    from ..learning.lora_base import PREFIX, add_adapters, load_base

    policy = {key.removeprefix(PREFIX): value for key, value in weights.items() if key.startswith(PREFIX)}
    if lora is not None and lora.get("frozen"):
        model = load_base(lora, base)
        LoRA(**lora["options"]).adapt(model)
        add_adapters(model, without_teacher(policy))
        if merge:
            remove(model, merge=True)
        return model
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    _check_size(config, policy)
    dtype = next((value.dtype for value in policy.values() if value.is_floating_point()), torch.float32)
    dtype = torch.float32 if lora and merge else dtype
    model = auto_class(config).from_config(config, trust_remote_code=False, dtype=dtype)
    if lora is not None:
        LoRA(**lora["options"]).adapt(model)
    model.load_state_dict(without_teacher(policy))
    if lora is not None and merge:
        remove(model, merge=True)
    return model


def _write_adapter(
    model: Any, partial: Path, folder: Path, base: str | None, configs: Mapping[str, dict[str, Any]],
    options: ExportOptions,
) -> str:  # fmt: skip
    """Write the adapters, and also the base model if it is not available elsewhere. Return the path or hub id of the
    base model.

    Args:
        model: the policy with its adapters.
        partial: directory to write into.
        folder: path that ``partial`` is renamed to later.
        base: directory or hub id of the base model; None if it has none.
        configs: configurations of the model by file name. The generation configuration stays next to the adapters,
            because the base model's may have other stop tokens.
        options: options for the base model.
    """
    from ..learning.lora import remove, save_adapter

    (partial / CONFIG).unlink(missing_ok=True)  # a config file would mark the directory as a full model
    save_adapter(model, partial, base or str((folder / "base").resolve()))
    if base is None:
        remove(model, merge=False)
        _write_model(model, partial / "base", configs, options)
        base = str(folder / "base")
    return base
