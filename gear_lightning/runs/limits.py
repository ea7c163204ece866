"""Check options and callbacks of Lightning's Trainer that conflict with iterations. Here an epoch is an iteration:
rollouts and their update.

A run trains on complete iterations. Options that would skip some of the micro-batches of an iteration, or evaluate in
the middle of it, are rejected. A run ends between two iterations or, with ``max_steps``, between two optimizer steps.
"""

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)

from ..errors import UserError

AVERAGES = (
    "samples with other weights than it trains; the teacher is an average of the policy already (model.teacher.rate), "
    "and `gear-lightning export` takes any checkpoint"
)
REFUSED_CALLBACKS = {  # class -> what it does
    StochasticWeightAveraging: AVERAGES,
    WeightAveraging: AVERAGES,
    GradientAccumulationScheduler: "changes how many micro-batches an optimizer step has, which data.micro_batch_size "
    "decides",
    BatchSizeFinder: "tries steps on parts of an iteration; `gear-lightning doctor` reports what fits, and "
    "data.micro_batch_size sets it",
    LearningRateFinder: "tries steps on parts of an iteration; compare learning rates by `gear-lightning study`",
    ModelPruning: "changes weights without the sampler and the teacher",
}


def check_callbacks(callbacks: Iterable[type]) -> None:
    """Check classes of callbacks of the Trainer.

    Raises:
        UserError: one of them cannot work here; the message names an alternative.
    """
    for callback in callbacks:
        for refused, why in REFUSED_CALLBACKS.items():
            if issubclass(callback, refused):
                raise UserError(f"trainer.callbacks: {callback.__name__} {why}")


def check_limits(option: Callable[[str], Any], data: Any, processes: int, stage: str = "fit") -> None:
    """Check that no option of the Trainer shortens an iteration or an evaluation.

    Args:
        option: returns the value of an option by its name; None if it is not given.
        data: the `RolloutDataModule`.
        processes: number of processes that share an iteration.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        UserError: an option does; says what to use instead.
    """
    if stage == "fit":
        _check_iteration(option, data.micro_batches_of(processes) * data.inner_epochs)
    if data.val_tasks is None or stage == "predict":
        return
    every = option("check_val_every_n_epoch")
    if stage == "fit" and (every is None or every < 1):
        raise UserError(
            f"trainer.check_val_every_n_epoch={every}: must be at least 1 iteration; to turn off evaluations, use "
            "trainer.limit_val_batches=0"
        )
    name = "limit_test_batches" if stage == "test" else "limit_val_batches"
    limit = option(name)
    if limit not in (None, 0, 1.0) or (type(limit) is int and limit == 1):
        batches = data.evaluation_batches(processes)
        if _cuts(limit, batches):
            raise UserError(
                f"trainer.{name}={limit} would skip some of an evaluation's {batches} batches, but a mean over a part "
                "of the tasks is never logged; use data.val_limit, which counts tasks"
            )


def _check_iteration(option: Callable[[str], Any], batches: int) -> None:
    if option("fast_dev_run"):
        raise UserError(
            "trainer.fast_dev_run would train on a part of an iteration; for a trial use --trainer.max_epochs 1 with a "
            "small data.tasks_per_iteration and data.val_limit, in a separate trainer.default_root_dir"
        )
    if option("overfit_batches"):
        raise UserError(
            "trainer.overfit_batches would train on a part of an iteration; use data.train_tasks with only a few tasks"
        )
    if _cuts(limit := option("limit_train_batches"), batches):
        raise UserError(
            f"trainer.limit_train_batches={limit} would train on a part of an iteration's {batches} micro-batches; for "
            "smaller iterations set data.tasks_per_iteration, for a shorter run trainer.max_epochs or "
            "trainer.max_steps"
        )
    interval = option("val_check_interval")
    at_the_end = interval == batches if type(interval) is int else interval in (None, 1.0)
    if not at_the_end:
        raise UserError(
            f"trainer.val_check_interval={interval} would evaluate in the middle of an iteration; use "
            "trainer.check_val_every_n_epoch, which counts iterations"
        )


def _cuts(limit: Any, batches: int) -> bool:
    """Return whether a limit skips some of the batches. An int is a number of batches, a float is a share."""
    return limit is not None and (limit < batches if type(limit) is int else limit < 1)


def option_of(trainer: Any) -> Callable[[str], Any]:
    """Return a function that returns a Trainer's option by its name."""

    def value(name: str) -> Any:
        if name == "val_check_interval" and trainer._val_check_time_interval is not None:
            return f"{trainer._val_check_time_interval:g} s"
        return getattr(trainer, name)

    return value


def keep_iterations_whole(trainer: Any) -> None:
    """Make Lightning end and resume runs between iterations.

    With ``max_steps``, Lightning treats every resume as one in the middle of an epoch, and does not leave an epoch that
    is complete (https://github.com/Lightning-AI/pytorch-lightning/issues/19617). The timer of ``max_time`` checks the
    time after every micro-batch, and would end the run in the middle of the iteration.
    """
    trainer.fit_loop._iteration_based_training = lambda: False
    for callback in trainer.callbacks:
        if isinstance(callback, Timer):
            callback._interval = "epoch"
