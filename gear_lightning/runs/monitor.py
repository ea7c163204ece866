"""Metrics that options refer to by name: which exist, which direction is better, and when they were measured."""

import math
from collections.abc import Iterable
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from ..errors import UserError

Mode = Literal["min", "max"]
MAXIMA = ("val/success", "val/reward", "train/success", "train/reward")
KNOWN = {  # metrics that a fit logs; some only with some recipes
    "val": ("success", "reward", "turns", "response_tokens"),
    "train": (
        "reward", "success", "response_tokens", "turns", "zero_spread_groups", "loss", "distillation", "entropy",
        "grad_norm", "skipped_steps", "clip_fraction", "sampler_gap_p95", "sampler_gap_max", "sampler_ratio",
        "staleness", "sampler_truncated_fraction", "call_token_fraction", "reasoning_token_fraction", "expert_load",
    ),
    "teacher": ("student_gap", "overlong"),
    "credit": (
        "weight_deviation", "segment_token_fraction", "segments_per_rollout", "weight_clip_fraction", "divergence_p95",
        "noise_p99", "anchors_in_noise", "weights_in_noise",
    ),
    "rollouts": (
        "retried", "masked", "side_errors", "tool_errors", "truncated", "invalid_tool_call", "empty_response",
        "prompt_too_long", "stopped",
        "environment_error", "environment_timeout", "environment_flood", "invalid_reward", "closed_thoughts",
    ),
    "time": ("rollout_s", "update_s", "environment_s"),
    "perf": (
        "rollouts", "sampled_tokens", "seconds", "rollout_tokens_per_s", "update_tokens_per_s", "padding_fraction",
        "prefix_hit_rate",
    ),
    "memory": ("rollout_gib", "update_gib"),
}  # fmt: skip
NAMES = {f"{kind}/{name}" for kind, names in KNOWN.items() for name in names}


def mode_of(option: str, monitor: str, mode: Mode | None) -> Mode:
    """Return whether the largest or the smallest value of a metric is the best.

    Args:
        option: name of the option that sets the mode, for the message.
        monitor: name of the metric.
        mode: the given mode; None if it is not given.

    Raises:
        UserError: the mode is not given and not known for this metric, or is wrong for a metric with a known mode.
    """
    if monitor not in MAXIMA:
        if mode is None:
            raise UserError(
                f"{option} must be given: it is not known whether a large or a small {monitor} is better; give max or "
                f"min (known only for {', '.join(MAXIMA)})"
            )
        return mode
    if mode == "min":
        raise UserError(f"{option}=min treats the smallest {monitor} as the best; give {option}=max")
    return "max"


def own_callbacks_only(callbacks: Iterable[Any]) -> bool:
    """Return whether all callbacks are from this package or from Lightning.

    Other callbacks may log metrics under unknown names.

    Args:
        callbacks: callbacks, or their entries in a config.
    """

    def origin(callback: Any) -> str:
        named = callback if isinstance(callback, str) else class_path(callback)
        return named or f"{type(callback).__module__}."

    return all(origin(callback).startswith(("gear_lightning.", "lightning.")) for callback in callbacks)


def class_path(given: Any) -> str | None:
    """Return the class path in a config entry; None if it has none."""
    found = given.get("class_path") if hasattr(given, "get") else None
    return found if isinstance(found, str) else None


def check_monitor(option: str, monitor: str, evaluates: bool, own_callbacks: bool) -> None:
    """Check that a run will measure a metric, as far as this is known before the run.

    Args:
        option: name of the option that refers to the metric, for the message.
        monitor: name of the metric.
        evaluates: whether the run has evaluations, or resumes from a checkpoint and may have had some.
        own_callbacks: see `own_callbacks_only`.

    Raises:
        UserError: it will not measure the metric.
    """
    if monitor not in NAMES and own_callbacks:
        raise UserError(f"{option}={monitor}: there is no such metric; there are {', '.join(sorted(NAMES))}")
    if monitor.startswith("val/") and not evaluates:
        raise UserError(
            f"{option}={monitor} is never measured: this run has no evaluation (data.val_tasks, "
            "trainer.limit_val_batches, trainer.check_val_every_n_epoch); give a metric of the training, or evaluate"
        )


def check_early_stopping(monitor: str, mode: Mode, at_every_end: bool | None, every: int | None) -> None:
    """Check the options of ``EarlyStopping``.

    Args:
        monitor: its metric.
        mode: whether it treats the largest or the smallest value as the best.
        at_every_end: its ``check_on_train_epoch_end``.
        every: ``trainer.check_val_every_n_epoch``.

    Raises:
        UserError: the mode is wrong for the metric, or each evaluation would be counted several times.
    """
    mode_of("mode of EarlyStopping", monitor, mode)
    if monitor.startswith("val/") and at_every_end and every != 1:
        raise UserError(
            f"EarlyStopping with check_on_train_epoch_end=true would count each evaluation {every} times "
            f"(trainer.check_val_every_n_epoch); leave it out to check {monitor} after each evaluation"
        )


def measured(trainer: Any) -> dict[str, Any]:
    """Return the metrics of the current iteration: of its training, and of its evaluation if it had one.

    Lightning's ``callback_metrics`` also holds values of earlier iterations. All ranks must call this at the end of an
    iteration.
    """
    training = trainer._logger_connector.metrics["callback"]
    return {**getattr(trainer.lightning_module, "evaluated", {}), **training}


class Monitor:
    """A metric that an option refers to.

    Args:
        option: name of the option.
        name: name of the metric.
    """

    def __init__(self, option: str, name: str):
        self.option = option
        self.name = name
        self._seen = self._warned = False

    def value(self, trainer: Any, values: dict[str, Any]) -> float | None:
        """Return rank 0's value of the metric in an iteration; None if it was not measured or is not finite.

        All ranks must call it.

        Args:
            trainer: used to communicate.
            values: the metrics of the iteration, see `measured`.
        """
        found = values.get(self.name)
        value = trainer.strategy.broadcast(None if found is None else float(found))
        self._seen |= value is not None
        if value is not None and not math.isfinite(value):
            if not self._warned:
                rank_zero_warn(
                    f"{self.option}: {self.name} is {value} in iteration {trainer.current_epoch}, which counts as not "
                    "measured."
                )
            self._warned = True
            return None
        return value

    def missing(self, trainer: Any) -> str | None:
        """Return why the metric will never be measured; None if it may still be measured.

        Call it on all ranks at the end of an iteration that did not measure the metric.
        """
        if self._seen:  # the same on all ranks
            return None
        if self.name.startswith("val/") and not has_evaluations(trainer):
            if not self._warned:
                rank_zero_warn(f"{self.option}={self.name} is not measured: this run has no evaluation.")
            self._warned = True
            return None
        there = sorted(name for name in trainer.callback_metrics if name not in ("step", "epoch"))
        kind = self.name.partition("/")[0]
        evaluated = not has_evaluations(trainer) or any(name.startswith("val/") for name in there)
        may_come = self.name in there or (not evaluated and (kind == "val" or kind not in KNOWN))
        text = f"{self.option}={self.name}: there is no such metric in this run; it has logged {', '.join(there)}"
        return trainer.strategy.broadcast(None if may_come else text)


def has_evaluations(trainer: Any) -> bool:
    """Return whether a fit evaluates the policy."""
    data = trainer.datamodule
    return bool(trainer.limit_val_batches) and getattr(data, "val_tasks", None) is not None
