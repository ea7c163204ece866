"""Metrics by name, for options that follow one: which there are, which value is better, and what was measured when."""

import math
from collections.abc import Iterable
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from ..errors import UserError

Mode = Literal["min", "max"]
MAXIMA = ("val/success", "val/reward", "train/success", "train/reward")
KNOWN = {  # what a fit logs; some of them only under some recipes
    "val": ("success", "reward", "turns", "response_tokens"),
    "train": (
        "reward", "success", "response_tokens", "turns", "zero_spread_groups", "loss", "distillation", "entropy",
        "grad_norm", "skipped_steps", "clip_fraction", "sampler_gap_p95", "sampler_gap_max", "sampler_ratio",
        "sampler_truncated_fraction",
    ),
    "teacher": ("student_gap", "overlong"),
    "credit": (
        "weight_deviation", "segment_token_fraction", "segments_per_rollout", "weight_clip_fraction", "divergence_p95",
        "noise_p99", "anchors_in_noise", "weights_in_noise",
    ),
    "rollouts": (
        "retried", "masked", "side_errors", "truncated", "invalid_tool_call", "empty_response", "prompt_too_long",
        "environment_error", "environment_timeout", "environment_flood", "invalid_reward",
    ),
    "time": ("rollout_s", "update_s"),
    "perf": (
        "rollouts", "sampled_tokens", "seconds", "rollout_tokens_per_s", "update_tokens_per_s", "padding_fraction",
    ),
    "memory": ("rollout_gib", "update_gib"),
}  # fmt: skip
NAMES = {f"{kind}/{name}" for kind, names in KNOWN.items() for name in names}


def mode_of(option: str, monitor: str, mode: Mode | None) -> Mode:
    """Whether the largest or the smallest value of a metric is the best one.

    Args:
        option: what takes the mode, for the message.
        monitor: name of the metric.
        mode: as given; None where it is not.

    Raises:
        UserError: the mode is not given and cannot be known, or is the wrong one for a metric of which it is known.
    """
    if monitor not in MAXIMA:
        if mode is None:
            raise UserError(
                f"{option} must be given: whether a large or a small {monitor} is better cannot be known; give max or "
                f"min (it is known of {', '.join(MAXIMA)})"
            )
        return mode
    if mode == "min":
        raise UserError(f"{option}=min takes the smallest {monitor} for the best; give {option}=max")
    return "max"


def own_callbacks_only(callbacks: Iterable[Any]) -> bool:
    """Whether callbacks, or what a config gives for them, are all of this package or of Lightning. Others may log
    metrics under names that are not known before."""

    def origin(callback: Any) -> str:
        named = callback if isinstance(callback, str) else class_path(callback)
        return named or f"{type(callback).__module__}."

    return all(origin(callback).startswith(("gear_lightning.", "lightning.")) for callback in callbacks)


def class_path(given: Any) -> str | None:
    """The class that a config names; None where it is no part of a config."""
    found = given.get("class_path") if hasattr(given, "get") else None
    return found if isinstance(found, str) else None


def check_monitor(option: str, monitor: str, evaluates: bool, own_callbacks: bool) -> None:
    """Look at whether a run will measure a metric, as far as that can be known before.

    Args:
        option: what follows the metric, for the message.
        monitor: its name.
        evaluates: whether the run has evaluations, or had some before it resumes.
        own_callbacks: see `own_callbacks_only`.

    Raises:
        UserError: it will not.
    """
    if monitor not in NAMES and own_callbacks:
        raise UserError(f"{option}={monitor}: there is no such metric; there are {', '.join(sorted(NAMES))}")
    if monitor.startswith("val/") and not evaluates:
        raise UserError(
            f"{option}={monitor} is never measured: this run has no evaluation (data.val_tasks, "
            "trainer.limit_val_batches, trainer.check_val_every_n_epoch); give a metric of the training, or evaluate"
        )


def check_early_stopping(monitor: str, mode: Mode, at_every_end: bool | None, every: int | None) -> None:
    """Look at whether ``EarlyStopping`` stops where it is meant to.

    Args:
        monitor: its metric.
        mode: whether it takes the largest or the smallest value for the best.
        at_every_end: its ``check_on_train_epoch_end``.
        every: ``trainer.check_val_every_n_epoch``.

    Raises:
        UserError: the mode is wrong for the metric, or values of earlier evaluations would count again.
    """
    mode_of("mode of EarlyStopping", monitor, mode)
    if monitor.startswith("val/") and at_every_end and every != 1:
        raise UserError(
            f"EarlyStopping with check_on_train_epoch_end=true would count each evaluation {every} times "
            f"(trainer.check_val_every_n_epoch); leave it out to look at {monitor} after each evaluation"
        )


def measured(trainer: Any) -> dict[str, Any]:
    """Metrics of the current iteration: of its training, and of its evaluation if it had one. Lightning's
    ``callback_metrics`` also holds values of earlier iterations. All ranks must call it, at the end of an iteration."""
    training = trainer._logger_connector.metrics["callback"]
    return {**getattr(trainer.lightning_module, "evaluated", {}), **training}


class Monitor:
    """A metric that an option follows.

    Args:
        option: that names it.
        name: of the metric.
    """

    def __init__(self, option: str, name: str):
        self.option = option
        self.name = name
        self._seen = self._told = False

    def value(self, trainer: Any, values: dict[str, Any]) -> float | None:
        """Its value in an iteration, of rank 0 on all ranks; None where it has not been measured, or is not finite. All
        ranks must call it.

        Args:
            trainer: for its communication.
            values: what was `measured` in the iteration.
        """
        found = values.get(self.name)
        value = trainer.strategy.broadcast(None if found is None else float(found))
        self._seen |= value is not None
        if value is not None and not math.isfinite(value):
            if not self._told:
                rank_zero_warn(
                    f"{self.option}: {self.name} is {value} in iteration {trainer.current_epoch}, which counts as not "
                    "measured."
                )
            self._told = True
            return None
        return value

    def missing(self, trainer: Any) -> str | None:
        """Why the metric will not come, at the end of an iteration that did not measure it; None while it may. All
        ranks must call it."""
        if self._seen:  # the same on all ranks
            return None
        if self.name.startswith("val/") and not has_evaluations(trainer):
            if not self._told:
                rank_zero_warn(f"{self.option}={self.name} is not measured: this run has no evaluation.")
            self._told = True
            return None
        there = sorted(name for name in trainer.callback_metrics if name not in ("step", "epoch"))
        kind = self.name.partition("/")[0]
        evaluated = not has_evaluations(trainer) or any(name.startswith("val/") for name in there)
        may_come = self.name in there or (not evaluated and (kind == "val" or kind not in KNOWN))
        text = f"{self.option}={self.name}: there is no such metric in this run; it has logged {', '.join(there)}"
        return trainer.strategy.broadcast(None if may_come else text)


def has_evaluations(trainer: Any) -> bool:
    """Whether a fit evaluates the policy."""
    data = trainer.datamodule
    return bool(trainer.limit_val_batches) and getattr(data, "val_tasks", None) is not None
