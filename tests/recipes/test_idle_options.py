"""An option that does nothing beside the others is reported, and one that does something is not."""

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
from gear_lightning.generation.engine import Sampling
from gear_lightning.loss import CISPO, GSPO, ClippedSurrogate
from gear_lightning.recipes.cli import GearCLI
from gear_lightning.recipes.idle_options import idle_options
from gear_lightning.recipes.recipe import idle, read_recipe
from gear_lightning.rewards import OverlongPenalty
from gear_lightning.rollout import Budgets
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


def told(change: dict[str, Any] | None = None, *, parts: dict | None = None, **of_module: Any) -> list[str]:
    """What is reported of the tiny recipe.

    Args:
        change: dotted option -> value as it was given.
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


def test_a_recipe_of_defaults_has_nothing_to_report():
    assert told() == []


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
def test_bounds_of_importance_ratios_need_a_second_step_on_the_same_rollouts(options, line):
    (found,) = told(**options)
    assert line in found
    assert found.endswith("it needs data.inner_epochs of 2 or more")
    assert told(parts={"inner_epochs": 2}, **options) == []


FROZEN = {"teacher": TeacherOptions(weights="frozen")}
BARE = {"teacher": TeacherOptions(template="{reference}", max_prompt=9)}
HINTS = {"teacher": TeacherOptions(template="{reference}", shows="feedback")}
NO_OBJECTIVE = {"objective": None, "credit": Uniform()}
OVERLONG = OverlongPenalty(expected=8, buffer=8)

IDLE = {
    "a teacher without a rule that asks one": (
        {"credit": Uniform(), **FROZEN}, {}, "model.teacher.weights=frozen does nothing with model.credit=Uniform",
        {"credit": GEAR(), **FROZEN}, {},
    ),
    "its text": (
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
    "tokens to measure, and a measured floor": (
        {}, {"noise_floor.tokens": 5, "noise_floor.file": "f"}, "noise_floor.tokens=5 does nothing with noise_floor",
        {}, {"noise_floor.file": "f"},
    ),
    "checkpoints that are switched off": (
        {}, {"checkpoint.every_n_epochs": 4, "trainer.enable_checkpointing": False},
        "checkpoint.every_n_epochs=4 does nothing with trainer.enable_checkpointing=false",
        {}, {"checkpoint.every_n_epochs": 4},
    ),
    "a bar that is switched off": (
        {}, {"progress.every_seconds": 1.0, "trainer.enable_progress_bar": False}, "progress.every_seconds=1.0 does",
        {}, {"progress.every_seconds": 1.0},
    ),
    "samples that are switched off": (
        {}, {"samples.every_n_iterations": 0, "samples.rows": 9}, "samples.rows=9 does nothing with samples.every_n_it",
        {}, {"samples.rows": 9},
    ),
    "how to clip, and no clipping": (
        {}, {"trainer.gradient_clip_algorithm": "value"}, "gradient_clip_algorithm=value does nothing without tr",
        {}, {"trainer.gradient_clip_algorithm": "value", "trainer.gradient_clip_val": 1.0},
    ),
    "which end of a metric is good, and no metric": (
        {}, {"checkpoint.mode": "max"}, "checkpoint.mode=max does nothing without checkpoint.monitor",
        {}, {"checkpoint.mode": "max", "checkpoint.monitor": "val/reward"},
    ),
    "how often to log what is logged once an iteration": (
        {}, {"trainer.log_every_n_steps": 5}, "trainer.log_every_n_steps=5 does nothing here: every metric is",
        {}, {"trainer.log_every_n_steps": 5, "trainer.callbacks": ["mine"]},
    ),
    "health of rewards, and none learned from": (
        {**NO_OBJECTIVE, "distillation": OPSD()}, {"health.warn_after": 2}, "health.warn_after=2 does nothing with mod",
        {**NO_OBJECTIVE, "distillation": OPSD(), "teacher": TeacherOptions(shows="feedback")}, {"health.warn_after": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IDLE)
def test_what_does_nothing_is_reported_and_what_does_something_is_not(case):
    parts, change, line, other_parts, other_change = IDLE[case]
    (found,) = told(change, **parts)
    assert line in found
    assert told(other_change, **other_parts) == []


PARTS = {
    "evaluation without tasks": (
        {"val_tasks": None, "val_limit": 3, "val_sampling": Sampling(0.0)},
        "data.val_limit=3, generation.val_sampling do nothing without data.val_tasks",
        {"val_limit": 3, "val_sampling": Sampling(0.0)},
    ),
    "weights that are whole anyway": (
        {"weights": "stream", "weights_dtype": "float32"},
        "generation.weights=stream, generation.weights_dtype=float32 do nothing with trainer.strategy=ddp",
        {"weights_dtype": "bfloat16"},
    ),
    "how to draw the likeliest token": (
        {"val_sampling": Sampling(0.0, top_k=3)}, "generation.val_sampling.top_k=3 does nothing with temperature=0",
        {"val_sampling": Sampling(0.5, top_k=3)},
    ),
    "a turn that may be longer than the rollout": (
        {"budgets": Budgets(tokens=8, turn_tokens=8, context=96)}, "turn_tokens=8 does nothing with generation.budgets",
        {"budgets": Budgets(tokens=8, turn_tokens=7, context=96)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
def test_the_same_of_data_and_rollouts(case):
    parts, line, other = PARTS[case]
    (found,) = told(parts=parts)
    assert line in found
    assert told(parts=other) == []


def test_weights_that_are_spread_are_streamed():
    strategy = {"class_path": "gear_lightning.strategies.FSDP2", "init_args": {}}
    assert told({"trainer.strategy": strategy}, parts={"weights": "stream"}) == []


def test_turns_of_an_environment_of_one_turn():
    class Single:
        class_path = "gear_lightning.environments.single_turn.SingleTurn"

    budgets = Budgets(turns=4, tokens=24, context=96)
    (found,) = told({"generation.environment": Single()}, parts={"budgets": budgets})
    assert found == "generation.budgets.turns=4 does nothing with SingleTurn, which ends after one turn"
    assert told(parts={"budgets": budgets}) == []


def test_rewards_that_nothing_learns_from():
    shaped = {"advantage": DrGRPO(), "overlong": OVERLONG}
    (found,) = told(parts=shaped, **NO_OBJECTIVE, distillation=OPSD())
    assert found.startswith("data.advantage=DrGRPO, generation.overlong do nothing without a model.objective")
    assert told(parts=shaped, **NO_OBJECTIVE, distillation=SDPG(positives_only=True)) == []
    assert told(parts=shaped, distillation=OPSD()) == []
    assert told(parts={"advantage": GRPO()}, **NO_OBJECTIVE, distillation=OPSD()) == []


# -- where it is reported ---------------------------------------------------------------------------------------------


def test_a_shipped_recipe_uses_all_that_it_gives_and_takes_any_objective(repository, monkeypatch):
    monkeypatch.chdir(repository)
    assert idle(read_recipe(["--config", "configs/quickstart.yaml"])) == []
    (line,) = idle(read_recipe(["--config", "configs/quickstart.yaml", "--config", "configs/objective/grpo.yaml"]))
    assert line.startswith("model.objective.clip_high=0.2 does nothing with data.inner_epochs=1")


def test_doctor_lists_them(repository, monkeypatch, capsys):
    from gear_lightning.commands.doctor import doctor_command

    monkeypatch.chdir(repository)
    assert doctor_command(["--config", "configs/quickstart.yaml", "--model.objective", "GSPO"]) == 0
    assert "- model.objective=GSPO is ClippedSurrogate with" in capsys.readouterr().out


def test_fit_warns_of_them_and_trains(command, tmp_path):
    short = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=0", f"--trainer.default_root_dir={tmp_path}"]
    with pytest.warns(UserWarning, match=r"model\.objective\.dual_clip=3\.0 does nothing with data\.inner_epochs=1"):
        status, _, err = command(*FIT, *short, "--model.objective.dual_clip", "3.0")
    assert status == 0, err
    assert (tmp_path / "metrics.csv").exists()


def test_a_resume_says_that_its_warm_start_is_over(monkeypatch):
    said = []
    monkeypatch.setattr("gear_lightning.recipes.cli.rank_zero_info", said.append)
    cli = object.__new__(GearCLI)
    cli.subcommand, cli.config = "fit", {"fit": {"warm_start": {"steps": 3}}}
    cli.config_init = {"fit": {"ckpt_path": "last.ckpt"}}
    cli.before_fit()
    assert said == ["warm_start does nothing on a resume: the weights are those of the checkpoint."]
