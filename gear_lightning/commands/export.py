"""``gear-lightning export``: write a Hugging Face model directory from a checkpoint."""

import argparse
from pathlib import Path
from typing import get_args

from ..errors import UserError
from ..export.directory import DType, ExportOptions, check_empty, export_checkpoint
from ..export.hub import check_push, push


def export_command(argv: list[str]) -> int:
    """Run ``gear-lightning export CHECKPOINT DIR`` and return the exit status."""
    parser = argparse.ArgumentParser("gear-lightning export", description="Write a Hugging Face model directory.")
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file")
    parser.add_argument("folder", type=Path, help="directory to write")
    parser.add_argument("--adapter", action="store_true", help="write only the adapters, for peft, instead of merging")
    parser.add_argument(
        "--dtype", choices=get_args(DType), default="auto", help="dtype of the weights; auto: as in the checkpoint"
    )
    parser.add_argument("--shard-size", metavar="SIZE", help="maximum size of a weights file, e.g. 5GB; default: 50GB")
    parser.add_argument("--no-card", dest="card", action="store_false", help="write no model card (README.md)")
    parser.add_argument("--license", metavar="ID", help="license on the model card, e.g. apache-2.0")
    parser.add_argument(
        "--base", metavar="DIR|ID", help="the base model of the adapters, if it has moved since training"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload the directory to this repository of the hub")
    parser.add_argument("--private", action="store_true", help="with --push: make the repository private if it is new")
    given = parser.parse_args(argv)
    if given.private and given.push is None:
        raise UserError("--private does nothing without --push OWNER/NAME")
    options = ExportOptions(given.adapter, given.dtype, given.shard_size, given.card, given.license, given.base)
    if given.push is not None:  # before an export that may take minutes
        check_empty(given.folder)
        check_push(given.push)
    how = export_checkpoint(given.checkpoint, given.folder, options)
    print(f"{given.folder}: load it with {how}")
    if given.push is not None:
        print(f"pushed to {push(given.folder, given.push, private=given.private)}")
    return 0
