"""Reject recipes that cannot run, based on the recipe and its number of processes.

`fit` stops at the first error, before it starts processes or loads weights; ``doctor`` reports all of them. This module
mostly calls checks that are defined with the parts of a recipe.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from gear_lightning.callbacks.checkpoint import IterationCheckpoint
from gear_lightning.callbacks.generation import GenerationCallback

from ..advantage import GroupAdvantage
from ..data import RolloutDataModule
from ..distributed.strategy_rules import check_replicas, check_zero
from ..errors import UserError
from ..learning.head import head_in_float32
from ..models import PolicySource, checkpoint_activations
from ..module import GearModule
from ..runs.checkpoint_files import check_places
from ..runs.limits import check_callbacks, check_limits
from ..runs.monitor import check_early_stopping, check_monitor, class_path, own_callbacks_only
from ..strategies import layers_of
from .memory import ALIASES, STRATEGIES, Strategy

WRONG_PRECISION = "trainer.precision={} does not go with trainer.strategy; use 32-true, bf16-mixed or bf16-true"


def named(trainer: Any) -> tuple[str, dict[str, Any]]:
    """Return the name or class of a recipe's strategy, and its options."""
    given = trainer["strategy"]
    return (given, {}) if isinstance(given, str) else (given["class_path"], dict(given.get("init_args") or {}))


def configured_strategy(trainer: Any) -> tuple[Strategy | None, dict[str, Any]]:
    """Return which of `STRATEGIES` a recipe's trainer uses (None: another one), and its options."""
    name, options = named(trainer)
    low = name.lower()
    if "deepspeed" in low or "zero" in low:
        digits = [c for c in low.rpartition(".")[2] if c in "123"]
        stage = options.get("stage") or (int(digits[-1]) if digits else 2)
        offload = "offload" in low or options.get("offload_parameters")
        found = "zero3_offload" if stage == 3 and offload else f"zero{stage}"
        return next((s for s in STRATEGIES if s == found), None), options
    if "fsdp" in low or "modelparallel" in low:
        return "fsdp", options
    return ("ddp" if low == "auto" or "ddp" in low else None), options


def check_strategy(trainer: Any) -> None:
    """Check that a Trainer can be created with the strategy and the precision.

    Raises:
        UserError: there is no strategy of that name; or it is one of Lightning's own that shard; or it does not support
            the precision.
    """
    name, _ = named(trainer)
    strategy, _ = configured_strategy(trainer)
    lightnings = "." not in name or name.startswith("lightning.")
    if "." not in name and name.lower() not in ("auto", *StrategyRegistry.available_strategies()):
        raise UserError(
            f"trainer.strategy={name}: there is no such strategy; give auto, ddp or the class of one, or a file of "
            "configs/strategy/ (ddp, fsdp, zero1, zero2, zero3, zero3_offload)"
        )
    if lightnings and (strategy not in (None, "ddp") or name.startswith("model_parallel")):
        raise UserError(
            f"trainer.strategy={name} is Lightning's own, which does not handle the teacher and is not supported; "
            f"use --config configs/strategy/{strategy or 'fsdp'}.yaml"
        )
    if strategy == "fsdp" and ALIASES.get(str(trainer["precision"]), str(trainer["precision"])) == "16-mixed":
        raise UserError(WRONG_PRECISION.format(trainer["precision"]))


def skeleton_of(source: PolicySource) -> Any:
    """Return the policy on the meta device; None if its shapes are known only after loading it."""
    if type(source).skeleton is PolicySource.skeleton:  # the default loads the weights
        return None
    try:
        return source.skeleton()
    except UserError:
        raise
    except Exception:  # a model that cannot be created on the meta device is checked after loading
        return None


def check_parts(module: GearModule, data: RolloutDataModule, generation: GenerationCallback) -> None:
    """Check that the parts of a recipe have an effect in combination.

    Raises:
        UserError: a part has no effect together with the others; says what to change.
    """
    advantage, credit = type(data.advantage), type(module.credit).__name__
    if module.objective is None and advantage.of_turns is not GroupAdvantage.of_turns:
        raise UserError(
            f"data.advantage={advantage.__name__} does nothing without a model.objective; add one, or "
            "--data.advantage GRPO"
        )
    if module.objective is None and data.zero_spread != "keep":
        rounds = " --data.resample_rounds null" if data.zero_spread == "resample" else ""
        raise UserError(
            f"data.zero_spread={data.zero_spread} selects groups by their rewards, but without a model.objective "
            f"nothing learns from rewards; add one, or --data.zero_spread keep{rounds}"
        )
    if generation.budgets.turns == 1 and module.credit.compares_turns:
        raise UserError(
            f"model.credit={credit} weights the turns of a rollout relative to each other, but with "
            "generation.budgets.turns=1 every weight would be 1; use another rule, or more turns"
        )


def callback_classes(trainer: Any) -> list[type]:
    """Return the classes of the callbacks that a recipe adds, as far as they can be imported."""
    given, found = trainer["callbacks"] or [], []
    for callback in given if isinstance(given, list) else [given]:
        module, _, name = (class_path(callback) or (callback if isinstance(callback, str) else "")).rpartition(".")
        with contextlib.suppress(ImportError, ValueError):
            kind = getattr(importlib.import_module(module), name, None)
            found += [kind] if isinstance(kind, type) else []
    return found


def check_metrics(
    module: GearModule, data: RolloutDataModule, checkpoint: IterationCheckpoint | None, trainer: Any, resumes: bool
) -> None:
    """Check the metrics that a recipe monitors for checkpoints, the learning-rate schedule and early stopping.

    Raises:
        UserError: a metric will not be measured, or its worst values would be treated as the best.
    """
    every, most = trainer["check_val_every_n_epoch"], trainer["max_epochs"]
    evaluates = data.val_tasks is not None and trainer["limit_val_batches"] != 0
    evaluates &= most in (None, -1) or every is None or every <= most
    given = trainer["callbacks"] or []
    callbacks = given if isinstance(given, list) else [given]
    own = own_callbacks_only(callbacks)
    if checkpoint is not None:
        if checkpoint.monitor is not None:
            check_monitor("checkpoint.monitor", checkpoint.monitor, evaluates or resumes, own)
        check_places(checkpoint._save_on_train_epoch_end, evaluates or resumes)
    if (followed := module.followed_metric()) is not None:
        check_monitor("model.lr_scheduler.monitor", followed, evaluates or resumes, own)
    for callback in callbacks:
        options = (
            callback.get("init_args") if class_path(callback) == "lightning.pytorch.callbacks.EarlyStopping" else None
        )
        if options is not None:
            check_monitor("monitor of EarlyStopping", options["monitor"], evaluates, own)
            check_early_stopping(options["monitor"], options["mode"], options["check_on_train_epoch_end"], every)


def refusals(
    module: GearModule,
    data: RolloutDataModule,
    generation: GenerationCallback,
    trainer: Any,
    processes: int,
    model: Any,
    fitting: bool = True,
    checkpoint: IterationCheckpoint | None = None,
    resumes: bool = False,
) -> Iterator[str]:
    """Yield the reasons why the recipe will not run. Loads no weights.

    Args:
        module: the recipe's module.
        data: its data module, with batch sizes.
        generation: its generation callback, with budgets and engine.
        trainer: its ``trainer`` section as given, not instantiated.
        processes: number of processes on all nodes.
        model: the policy's `skeleton`, without adapters; None if there is none; then checks of the policy are skipped.
        fitting: whether the recipe is for training.
        checkpoint: the checkpoint callback; None if there is none.
        resumes: whether there is a checkpoint to resume from.
    """
    rules: list[Callable[[], Any]] = [partial(check_strategy, trainer)]
    strategy, options = configured_strategy(trainer)
    if strategy == "fsdp":
        rules.append(lambda: check_replicas(options.get("replicas", 1), processes))
    elif "zero" in named(trainer)[0].lower():
        stage, offload = options.get("stage", 2), bool(options.get("offload_parameters"))
        rules.append(lambda: check_zero(stage, offload, str(trainer["gradient_clip_algorithm"])))
    precision = ALIASES.get(str(trainer["precision"]), str(trainer["precision"]))
    rules.append(lambda: head_in_float32(module.head_precision, precision))
    rules.append(lambda: generation.check_reasoning(module))
    if fitting:
        rules.append(lambda: check_parts(module, data, generation))
        rules.append(lambda: generation.check_correction(module))
        rules.append(lambda: check_limits(trainer.get, data, processes))
        rules.append(lambda: check_callbacks(callback_classes(trainer)))
        rules.append(lambda: module.check_optimizer(precision))
        rules.append(lambda: check_metrics(module, data, checkpoint, trainer, resumes))
        rules.append(lambda: data.check_processes(processes, trainer["accumulate_grad_batches"]))
    if model is not None:
        rules.append(lambda: generation.check_policy(module, model))
        rules.append(lambda: generation.engine.check(model))
        rules.append(lambda: module.as_trained(model, precision))
        if module.lora is not None:
            rules.append(partial(module.lora.layers, model))
        if strategy == "fsdp":
            rules.append(lambda: layers_of(model))
        if fitting and module.activation_checkpointing:
            rules.append(lambda: checkpoint_activations(model))
    for rule in rules:
        try:
            rule()
        except UserError as error:
            yield str(error)
