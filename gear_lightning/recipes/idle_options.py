"""Find options of a recipe that have no effect in combination with its other options, and report each in one line.

An option that never has an effect is rejected by its class. The options here may have no effect in one recipe and have
one in another, on which the same config file can be stacked (a file of ``configs/objective/`` sets clip bounds, one of
``configs/credit/`` a teacher). `fit` warns about them, and ``doctor`` lists them. Only values other than the default
count as given.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from gear_lightning.callbacks.checkpoint import IterationCheckpoint
from gear_lightning.callbacks.generation import GenerationCallback
from gear_lightning.callbacks.health import Health
from gear_lightning.callbacks.noise_floor import NoiseFloor
from gear_lightning.callbacks.progress import PhaseProgress
from gear_lightning.callbacks.sample_table import SampleTable

from ..advantage import GRPO
from ..data import RolloutDataModule
from ..distillation import SDPG, SDPO
from ..environments.single_turn import SingleTurn
from ..generation.budgets import Budgets
from ..generation.chat import ignored_stops
from ..generation.engine import Sampling
from ..loss import CISPO, GSPO, ClippedSurrogate
from ..module import GearModule
from ..teacher import TeacherOptions
from .refusals import configured_strategy

ONE_STEP = "with data.inner_epochs=1, where every importance ratio is 1; it needs data.inner_epochs of 2 or more"


@dataclass(frozen=True)
class Given:
    """A recipe: its options as given, and the instances created from them.

    Args:
        options: the ``fit`` section: names -> values, not instantiated.
        module: the recipe's module.
        data: its data module.
        generation: its generation callback.
    """

    options: Any
    module: GearModule
    data: RolloutDataModule
    generation: GenerationCallback

    def changed(self, section: str, *kinds: type, names: tuple[str, ...] = ()) -> list[str]:
        """Return the options of a section whose value is not the default, as ``section.name=value``.

        Args:
            section: dotted name, e.g. ``model.teacher``.
            kinds: classes whose signatures have the defaults.
            names: names of the options to check. Empty: all options of the signatures.
        """
        values: Any = self.options
        for part in section.split("."):
            values = None if values is None else values[part]
        return [] if values is None else _changed(section, values.get, kinds, names)


def _changed(section: str, value: Callable[[str], Any], kinds: tuple[type, ...], names: tuple[str, ...]) -> list[str]:
    defaults = {n: p.default for kind in kinds for n, p in inspect.signature(kind).parameters.items()}
    given = {name: value(name) for name in names or defaults}
    return [f"{section}.{name}={given[name]}" for name in given if name in defaults and given[name] != defaults[name]]


def _trainer(given: Given, **defaults: Any) -> list[str]:
    """Return the trainer's options whose value is neither None nor the given default, as ``trainer.name=value``."""
    values = {name: given.options["trainer"][name] for name in defaults}
    return [f"trainer.{name}={values[name]}" for name in values if values[name] not in (None, defaults[name])]


def _line(names: list[str], why: str) -> Iterator[str]:
    if names:
        yield f"{', '.join(names)} {'does' if len(names) == 1 else 'do'} nothing {why}"


def _importance_ratios(given: Given) -> Iterator[str]:
    """Report options of an objective or a distillation about importance ratios if all ratios are 1."""
    objective, distillation = given.module.objective, given.module.distillation
    if given.data.inner_epochs > 1:
        return
    for kind in (GSPO, CISPO):
        if isinstance(objective, kind):
            yield (
                f"model.objective={type(objective).__name__} is ClippedSurrogate with aggregation="
                f"{objective.aggregation}, and its bounds do nothing, {ONE_STEP}"
            )
    if isinstance(objective, ClippedSurrogate):
        names = ("clip_low", "clip_high", "dual_clip")
        value = lambda name: getattr(objective, name)  # noqa: E731
        yield from _line(_changed("model.objective", value, (ClippedSurrogate,), names), ONE_STEP)
    if isinstance(distillation, SDPO) and distillation.is_clip != SDPO.is_clip:
        yield from _line([f"model.distillation.is_clip={distillation.is_clip}"], ONE_STEP)


def _teacher(given: Given) -> Iterator[str]:
    """Report options of a teacher that is not used, and of text that it is never shown."""
    module, options = given.module, given.module.teacher_options
    shown = ("shows", "template", "feedback_template", "max_prompt")  # also used for demonstrations
    if not module.needs_teacher:
        names = ("weights", "rate", "every", "park", "overlong") + (() if given.options["warm_start"] else shown)
        yield from _line(
            given.changed("model.teacher", TeacherOptions, names=names),
            f"with model.credit={type(module.credit).__name__}, which uses no teacher; use another model.credit, "
            "or a model.distillation",
        )
    elif options.shows == "feedback":
        names = given.changed("model.teacher", TeacherOptions, names=("template",))
        yield from _line(names, "with model.teacher.shows=feedback, which uses model.teacher.feedback_template")
    if module.needs_teacher and options.park and given.options["trainer"]["accelerator"] == "cpu":
        yield from _line(
            ["model.teacher.park=True"], "with trainer.accelerator=cpu: the teacher is in CPU memory anyway"
        )


def _noise_floor(given: Given) -> Iterator[str]:
    if not given.module.credit.needs_teacher:
        why = f"with model.credit={type(given.module.credit).__name__}, which measures no divergence"
        yield from _line(given.changed("noise_floor", NoiseFloor), why)
    elif given.options["noise_floor"]["file"] is not None:
        names = given.changed("noise_floor", NoiseFloor, names=("tokens",))
        yield from _line(names, "with noise_floor.file, which holds a measured floor")


def _evaluation(given: Given) -> Iterator[str]:
    if given.data.val_tasks is not None:
        return
    names = given.changed("data", RolloutDataModule, names=("val_limit", "val_rollouts", "eval_batch_size"))
    names += ["generation.val_sampling"] if given.options["generation"]["val_sampling"] is not None else []
    trainer = given.options["trainer"]
    names += [
        f"trainer.check_val_every_n_epoch={n}" for n in (trainer["check_val_every_n_epoch"],) if n not in (None, 1)
    ]
    yield from _line(names, "without data.val_tasks: nothing is evaluated")


def _learning_from_rewards(given: Given) -> Iterator[str]:
    """Report options that change rewards and advantages if nothing learns from them."""
    distillation, advantage = given.module.distillation, given.data.advantage
    if given.module.objective is not None or (isinstance(distillation, SDPG) and distillation.positives_only):
        return
    names = [] if advantage == GRPO() else [f"data.advantage={type(advantage).__name__}"]
    names += [] if given.generation.overlong is None else ["generation.overlong"]
    yield from _line(names, "without a model.objective: nothing learns from rewards; add one, or leave it out")


def _generation(given: Given) -> Iterator[str]:
    budgets, options = given.generation.budgets, given.options["generation"]
    strategy, _ = configured_strategy(given.options["trainer"])
    if strategy in ("ddp", "zero1", "zero2"):  # these copy the weights only for another dtype
        stored = "bfloat16" if str(given.options["trainer"]["precision"]) == "bf16-true" else "float32"
        names = [f"generation.weights={given.generation.weights}"] * (given.generation.weights != "auto")
        names += [f"generation.weights_dtype={stored}"] * (given.generation.weights_dtype == stored)
        why = f"with trainer.strategy={strategy}, where every process has the full weights in {stored}"
        yield from _line(names, why)
    if given.generation.val_sampling.temperature == 0:
        names = given.changed("generation.val_sampling", Sampling, names=("top_p", "top_k"))
        yield from _line(names, "with temperature=0, which selects the most likely token")
    if budgets.turn_tokens is not None and budgets.turn_tokens >= budgets.tokens:
        why = f"with generation.budgets.tokens={budgets.tokens}, which ends a turn first"
        yield from _line([f"generation.budgets.turn_tokens={budgets.turn_tokens}"], why)
    environment = options["environment"]
    single = getattr(environment, "class_path", environment) == f"{SingleTurn.__module__}.{SingleTurn.__name__}"
    if single and budgets.turns not in (1, Budgets.turns):
        yield from _line([f"generation.budgets.turns={budgets.turns}"], "with SingleTurn, which ends after one turn")


def _switched_off(given: Given) -> Iterator[str]:
    """Report options of features that the recipe turns off."""
    trainer = given.options["trainer"]
    if trainer["enable_checkpointing"] is False:
        names = (
            "dirpath", "monitor", "save_top_k", "every_n_epochs", "every_n_train_steps", "train_time_interval",
            "save_on_exception", "save_weights_only", "background", "min_interval",
        )  # fmt: skip
        names = given.changed("checkpoint", ModelCheckpoint, IterationCheckpoint, names=names)
        yield from _line(names, "with trainer.enable_checkpointing=false")
    if trainer["enable_progress_bar"] is False:
        yield from _line(given.changed("progress", PhaseProgress), "with trainer.enable_progress_bar=false")
    if given.options["samples"]["every_n_iterations"] == 0:
        names = given.changed("samples", SampleTable, names=("rows", "print_table"))
        yield from _line(names, "with samples.every_n_iterations=0")
    if given.options["checkpoint"]["monitor"] is None:
        yield from _line(
            given.changed("checkpoint", IterationCheckpoint, names=("mode",)), "without checkpoint.monitor"
        )
    if not trainer["gradient_clip_val"]:
        yield from _line(_trainer(given, gradient_clip_algorithm=None), "without trainer.gradient_clip_val")
    if not trainer["callbacks"]:  # a user's callback may use it
        why = "here: every metric is logged once per iteration"
        yield from _line(_trainer(given, log_every_n_steps=1), why)
    if given.module.distillation is not None and "feedback" not in given.module.teacher_options.shows:
        names = given.changed("health", Health, names=("warn_after", "stop_after"))
        yield from _line(names, "with model.distillation, which learns without rewards")


def _reasoning(given: Given) -> Iterator[str]:
    """Report options about reasoning with a chat template that knows none."""
    names = ["generation.budgets.thinking_tokens"] * (given.generation.budgets.thinking_tokens is not None)
    names += ["model.credit.where=answer"] * (given.module.credit.where == "answer")
    names += ["model.chat.earlier_reasoning=drop"] * (given.module.chat_format.options.earlier_reasoning == "drop")
    thinking = given.module.chat_format.thinking if names else None
    if thinking is not None and not thinking.native:
        why = f"with this chat template, which knows no reasoning, unless the policy itself writes {thinking.open}"
        yield from _line(names, why)


def _stop_tokens(given: Given) -> Iterator[str]:
    if line := ignored_stops(given.module.chat_format):
        yield line


CHECKS: tuple[Callable[[Given], Iterator[str]], ...] = (
    _importance_ratios,
    _teacher,
    _noise_floor,
    _evaluation,
    _learning_from_rewards,
    _generation,
    _switched_off,
    _reasoning,
    _stop_tokens,
)


def idle_options(
    options: Any, module: GearModule, data: RolloutDataModule, generation: GenerationCallback
) -> list[str]:
    """Return a line for each group of options of the recipe that have no effect.

    Args:
        options: the ``fit`` section as given; see `Given`.
        module: the recipe's module.
        data: its data module.
        generation: its generation callback.
    """
    given = Given(options, module, data, generation)
    return [line for check in CHECKS for line in check(given)]
