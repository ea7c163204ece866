"""Options that have no effect in combination with the others are reported; options with an effect are not."""

import inspect
from typing import Any

import pytest
from command_line import FIT
from tiny_runs import data, generation, module

from gear_lightning.advantage import GRPO, DrGRPO
from gear_lightning.callbacks.checkpoint import IterationCheckpoint
from gear_lightning.callbacks.generation import GenerationCallback
from gear_lightning.callbacks.health import Health
from gear_lightning.callbacks.noise_floor import NoiseFloor
from gear_lightning.callbacks.progress import PhaseProgress
from gear_lightning.callbacks.sample_table import SampleTable
from gear_lightning.credit import GEAR, Uniform
from gear_lightning.data import RolloutDataModule
from gear_lightning.distillation import OPSD, SDPG, SDPO
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.chat import ChatOptions
from gear_lightning.generation.engine import Sampling
from gear_lightning.loss import CISPO, GSPO, ClippedSurrogate
from gear_lightning.recipes.cli import GearCLI
from gear_lightning.recipes.idle_options import idle_options
from gear_lightning.recipes.recipe import idle, read_recipe
from gear_lightning.rewards import OverlongPenalty
from gear_lightning.teacher import TeacherOptions

SECTIONS = {
    "data": RolloutDataModule, "generation": GenerationCallback, "noise_floor": NoiseFloor, "health": Health,
    "samples": SampleTable, "progress": PhaseProgress, "checkpoint": IterationCheckpoint,
}  # fmt: skip
TRAINER = {"strategy": "auto", "accelerator": "cpu", "enable_checkpointing": None, "enable_progress_bar": None}
TRAINER |= {"gradient_clip_val": None, "gradient_clip_algorithm": None, "check_val_every_n_epoch": 1, "precision": None}
TRAINER |= {"val_check_interval": None, "log_every_n_steps": 1, "callbacks": None}


def defaults(kind: type) -> dict[str, Any]:
    kinds = reversed(kind.__mro__) if kind is IterationCheckpoint else (kind,)
    return {n: p.default for k in kinds for n, p in inspect.signature(k).parameters.items()}


def idle_lines(change: dict[str, Any] | None = None, *, parts: dict | None = None, **of_module: Any) -> list[str]:
    """Return the lines that are reported for a tiny recipe.

    Args:
        change: dotted option -> given value.
        parts: options of the data module and the generation callback.
        of_module: options of the module.
    """
    given: dict[str, Any] = {name: defaults(kind) for name, kind in SECTIONS.items()}
    teacher = of_module.setdefault("teacher", TeacherOptions())
    given |= {"model": {"teacher": dict(vars(teacher))}, "trainer": dict(TRAINER), "warm_start": None}
    parts = parts or {}
    of_data = {n: v for n, v in parts.items() if n in inspect.signature(RolloutDataModule).parameters}
    of_generation = {n: v for n, v in parts.items() if n not in of_data}
    given["data"] |= of_data
    given["generation"] |= {n: dict(vars(v)) if n == "val_sampling" and v else v for n, v in of_generation.items()}
    for name, value in (change or {}).items():
        section, _, option = name.rpartition(".")
        (given[section] if section else given)[option] = value
    return idle_options(given, module(**of_module), data(**of_data), generation(**of_generation))


def test_a_recipe_of_defaults_reports_nothing():
    assert idle_lines() == []


BOUNDS = [
    (
        {"objective": ClippedSurrogate(clip_low=0.1)},
        "model.objective.clip_low=0.1 does nothing with data.inner_epochs=1",
    ),
    (
        {"objective": ClippedSurrogate(clip_high=0.2, dual_clip=3.0)},
        "clip_high=0.2, model.objective.dual_clip=3.0 do not",
    ),
    ({"objective": GSPO()}, "GSPO is ClippedSurrogate with aggregation=sequence_mean, and its bounds do nothing, with"),
    ({"objective": CISPO(clip_high=0.1)}, "CISPO is ClippedSurrogate with aggregation=token_mean, and its bounds do"),
    (
        {"objective": None, "credit": Uniform(), "distillation": SDPO(is_clip=3.0)},
        "model.distillation.is_clip=3.0 does no",
    ),
]


@pytest.mark.parametrize(("options", "line"), BOUNDS)
def test_bounds_of_importance_ratios_need_more_than_one_inner_epoch(options, line):
    (found,) = idle_lines(**options)
    assert line in found
    assert found.endswith("it needs data.inner_epochs of 2 or more")
    assert idle_lines(parts={"inner_epochs": 2}, **options) == []


FROZEN = {"teacher": TeacherOptions(weights="frozen")}
BARE = {"teacher": TeacherOptions(template="{reference}", max_prompt=9)}
HINTS = {"teacher": TeacherOptions(template="{reference}", shows="feedback")}
NO_OBJECTIVE = {"objective": None, "credit": Uniform()}
OVERLONG = OverlongPenalty(expected=8, buffer=8)

IDLE = {
    "a teacher that no rule uses": (
        {"credit": Uniform(), **FROZEN}, {}, "model.teacher.weights=frozen does nothing with model.credit=Uniform",
        {"credit": GEAR(), **FROZEN}, {},
    ),
    "the text of a teacher that no rule uses": (
        {"credit": Uniform(), **BARE}, {}, "model.teacher.template={reference}, model.teacher.max_prompt=9 do nothing",
        {"credit": Uniform(), **BARE}, {"warm_start": {"steps": 3}},
    ),
    "a template that is not shown": (
        HINTS, {}, "template={reference} does nothing with model.teacher.shows=feedback",
        {"teacher": TeacherOptions(template="{reference}", shows="peer_or_feedback")}, {},
    ),
    "a parked teacher on the CPU": (
        {"teacher": TeacherOptions(park=True)}, {}, "model.teacher.park=True does nothing with trainer.accelerator=cpu",
        {"teacher": TeacherOptions(park=True)}, {"trainer.accelerator": "auto"},
    ),
    "a noise floor without a divergence": (
        {"credit": Uniform()}, {"noise_floor.tokens": 5, "noise_floor.share": 0.5},
        "noise_floor.tokens=5, noise_floor.share=0.5 do nothing with model.credit=Uniform",
        {}, {"noise_floor.tokens": 5, "noise_floor.share": 0.5},
    ),
    "tokens to measure with a measured floor": (
        {}, {"noise_floor.tokens": 5, "noise_floor.file": "f"}, "noise_floor.tokens=5 does nothing with noise_floor",
        {}, {"noise_floor.file": "f"},
    ),
    "checkpoints that are turned off": (
        {}, {"checkpoint.every_n_epochs": 4, "trainer.enable_checkpointing": False},
        "checkpoint.every_n_epochs=4 does nothing with trainer.enable_checkpointing=false",
        {}, {"checkpoint.every_n_epochs": 4},
    ),
    "a progress bar that is turned off": (
        {}, {"progress.every_seconds": 1.0, "trainer.enable_progress_bar": False}, "progress.every_seconds=1.0 does",
        {}, {"progress.every_seconds": 1.0},
    ),
    "samples that are turned off": (
        {}, {"samples.every_n_iterations": 0, "samples.rows": 9}, "samples.rows=9 does nothing with samples.every_n_it",
        {}, {"samples.rows": 9},
    ),
    "a clipping algorithm without clipping": (
        {}, {"trainer.gradient_clip_algorithm": "value"}, "gradient_clip_algorithm=value does nothing without tr",
        {}, {"trainer.gradient_clip_algorithm": "value", "trainer.gradient_clip_val": 1.0},
    ),
    "a checkpoint mode without a monitor": (
        {}, {"checkpoint.mode": "max"}, "checkpoint.mode=max does nothing without checkpoint.monitor",
        {}, {"checkpoint.mode": "max", "checkpoint.monitor": "val/reward"},
    ),
    "a logging interval for metrics that are logged once per iteration": (
        {}, {"trainer.log_every_n_steps": 5}, "trainer.log_every_n_steps=5 does nothing here: every metric is",
        {}, {"trainer.log_every_n_steps": 5, "trainer.callbacks": ["mine"]},
    ),
    "health of rewards if nothing learns from rewards": (
        {**NO_OBJECTIVE, "distillation": OPSD()}, {"health.warn_after": 2}, "health.warn_after=2 does nothing with mod",
        {**NO_OBJECTIVE, "distillation": OPSD(), "teacher": TeacherOptions(shows="feedback")}, {"health.warn_after": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IDLE)
def test_options_without_effect_are_reported_and_options_with_effect_are_not(case):
    parts, change, line, other_parts, other_change = IDLE[case]
    (found,) = idle_lines(change, **parts)
    assert line in found
    assert idle_lines(other_change, **other_parts) == []


PARTS = {
    "evaluation without tasks": (
        {"val_tasks": None, "val_limit": 3, "val_sampling": Sampling(0.0)},
        "data.val_limit=3, generation.val_sampling do nothing without data.val_tasks",
        {"val_limit": 3, "val_sampling": Sampling(0.0)},
    ),
    "sampling weights that are not sharded": (
        {"weights": "stream", "weights_dtype": "float32"},
        "generation.weights=stream, generation.weights_dtype=float32 do nothing with trainer.strategy=ddp",
        {"weights_dtype": "bfloat16"},
    ),
    "sampling options with temperature 0": (
        {"val_sampling": Sampling(0.0, top_k=3)}, "generation.val_sampling.top_k=3 does nothing with temperature=0",
        {"val_sampling": Sampling(0.5, top_k=3)},
    ),
    "a budget of reasoning with a template that knows none": (
        {"budgets": Budgets(tokens=20, turn_tokens=8, thinking_tokens=4, context=96)},
        "generation.budgets.thinking_tokens does nothing with this chat template, which knows no reasoning, unless",
        {"budgets": Budgets(tokens=20, turn_tokens=8, context=96)},
    ),
    "a turn limit above the rollout limit": (
        {"budgets": Budgets(tokens=8, turn_tokens=8, context=96)}, "turn_tokens=8 does nothing with generation.budgets",
        {"budgets": Budgets(tokens=8, turn_tokens=7, context=96)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
def test_data_and_generation_options_without_effect_are_reported(case):
    parts, line, other = PARTS[case]
    (found,) = idle_lines(parts=parts)
    assert line in found
    assert idle_lines(parts=other) == []


def test_dropping_reasoning_has_no_effect_with_a_template_that_knows_none():
    (found,) = idle_lines(chat=ChatOptions("words", earlier_reasoning="drop"))
    assert found.startswith("model.chat.earlier_reasoning=drop does nothing with this chat template")


def test_stream_has_an_effect_on_sharded_weights():
    strategy = {"class_path": "gear_lightning.strategies.FSDP2", "init_args": {}}
    assert idle_lines({"trainer.strategy": strategy}, parts={"weights": "stream"}) == []


def test_a_number_of_turns_has_no_effect_in_a_single_turn_environment():
    class Single:
        class_path = "gear_lightning.environments.single_turn.SingleTurn"

    budgets = Budgets(turns=4, tokens=24, context=96)
    (found,) = idle_lines({"generation.environment": Single()}, parts={"budgets": budgets})
    assert found == "generation.budgets.turns=4 does nothing with SingleTurn, which ends after one turn"
    assert idle_lines(parts={"budgets": budgets}) == []


def test_reward_options_have_no_effect_if_nothing_learns_from_rewards():
    shaped = {"advantage": DrGRPO(), "overlong": OVERLONG}
    (found,) = idle_lines(parts=shaped, **NO_OBJECTIVE, distillation=OPSD())
    assert found.startswith("data.advantage=DrGRPO, generation.overlong do nothing without a model.objective")
    assert idle_lines(parts=shaped, **NO_OBJECTIVE, distillation=SDPG(positives_only=True)) == []
    assert idle_lines(parts=shaped, distillation=OPSD()) == []
    assert idle_lines(parts={"advantage": GRPO()}, **NO_OBJECTIVE, distillation=OPSD()) == []


# -- where it is reported ---------------------------------------------------------------------------------------------


def test_the_quickstart_has_no_options_without_effect(repository, monkeypatch):
    monkeypatch.chdir(repository)
    assert idle(read_recipe(["--config", "configs/quickstart.yaml"])) == []
    (line,) = idle(read_recipe(["--config", "configs/quickstart.yaml", "--config", "configs/objective/grpo.yaml"]))
    assert line.startswith("model.objective.clip_high=0.2 does nothing with data.inner_epochs=1")


def test_doctor_lists_options_without_effect(repository, monkeypatch, capsys):
    from gear_lightning.commands.doctor import doctor_command

    monkeypatch.chdir(repository)
    assert doctor_command(["--config", "configs/quickstart.yaml", "--model.objective", "GSPO"]) == 0
    assert "- model.objective=GSPO is ClippedSurrogate with" in capsys.readouterr().out


def test_fit_warns_about_options_without_effect_and_trains(command, tmp_path):
    short = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=0", f"--trainer.default_root_dir={tmp_path}"]
    with pytest.warns(UserWarning, match=r"model\.objective\.dual_clip=3\.0 does nothing with data\.inner_epochs=1"):
        status, _, err = command(*FIT, *short, "--model.objective.dual_clip", "3.0")
    assert status == 0, err
    assert (tmp_path / "metrics.csv").exists()


def test_a_resume_reports_that_warm_start_has_no_effect(monkeypatch):
    said = []
    monkeypatch.setattr("gear_lightning.recipes.cli.rank_zero_info", said.append)
    cli = object.__new__(GearCLI)
    cli.subcommand, cli.config = "fit", {"fit": {"warm_start": {"steps": 3}}}
    cli.config_init = {"fit": {"ckpt_path": "last.ckpt"}}
    cli.before_fit()
    assert said == ["warm_start does nothing on a resume: the weights are those of the checkpoint."]
