"""From a Lightning checkpoint to a Hugging Face model directory."""

import argparse
import shutil
import tempfile
from pathlib import Path

from .errors import UserError


def export_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Write the policy of a checkpoint as a directory that ``AutoModelForCausalLM.from_pretrained`` loads.

    Args:
        checkpoint: a ``.ckpt`` file of this project; loaded with ``weights_only=True``.
        folder: must not exist, or be empty.

    Raises:
        UserError: no such file, not one of ours, or the folder holds something.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not checkpoint.is_file():
        raise UserError(f"{checkpoint}: no such checkpoint file")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty directory")
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        files, weights = state["policy_files"], state["state_dict"]
    except Exception as error:
        raise UserError(f"{checkpoint}: not a checkpoint of gear_lightning ({type(error).__name__}: {error})") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name + ".partial-"))
    try:
        try:
            for name, data in files.items():
                (partial / Path(name).name).write_bytes(data.numpy().tobytes())
            config = AutoConfig.from_pretrained(partial, trust_remote_code=False)
            prefix = "policy."
            policy = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
            dtype = next((value.dtype for value in policy.values() if value.is_floating_point()), torch.float32)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=dtype)
            model.load_state_dict(policy)
        except Exception as error:
            raise UserError(f"{checkpoint}: not a checkpoint of gear_lightning ({_first_line(error)})") from None
        model.save_pretrained(partial)
        if folder.exists():
            folder.rmdir()
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def export_command(argv: list[str]) -> int:
    """``gear-lightning export CHECKPOINT DIR``."""
    parser = argparse.ArgumentParser("gear-lightning export", description="Write a Hugging Face model directory.")
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file")
    parser.add_argument("folder", type=Path, help="directory to write")
    options = parser.parse_args(argv)
    export_checkpoint(options.checkpoint, options.folder)
    print(f"{options.folder}: load it with AutoModelForCausalLM.from_pretrained({str(options.folder)!r})")
    return 0
