"""From a Lightning checkpoint to a Hugging Face model directory, or to one of adapters."""

import argparse
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .checkpoints import check_whole
from .errors import UserError


def export_checkpoint(checkpoint: Path, folder: Path, *, adapter: bool = False, base: str | None = None) -> str:
    """Write the policy of a checkpoint as a directory that ``AutoModelForCausalLM.from_pretrained`` loads.

    Low-rank adapters are merged into the weights, in float32 whatever they were trained in: a sum rounded to bfloat16
    would lose most of a small change.

    Args:
        checkpoint: a ``.ckpt`` file of this project; loaded with ``weights_only=True``.
        folder: must not exist, or be empty.
        adapter: write the adapters alone, as ``PeftModel.from_pretrained`` loads them, with the tokenizer. The base
            model comes along in ``base/`` where it is no model directory or hub id (a warm start, a GGUF file).
        base: directory or hub id of the model that adapters were trained on, where it is not where it was in training.
            It must have the same weights.

    Returns:
        The Python expression that loads the directory.

    Raises:
        UserError: no such file, not one of ours, the folder holds something, the checkpoint has no adapters, or the
            model that they were trained on is gone or has changed.
    """
    import torch

    check_whole(checkpoint)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty directory")
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        files, weights = state["policy_files"], state["state_dict"]
    except Exception as error:
        raise UserError(f"{checkpoint}: not a checkpoint of gear_lightning ({type(error).__name__}: {error})") from None
    lora = state.get("lora")
    if adapter and lora is None:
        raise UserError(f"{checkpoint}: holds no adapters, all weights were trained; export it without --adapter")
    if base is not None and not (lora or {}).get("frozen"):
        raise UserError(f"{checkpoint}: holds all of its weights; export it without --base")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name + ".partial-"))
    try:
        try:
            for name, data in files.items():
                (partial / _file_name(name)).write_bytes(data.numpy().tobytes())
            model = _policy(partial, weights, lora, base, merge=not adapter)
            base = base or lora["base"] if adapter else None
        except UserError as error:
            raise UserError(f"{checkpoint}: {error}") from None
        except Exception as error:
            raise UserError(f"{checkpoint}: not a checkpoint of gear_lightning ({_first_line(error)})") from None
        if adapter:
            base = _write_adapter(model, partial, folder, base)
        else:
            model.save_pretrained(partial)
        if folder.exists():
            folder.rmdir()
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if adapter:
        return f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {str(folder)!r})"
    return f"AutoModelForCausalLM.from_pretrained({str(folder)!r})"


def _file_name(name: Any) -> str:
    """The name of a file beside the weights: configuration or tokenizer, never code, weights or another folder."""
    plain = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(json|txt|jinja|model)", name)
    if not plain or name.startswith("adapter_"):
        raise ValueError(f"it holds a file {name!r}, which is no part of a tokenizer or a configuration")
    return name


def _check_size(config: Any, policy: dict[str, Any]) -> None:
    """Look at whether a configuration fits the weights, before a model of its size is made.

    Raises:
        ValueError: it asks for a larger model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if (config.get_text_config().num_hidden_layers or 0) > len(policy):
        raise ValueError(f"its configuration has more layers than its weights have tensors, {len(policy)}")
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted, there = (sum(x.numel() for x in xs) for xs in (bare.parameters(), policy.values()))
    if wanted > there:
        raise ValueError(f"its configuration is of {wanted:,} weights, and it holds {there:,}")


def _policy(
    folder: Path, weights: dict[str, Any], lora: dict[str, Any] | None, base: str | None, *, merge: bool
) -> Any:
    """The policy of a checkpoint.

    Args:
        folder: holds its configuration.
        weights: the checkpoint's state dict.
        lora: what the checkpoint says about adapters; None where it has none.
        base: what has the frozen weights now, where the checkpoint leaves them out; None: what it names.
        merge: add the adapters to the weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from .lora import LoRA, remove, without_teacher
    from .lora_base import PREFIX, add_adapters, load_base

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
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=dtype)
    if lora is not None:
        LoRA(**lora["options"]).adapt(model)
    model.load_state_dict(without_teacher(policy))
    if lora is not None and merge:
        remove(model, merge=True)
    return model


def _write_adapter(model: Any, partial: Path, folder: Path, base: str | None) -> str:
    """Write the adapters, and the base model where nothing else has it; returns what loads the base.

    Args:
        model: the policy with its adapters.
        partial: where to write.
        folder: where ``partial`` will be.
        base: directory or hub id of the base model.
    """
    from .lora import remove, save_adapter

    for name in ("config.json", "generation_config.json"):  # beside adapters they would promise a whole model
        (partial / name).unlink(missing_ok=True)
    save_adapter(model, partial, base or str((folder / "base").resolve()))
    if base is None:
        remove(model, merge=False)
        model.save_pretrained(partial / "base")
        base = str(folder / "base")
    return base


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def export_command(argv: list[str]) -> int:
    """``gear-lightning export CHECKPOINT DIR [--adapter] [--base DIR|ID]``."""
    parser = argparse.ArgumentParser("gear-lightning export", description="Write a Hugging Face model directory.")
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file")
    parser.add_argument("folder", type=Path, help="directory to write")
    parser.add_argument("--adapter", action="store_true", help="write the adapters alone, for peft, instead of merging")
    parser.add_argument(
        "--base", metavar="DIR|ID", help="the model that adapters were trained on, where it is not where it was"
    )
    options = parser.parse_args(argv)
    how = export_checkpoint(options.checkpoint, options.folder, adapter=options.adapter, base=options.base)
    print(f"{options.folder}: load it with {how}")
    return 0
