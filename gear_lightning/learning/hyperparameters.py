"""Hyperparameters of the optimizer and its schedule at a resume: the values of the resumed run apply.

A checkpoint holds the values that were in use, and torch restores them with the optimizer's state: a learning rate
changed at a resume would have no effect. A checkpoint therefore also records the configured values. If these equal the
current configuration, the state is loaded unchanged. If not, moments and counts are loaded, hyperparameters come from
the current configuration, and the schedule continues at the position it would have if it had counted from the run's
start.
"""

import functools
import numbers
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..distributed.sharding import shape
from ..errors import UserError

# attributes of a schedule that describe its progress and not its options
PROGRESS = {
    "last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial", "verbose", "optimizer",
    "best", "num_bad_epochs", "cooldown_counter",
}  # fmt: skip


class FreshOptimizer:
    """An optimizer and its schedule at the start of a run, built from parameters that take no memory.

    Args:
        optimizer: builds the optimizer from parameters.
        lr_scheduler: builds the schedule from an optimizer; None: no schedule.
        parameters: the trained parameters, for their shapes.

    Attributes:
        given: all configured hyperparameters, as plain data.

    Raises:
        UserError: optimizer or schedule cannot be built with these options.
    """

    def __init__(self, optimizer: Any, lr_scheduler: Any, parameters: Any):
        blanks = [nn.Parameter(torch.zeros((), dtype=p.dtype).expand(shape(p))) for p in parameters]
        try:
            self.optimizer = optimizer(blanks)
            options = [_plain(_options(group)) for group in self.optimizer.param_groups]
            self.scheduler = None if lr_scheduler is None else lr_scheduler(self.optimizer)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"model.optimizer or model.lr_scheduler cannot be created: {error}") from error
        after = [_plain(_options(group)) for group in self.optimizer.param_groups]
        sets = [
            {key: value for key, value in there.items() if key not in here or here[key] != value}
            for here, there in zip(options, after, strict=True)
        ]
        schedule = None if self.scheduler is None else {**_plain(self.scheduler), "sets": sets}
        self.given: dict[str, Any] = {"groups": options, "schedule": schedule}

    @property
    def counts_steps(self) -> bool:
        """Whether there is a schedule that is a function of the number of steps."""
        return self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau)

    def step_to(self, count: int) -> None:
        """Step the schedule ``count`` times from the start of a run.

        Raises:
            UserError: the schedule ends before.
        """
        self.optimizer._opt_called = True  # no optimizer step is taken: avoid the warning about the order
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for _ in range(count):
                    self.scheduler.step()  # pyright: ignore[reportOptionalMemberAccess,reportCallIssue]
        except (ValueError, ZeroDivisionError) as error:
            name = type(self.scheduler).__name__
            raise UserError(f"model.lr_scheduler={name} cannot continue after {count} steps: {error}") from error


def take_up_given(checkpoint: dict[str, Any], fresh: FreshOptimizer) -> list[str]:
    """Replace a checkpoint's hyperparameters by the configured ones, if they differ.

    Args:
        checkpoint: its ``optimizer_states`` and ``lr_schedulers`` are changed, in the form that every strategy loads.
        fresh: of this run.

    Returns:
        The changes, one text for each hyperparameter; empty if the checkpoint is unchanged.

    Raises:
        UserError: the optimizer has other parameter groups, or the schedule ends before the checkpoint's steps.
    """
    (saved,), states = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    members = [len(group["params"]) for group in fresh.optimizer.param_groups]
    if (there := [len(group["params"]) for group in saved["param_groups"]]) != members:
        raise UserError(
            f"the checkpoint's optimizer has groups of {there} parameters, but model.optimizer creates groups of "
            f"{members}: its state cannot be loaded"
        )
    before = checkpoint.get("hyperparameters") or _of_earlier_version(saved, states, fresh.given)
    changes, new_rate = _differences(before, fresh.given)
    if not changes:
        return []
    if fresh.counts_steps:
        fresh.step_to(_steps(checkpoint, before))
    groups = [_options(group) for group in fresh.optimizer.param_groups]
    new = [] if fresh.scheduler is None else [fresh.scheduler.state_dict()]
    if isinstance(fresh.scheduler, ReduceLROnPlateau) and _is_plateau(before):
        if not new_rate:  # the current rate is its only record of past reductions
            for group, old in zip(groups, saved["param_groups"], strict=True):
                group["lr"] = old["lr"]
        if all(before["schedule"].get(key) == fresh.given["schedule"].get(key) for key in ("monitor", "mode")):
            new = [{**new[0], **{key: states[0][key] for key in PROGRESS & states[0].keys()}}]
    params = [group["params"] for group in saved["param_groups"]]
    groups = [{**group, "params": mine} for group, mine in zip(groups, params, strict=True)]
    checkpoint["optimizer_states"] = [{**saved, "param_groups": groups}]
    checkpoint["lr_schedulers"] = new
    return changes


def _steps(checkpoint: dict[str, Any], before: dict[str, Any]) -> int:
    """Return the number of steps that a schedule has taken, or would have taken."""
    states = checkpoint["lr_schedulers"]
    counted = states[0].get("last_epoch") if states and not _is_plateau(before) else None
    return counted if isinstance(counted, int) else checkpoint["global_step"]


def _is_plateau(given: dict[str, Any]) -> bool:
    return given["schedule"] is not None and given["schedule"]["class"] == "ReduceLROnPlateau"


def _of_earlier_version(saved: dict[str, Any], states: list[Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the configured values of a checkpoint that does not record them, without those that the schedule sets."""
    groups = [_plain(_options(group)) for group in saved["param_groups"]]
    if not states:
        return {"groups": groups, "schedule": None}
    for i, group in enumerate(groups):
        sets = now["schedule"]["sets"][i] if now["schedule"] else {}
        rate = group.get("initial_lr")
        for key in {*sets, "lr"} & group.keys():
            del group[key]
        if rate is not None and sets.get("initial_lr") in (None, now["groups"][i]["lr"]):
            group["lr"] = rate
    return {"groups": groups, "schedule": now["schedule"] or {"class": "a schedule"}}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], bool]:
    """Return the differences, as texts, and whether a learning rate differs."""
    found, new_rate = [], False
    for i, (old, new) in enumerate(zip(before["groups"], now["groups"], strict=True)):
        place = f"group {i}: " if len(now["groups"]) > 1 else ""
        for key in sorted(old.keys() & new.keys()):
            if old[key] != new[key]:
                found.append(f"{place}{key} {_text(old[key])} -> {_text(new[key])}")
                new_rate |= key == "lr"
    old, new = before["schedule"], now["schedule"]
    names = ["none" if schedule is None else schedule["class"] for schedule in (old, new)]
    if names[0] != names[1]:
        found.append(f"lr_scheduler {names[0]} -> {names[1]}")
    elif old is not None and new is not None:
        old, new = _flat(old), _flat(new)
        differ = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        # the excluded options follow from the configured rate, or from the others
        rest = [key for key in differ if key.rpartition(".")[2] not in ("base_lrs", "initial_lr", "lr")]
        for key in rest if rest or new_rate else differ:
            name = re.sub(r"^sets\.\d+\.", "", key)
            found.append(f"lr_scheduler {names[1]}: {name} {_text(old.get(key))} -> {_text(new.get(key))}")
    return found, new_rate


def _flat(value: Any, place: str = "") -> dict[str, Any]:
    """Return the options in nested data, keyed by their path."""
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        value = {str(i): part for i, part in enumerate(value)}
    if not isinstance(value, dict) or "function" in value:
        return {place: value}
    parts = [_flat(part, f"{place}.{key}" if place else key) for key, part in value.items()]
    return {key: leaf for part in parts for key, leaf in part.items()}


def _text(value: Any) -> str:
    if isinstance(value, dict) and "function" in value:
        return str(value["function"])
    return f"{value:g}" if isinstance(value, float) else str(value)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a parameter group."""
    return {key: value for key, value in group.items() if key != "params"}


def _plain(value: Any, depth: int = 0) -> Any:
    """Convert a hyperparameter, or an object that consists of hyperparameters, to plain data that can be compared."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if depth > 5:
        return type(value).__name__
    if isinstance(value, Mapping):
        return {str(key): _plain(part, depth + 1) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(part, depth + 1) for part in value]
    if isinstance(value, functools.partial):
        parts = {"arguments": value.args, "options": value.keywords}
        return {**_plain(value.func, depth + 1), **_plain(parts, depth + 1)}
    if callable(value) and hasattr(value, "__qualname__"):
        return _plain_function(value, depth)
    hidden = PROGRESS if isinstance(value, LRScheduler) else set()
    parts = {key: part for key, part in sorted(getattr(value, "__dict__", {}).items()) if key not in hidden}
    return {"class": type(value).__name__, **_plain(parts, depth + 1)}


def _plain_function(function: Callable, depth: int) -> dict[str, Any]:
    """Return a function's name and its numeric constants, including those of its closure and its defaults."""
    constants = getattr(getattr(function, "__code__", None), "co_consts", ())
    around = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    defaults = getattr(function, "__defaults__", None) or ()
    known = [c for c in (*constants, *around, *defaults) if isinstance(c, numbers.Real)]
    return {"function": f"{function.__module__}.{function.__qualname__}", "numbers": _plain(known, depth + 1)}
