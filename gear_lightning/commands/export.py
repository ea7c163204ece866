"""``gear-lightning export``: write a Hugging Face model directory from a checkpoint."""

from ..errors import UserError
from ..export.directory import ExportOptions, check_empty, export_checkpoint
from ..export.hub import check_push, push
from . import parsers


def export_command(argv: list[str]) -> int:
    """Run ``gear-lightning export CHECKPOINT DIR`` and return the exit status."""
    given = parsers.export().parse_args(argv)
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
