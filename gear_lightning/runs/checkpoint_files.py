"""Check checkpoint options, name checkpoint files, and move obsolete checkpoints away."""

import math
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

from ..errors import UserError
from .checkpoints import manifest_path
from .monitor import Mode


def check_filename(filename: str | None, formatted: Callable[[], str]) -> None:
    """Check the template of checkpoint names.

    Args:
        filename: the template; None for the default.
        formatted: formats a name from it.

    Raises:
        UserError: it does not give valid file names, or gives all checkpoints the same name.
    """
    if filename is None:
        return
    try:
        name = formatted()
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"checkpoint.filename={filename} cannot be read as a name with braces: {error}") from None
    if "/" in name:
        raise UserError(
            f"checkpoint.filename={filename} gives names with a slash, such as {name}, but all checkpoints are in one "
            "folder; use checkpoint.auto_insert_metric_name=false if the slash is in the name of a metric"
        )
    if "{epoch" not in filename and "{step" not in filename:
        raise UserError(
            f"checkpoint.filename={filename} gives all checkpoints the same name, so each would replace the previous "
            "one; add {epoch} or {step}"
        )


def check_choice(monitor: str | None, mode: Mode | None, save_top_k: int, save_on_exception: bool) -> None:
    """Check the options that select which checkpoints to keep.

    Raises:
        UserError: options contradict one another, or one has no effect.
    """
    if save_on_exception:
        raise UserError(
            "checkpoint.save_on_exception is not supported: after an error the state may be half an update, and other "
            "processes may wait elsewhere; write checkpoints more often instead (checkpoint.every_n_epochs)"
        )
    if monitor is None and save_top_k > 1:
        raise UserError(
            f"checkpoint.save_top_k={save_top_k} keeps the best checkpoints, but checkpoint.monitor, the metric that "
            "ranks them, is not set; set it to a metric, e.g. val/success, or use save_top_k=-1 to keep all"
        )
    if monitor is None and mode == "max":  # accept min, which is in the configs of earlier versions
        raise UserError("checkpoint.mode=max does nothing without checkpoint.monitor; give a metric, e.g. val/success")
    if monitor is not None and save_top_k == 0:
        raise UserError(
            f"checkpoint.monitor={monitor} does nothing with checkpoint.save_top_k=0; give the number of best "
            "checkpoints to keep, or leave out the monitor: the newest checkpoint is always kept"
        )
    if save_top_k < -1:
        raise UserError(f"checkpoint.save_top_k={save_top_k}: must be at least -1, which keeps all")


def check_cadence(
    steps: int | None, epochs: int | None, interval: timedelta | None, save_on_train_epoch_end: bool | None
) -> None:
    """Check the options that select when to write checkpoints.

    Raises:
        UserError: options contradict one another, or one has no effect.
    """
    given = {"every_n_train_steps": steps, "every_n_epochs": epochs, "train_time_interval": interval}
    for name in ("every_n_train_steps", "every_n_epochs"):
        if (value := given[name]) is not None and value < 0:
            raise UserError(f"checkpoint.{name}={value}: must be at least 0")
    if len(several := [name for name, value in given.items() if value]) > 1:
        raise UserError(f"checkpoint.{' and checkpoint.'.join(several)} exclude one another; give one of them")
    if save_on_train_epoch_end is False and (steps or interval):
        raise UserError(
            "checkpoint.save_on_train_epoch_end=false applies to iterations and does nothing with "
            "every_n_train_steps or train_time_interval; leave it out, or use every_n_epochs"
        )


def check_places(save_on_train_epoch_end: bool | None, evaluates: bool) -> None:
    """Check that a run has evaluations if its checkpoints are written after evaluations.

    Raises:
        UserError: it has none.
    """
    if save_on_train_epoch_end is False and not evaluates:
        raise UserError(
            "checkpoint.save_on_train_epoch_end=false writes checkpoints after evaluations, and this run has none "
            "(data.val_tasks, trainer.limit_val_batches, trainer.check_val_every_n_epoch); leave it out, or evaluate"
        )


def put_aside(paths: list[Path], folder: Path) -> None:
    """Move checkpoints into a new folder ``earlier-N``, where a resume does not find them, and report it."""
    if not paths:
        return
    taken = [path.name.removeprefix("earlier-") for path in folder.glob("earlier-*")]
    aside = folder / f"earlier-{1 + max((int(name) for name in taken if name.isdecimal()), default=0)}"
    aside.mkdir()
    for path in paths:
        for file in (path, manifest_path(path)):
            file.rename(aside / file.name)
    names = ", ".join(sorted(path.name for path in paths))
    print(f"{names}: later than the checkpoint that the run resumes from; moved to {aside}", file=sys.stderr)


class FileNameValues(dict):
    """Metrics for a file name. Metrics that were not measured are NaN; Lightning would write 0."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> torch.Tensor:
        return torch.tensor(math.nan)
