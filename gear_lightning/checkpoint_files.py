"""Names of checkpoints, and checkpoints that must make way."""

import sys
from collections.abc import Callable
from pathlib import Path

from .checkpoints import manifest_path
from .errors import UserError


def check_filename(filename: str | None, formatted: Callable[[], str]) -> None:
    """Look at a template of names of checkpoints.

    Args:
        filename: the template; None for the default.
        formatted: makes a name of it.

    Raises:
        UserError: it gives no file names, or gives one to all checkpoints.
    """
    if filename is None:
        return
    try:
        name = formatted()
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"checkpoint.filename={filename} cannot be read as a name with braces: {error}") from None
    if "/" in name:
        raise UserError(
            f"checkpoint.filename={filename} gives names with a slash, as {name}, and checkpoints lie in one folder; "
            "use checkpoint.auto_insert_metric_name=false where the name of a metric has one"
        )
    if "{epoch" not in filename and "{step" not in filename:
        raise UserError(
            f"checkpoint.filename={filename} gives one name to all checkpoints, and each would replace the one before "
            "it; put {epoch} or {step} into it"
        )


def put_aside(paths: list[Path], folder: Path) -> None:
    """Move checkpoints into a new folder ``earlier-N``, where no resume finds them, and say so."""
    if not paths:
        return
    taken = [path.name.removeprefix("earlier-") for path in folder.glob("earlier-*")]
    aside = folder / f"earlier-{1 + max((int(name) for name in taken if name.isdecimal()), default=0)}"
    aside.mkdir()
    for path in paths:
        for file in (path, manifest_path(path)):
            file.rename(aside / file.name)
    names = ", ".join(sorted(path.name for path in paths))
    print(f"{names}: from after the checkpoint that the run resumes from, now in {aside}", file=sys.stderr)
