"""Every config file parses and instantiates through the command line, and every option takes effect."""

import importlib
from pathlib import Path

import pytest
import yaml
from checkout import ROOT
from lightning.fabric.utilities.exceptions import MisconfigurationException
from shipped_configs import CONFIGS, PLANS, QUICKSTART, RECIPES, Built, Parsed, arguments, printed

from gear_lightning.advantage import GRPO, MTGRPO, DrGRPO, GiGPO, TurnGRPO
from gear_lightning.credit import (
    CREST,
    EGRSD,
    GEAR,
    GTPO,
    PBSD,
    RLSD,
    SCGRPO,
    Oracle,
    Placebo,
    TokenOnly,
    Turn,
    TurnSight,
    Uniform,
)
from gear_lightning.data import RolloutDataModule
from gear_lightning.distillation import OPSD, SDAR, SDPG, SDPO
from gear_lightning.errors import UserError
from gear_lightning.loss import CISPO, GSPO, ClippedSurrogate
from gear_lightning.module import GearModule
from gear_lightning.study.plan import Study

APART = ("slurm", "study")  # other kinds of files; those of Slurm are in test_slurm_command.py
PIECES = sorted(p for p in CONFIGS.glob("*/**/*.yaml") if p.parent.name not in APART)


def name(files: tuple[Path, ...]) -> str:
    return "+".join(str(f.relative_to(CONFIGS)) for f in files)


STACKS = [(recipe,) for recipe in RECIPES] + [(QUICKSTART, piece) for piece in PIECES]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Run each test in a temporary folder."""
    monkeypatch.chdir(tmp_path)


def test_recipes_and_pieces_exist():
    assert QUICKSTART in RECIPES
    assert PIECES


@pytest.mark.parametrize("files", STACKS, ids=name)
def test_every_config_parses_and_instantiates(files):
    """Recipes are built even if their model weights are not installed: weights are read when training starts."""
    try:
        cli = Built(arguments(*files))
    except UserError as error:
        Parsed(arguments(*files))  # reading a config never needs an extra
        if "pip install" in str(error):
            pytest.skip(f"an extra is not installed: {error}")
        raise
    except MisconfigurationException as error:
        Parsed(arguments(*files))
        if "No supported gpu backend" in str(error) or "accelerator" in str(error):
            pytest.skip(f"the accelerator is not available: {error}")
        raise
    assert isinstance(cli.model, GearModule)
    assert isinstance(cli.datamodule, RolloutDataModule)
    given = yaml.safe_load(files[-1].read_text())
    for path, value in leaves(given):
        found = cli.config["fit"]
        for key in path:
            found = found[key]
        assert found == value, f"{'.'.join(path)} of {files[-1].name} was lost"


def leaves(tree, path=()):
    """Yield (path, value) of the plain values of a config, except values that their type may change."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        elif isinstance(value, int | float | str) and key not in ("class_path", "environment", "accelerator"):
            yield (*path, key), value


@pytest.mark.parametrize("file", PLANS, ids=lambda p: p.name)
def test_every_run_of_a_study_instantiates(file, monkeypatch):
    """Checks each arm and each point once: `fit` must know every option of a plan."""
    monkeypatch.chdir(ROOT)
    study = Study(**yaml.safe_load(file.read_text()))
    assert study.baseline in study.arms
    first = study.runs[0]
    for run in study.runs:
        if run.seed == 0 and (run.arm == first.arm or run.point == first.point):
            try:
                cli = Built(["fit", *run.options])
            except UserError as error:
                if "pip install" not in str(error):
                    raise
                cli = Parsed(["fit", *run.options])
            assert f"--data.seed={cli.config['fit']['data']['seed']}" in run.options


RULES = {
    "RLSD": RLSD(),
    "SCGRPO": SCGRPO(),
    "TokenOnly": TokenOnly(),
    "Turn": Turn(),
    "Placebo": Placebo(),
    "Uniform": Uniform(),
    "GEAR": GEAR(),
    "EGRSD": EGRSD(),
    "CREST": CREST(),
    "GTPO": GTPO(),
    "TurnSight": TurnSight(),
    "PBSD": PBSD(),
    "Oracle": Oracle(),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_credit_rule_that_replaces_another_has_its_own_defaults(rule):
    """It must not inherit from the previous rule: RLSD with GEAR's clip is not RLSD."""
    cli = Built([*arguments(QUICKSTART), f"--model.credit=gear_lightning.credit.{rule}"])
    assert cli.model.credit == RULES[rule]


@pytest.mark.parametrize("piece", [p for p in PIECES if p.parent.name == "credit"], ids=lambda p: p.name)
def test_a_stacked_credit_piece_gives_the_rule_that_it_names(piece):
    cli = Built(arguments(QUICKSTART, piece))
    given = yaml.safe_load(piece.read_text())["model"]["credit"]
    kind = RULES[given["class_path"].rpartition(".")[2]]
    assert cli.model.credit == type(kind)(**given.get("init_args", {}))


def test_every_credit_rule_has_a_piece_with_the_teacher_of_its_paper():
    pieces = [p for p in PIECES if p.parent.name == "credit"]
    named = {yaml.safe_load(p.read_text())["model"]["credit"]["class_path"].rpartition(".")[2] for p in pieces}
    assert named >= set(RULES)
    teachers = {}
    for name in ("sc_grpo", "turnsight", "gear"):
        options = Built(arguments(QUICKSTART, CONFIGS / "credit" / f"{name}.yaml")).model.teacher_options
        teachers[name] = (options.weights, options.shows)
    assert teachers == {"sc_grpo": ("live", "peer"), "turnsight": ("frozen", "reference"), "gear": ("ema", "reference")}


OBJECTIVES = {
    "grpo": (ClippedSurrogate(clip_high=0.2, aggregation="sequence_mean"), GRPO(), "keep"),
    "dr_grpo": (ClippedSurrogate(clip_high=0.2, aggregation="constant", constant_length=48), DrGRPO(), "keep"),
    "dapo": (ClippedSurrogate(clip_low=0.2, clip_high=0.28, aggregation="token_mean"), GRPO(), "resample"),
    "gspo": (GSPO(clip_low=3e-4, clip_high=4e-4), GRPO(), "keep"),
    "cispo": (CISPO(clip_low=None, clip_high=4.0), GRPO(), "keep"),
}


@pytest.mark.parametrize("before", [None, *OBJECTIVES])
@pytest.mark.parametrize("after", OBJECTIVES)
def test_the_last_stacked_objective_replaces_earlier_ones_completely(before, after):
    """No option of the previous objective remains, such as a length or resampling."""
    assert {p.stem for p in PIECES if p.parent.name == "objective"} == set(OBJECTIVES)
    names = [n for n in (before, after) if n]
    cli = Parsed(arguments(QUICKSTART, *(CONFIGS / "objective" / f"{n}.yaml" for n in names)))
    made = cli.parser.instantiate_classes(cli.config)["fit"]
    assert (made.model.objective, made.data.advantage, made.data.zero_spread) == OBJECTIVES[after]
    assert made.data.resample_rounds == (10 if after == "dapo" else 4)


def test_the_constant_length_of_dr_grpo_is_the_token_budget_of_the_quickstart():
    cli = Built(arguments(QUICKSTART, CONFIGS / "objective" / "dr_grpo.yaml"))
    callbacks = [c for c in cli.trainer.callbacks if hasattr(c, "budgets")]
    assert [c.budgets.tokens for c in callbacks] == [cli.model.objective.constant_length]


@pytest.mark.parametrize(
    ("piece", "advantage"), [("turn_grpo", TurnGRPO()), ("mt_grpo", MTGRPO()), ("gigpo", GiGPO()), ("gear", GRPO())]
)
def test_a_credit_piece_may_set_a_turn_level_advantage(piece, advantage):
    cli = Built(arguments(QUICKSTART, CONFIGS / "credit" / f"{piece}.yaml"))
    assert cli.datamodule.advantage == advantage


DISTILLATIONS = {
    # name: distillation, whether there is a policy loss too, the teacher's weights, the text shown to it
    "opsd": (OPSD(), False, "frozen", "reference"),
    "grpo_opsd": (OPSD(coef=0.01), True, "frozen", "reference"),
    "sdpo": (SDPO(), False, "ema", "peer_or_feedback"),
    "sdpg": (SDPG(), True, "live", "answer"),
    "sdar": (SDAR(), True, "live", "reference"),
}


@pytest.mark.parametrize("piece", DISTILLATIONS)
@pytest.mark.parametrize("before", [(), ("opsd",), ("gear",), ("sdpo",)], ids=str)
def test_a_stacked_distillation_gives_the_method_that_it_names(piece, before):
    """Also if it is stacked on another one."""
    files = [CONFIGS / "credit" / f"{name}.yaml" for name in (*before, piece)]
    model = Built(arguments(QUICKSTART, *files)).model
    kind, objective, weights, shows = DISTILLATIONS[piece]
    assert model.distillation == kind
    assert (model.objective is not None) == objective
    assert model.credit == Uniform()
    assert (model.teacher_options.weights, model.teacher_options.shows) == (weights, shows)
    assert model.needs_teacher


def test_all_distillation_pieces_are_tested():
    credits = [p for p in PIECES if p.parent.name == "credit"]
    assert {p.stem for p in credits if "distillation" in yaml.safe_load(p.read_text())["model"]} == set(DISTILLATIONS)


def test_a_credit_rule_needs_an_objective_in_addition_to_distillation():
    credit = CONFIGS / "credit"
    with pytest.raises(UserError, match=r"model\.credit=GEAR does nothing without a model\.objective"):
        Built(arguments(QUICKSTART, credit / "opsd.yaml", credit / "gear.yaml"))
    both = Built(arguments(QUICKSTART, credit / "grpo_opsd.yaml", credit / "gear.yaml")).model
    assert (both.credit, both.distillation) == (GEAR(), OPSD(coef=0.01))
    alone = [*arguments(QUICKSTART, credit / "grpo_opsd.yaml"), "--model.distillation=null"]
    assert Built(alone).model.distillation is None


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_the_quickstart_config_works_with_the_other_commands(command):
    cli = Built(arguments(QUICKSTART, command=command))
    assert cli.subcommand == command
    assert isinstance(cli.model, GearModule)


def test_a_printed_config_is_complete():
    """The config that a run saves reproduces the run."""
    first = printed(*arguments(QUICKSTART))
    Path("again.yaml").write_text(first)
    assert printed(*arguments(Path("again.yaml"))) == first
    assert {"model", "data", "generation", "trainer", "warm_start", "checkpoint"} <= set(yaml.safe_load(first))


@pytest.mark.parametrize(
    "wrong",
    [
        "--data.group_sise=4",
        "--model.credit.kapa=1",
        "--model.teacher.rates=0.1",
        "--generation.budgets.turn=3",
        "--data.group_size=many",
        "--model.teacher.weights=emma",
    ],
)
def test_a_misspelled_option_is_refused_with_its_name(wrong, capsys):
    with pytest.raises(SystemExit) as done:
        Parsed([*arguments(QUICKSTART), wrong])
    assert done.value.code == 2
    key = wrong.removeprefix("--").partition("=")[0].rpartition(".")[2]
    assert key in capsys.readouterr().err


def test_class_paths_of_configs_are_importable():
    """Including those that the parser would only check when a run starts."""

    def paths(tree):
        if isinstance(tree, dict):
            for key, value in tree.items():
                if key == "class_path":
                    yield value
                yield from paths(value)
        elif isinstance(tree, list):
            for value in tree:
                yield from paths(value)

    found = {path for file in RECIPES + PIECES for path in paths(yaml.safe_load(file.read_text()))}
    assert found
    for path in found:
        module, _, kind = path.rpartition(".")
        assert hasattr(importlib.import_module(module), kind), path
