"""What a recipe and its number of processes alone decide: why it cannot be run.

`fit` stops at the first of these before it starts processes or loads weights; ``doctor`` tells them all. The rules
themselves are where they belong: this room asks the parts of a recipe in turn.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from .advantage import GroupAdvantage
from .callbacks.checkpoint import IterationCheckpoint
from .callbacks.generation import GenerationCallback
from .checkpoint_files import check_places
from .data import RolloutDataModule
from .errors import UserError
from .head import head_in_float32
from .limits import check_callbacks, check_limits
from .memory import ALIASES, STRATEGIES, Strategy
from .models import PolicySource, checkpoint_activations
from .module import GearModule
from .monitor import check_early_stopping, check_monitor, class_path, own_callbacks_only
from .strategies import layers_of
from .strategy_rules import check_replicas, check_zero

WRONG_PRECISION = "trainer.precision={} does not go with trainer.strategy; use 32-true, bf16-mixed or bf16-true"


def named(trainer: Any) -> tuple[str, dict[str, Any]]:
    """Name or class of a recipe's strategy, and the options that are given to it."""
    given = trainer["strategy"]
    return (given, {}) if isinstance(given, str) else (given["class_path"], dict(given.get("init_args") or {}))


def configured_strategy(trainer: Any) -> tuple[Strategy | None, dict[str, Any]]:
    """Which of `STRATEGIES` a recipe's trainer names (None: another one), and the options that it gives to it."""
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
    """Look at the strategy's name and the precision, on which a Trainer cannot be made.

    Raises:
        UserError: no strategy has the name; it shards, and is Lightning's own; or it does not go with the precision.
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
            f"trainer.strategy={name} is Lightning's own, which knows nothing of the teacher and is not supported; "
            f"use --config configs/strategy/{strategy or 'fsdp'}.yaml"
        )
    if strategy == "fsdp" and ALIASES.get(str(trainer["precision"]), str(trainer["precision"])) == "16-mixed":
        raise UserError(WRONG_PRECISION.format(trainer["precision"]))


def skeleton_of(source: PolicySource) -> Any:
    """The policy on the meta device; None where only loading it tells its shapes."""
    if type(source).skeleton is PolicySource.skeleton:  # it would load the weights
        return None
    try:
        return source.skeleton()
    except UserError:
        raise
    except Exception:  # a model that cannot be made without values is looked at once it is loaded
        return None


def check_parts(module: GearModule, data: RolloutDataModule, generation: GenerationCallback) -> None:
    """Look at whether the parts of a recipe have anything to do together.

    Raises:
        UserError: one does nothing beside the others; says what to change.
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
            f"data.zero_spread={data.zero_spread} chooses groups by their rewards, from which nothing learns without a "
            f"model.objective; add one, or --data.zero_spread keep{rounds}"
        )
    if generation.budgets.turns == 1 and module.credit.compares_turns:
        raise UserError(
            f"model.credit={credit} weighs the turns of a rollout against each other, and "
            "generation.budgets.turns=1 leaves it one: every weight would be 1; use another rule, or more turns"
        )


def callback_classes(trainer: Any) -> list[type]:
    """Classes of the callbacks that a recipe adds, as far as they can be imported."""
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
    """Look at the metrics that a recipe follows, for its checkpoints, its schedule and early stopping.

    Raises:
        UserError: one will not be measured, or its worst values would be taken for the best.
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
    """Why the recipe will not run, one reason after another. Nothing is loaded.

    Args:
        module: the recipe's module.
        data: its batch sizes.
        generation: its budgets and engine.
        trainer: its ``trainer`` section as given, nothing of it made.
        processes: over all nodes.
        model: the policy's `skeleton`, without adapters; None where there is none, and its part is not looked at.
        fitting: whether it is to be trained.
        checkpoint: what writes its checkpoints; None where nothing does.
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
    if fitting:
        rules.append(lambda: check_parts(module, data, generation))
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
