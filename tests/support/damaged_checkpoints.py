"""Write checkpoints and damage them."""

from pathlib import Path

import torch

from gear_lightning.runs.checkpoints import (
    write_checkpoint,
)


def write(folder: Path, steps: int, name: str | None = None) -> Path:
    path = folder / f"{name or steps}.ckpt"
    values = torch.arange(300, dtype=torch.float32) + steps
    write_checkpoint({"global_step": steps, "epoch": steps, "values": values}, path)
    return path


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)
