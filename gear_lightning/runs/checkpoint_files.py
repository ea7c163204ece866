"""Options of checkpoints that must go together, names of their files, and files that must make way."""

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


def check_choice(monitor: str | None, mode: Mode | None, save_top_k: int, save_on_exception: bool) -> None:
    """Look at which checkpoints are to be kept.

    Raises:
        UserError: options that contradict one another, or of which one would do nothing.
    """
    if save_on_exception:
        raise UserError(
            "checkpoint.save_on_exception is not supported: after an error the state may be half an update, and other "
            "processes may wait elsewhere; write checkpoints often instead (checkpoint.every_n_epochs)"
        )
    if monitor is None and save_top_k > 1:
        raise UserError(
            f"checkpoint.save_top_k={save_top_k} keeps the best checkpoints, and checkpoint.monitor does not say by "
            "which metric; give one, as val/success, or save_top_k=-1 to keep all"
        )
    if monitor is None and mode == "max":  # min is in the configs of earlier versions
        raise UserError("checkpoint.mode=max does nothing without checkpoint.monitor; give a metric, as val/success")
    if monitor is not None and save_top_k == 0:
        raise UserError(
            f"checkpoint.monitor={monitor} does nothing with checkpoint.save_top_k=0; give a number of best "
            "checkpoints to keep, or leave the monitor out: the newest is kept in any case"
        )
    if save_top_k < -1:
        raise UserError(f"checkpoint.save_top_k={save_top_k} must be at least -1, which keeps all")


def check_cadence(
    steps: int | None, epochs: int | None, interval: timedelta | None, save_on_train_epoch_end: bool | None
) -> None:
    """Look at when checkpoints are to be written.

    Raises:
        UserError: options that contradict one another, or of which one would do nothing.
    """
    given = {"every_n_train_steps": steps, "every_n_epochs": epochs, "train_time_interval": interval}
    for name in ("every_n_train_steps", "every_n_epochs"):
        if (value := given[name]) is not None and value < 0:
            raise UserError(f"checkpoint.{name}={value} must be at least 0")
    if len(several := [name for name, value in given.items() if value]) > 1:
        raise UserError(f"checkpoint.{' and checkpoint.'.join(several)} exclude one another; give one of them")
    if save_on_train_epoch_end is False and (steps or interval):
        raise UserError(
            "checkpoint.save_on_train_epoch_end=false is about iterations, and does nothing with "
            "every_n_train_steps or train_time_interval; leave it out, or use every_n_epochs"
        )


def check_places(save_on_train_epoch_end: bool | None, evaluates: bool) -> None:
    """Look at whether a run has places where its checkpoints are to be written.

    Raises:
        UserError: they would be written after evaluations, and it has none.
    """
    if save_on_train_epoch_end is False and not evaluates:
        raise UserError(
            "checkpoint.save_on_train_epoch_end=false writes checkpoints after evaluations, and this run has none "
            "(data.val_tasks, trainer.limit_val_batches, trainer.check_val_every_n_epoch); leave it out, or evaluate"
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


class FileNameValues(dict):
    """Metrics for a file name; those that were not measured are NaN, where Lightning writes 0."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> torch.Tensor:
        return torch.tensor(math.nan)
