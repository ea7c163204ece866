"""The pages of the documentation: their commands parse, their examples train, their links lead somewhere."""

import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from checkout import ROOT
from command_line import SHORT
from detached_engine import Detached

from gear_lightning.__main__ import COMMANDS, LIGHTNING, main

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
SMALL = ["--trainer.max_epochs", "1", "--data.tasks_per_iteration", "2", "--data.group_size", "2"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def write_files(page: Path, folder: Path) -> list[str]:
    """Write the blocks of a page that begin with ``# NAME`` into a folder, and return the names."""
    names = []
    for language in ("python", "yaml"):
        for text in blocks(page, language):
            if found := re.match(r"# (\w+\.(?:py|yaml))\n", text):
                (folder / found[1]).write_text(text)
                names.append(found[1])
    return names


def commands(page: Path) -> list[list[str]]:
    """Commands of ``gear-lightning`` in a page, as arguments."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [line[1:] for line in lines if line[:1] == ["gear-lightning"]]


def called(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str]:
    """Exit status and stderr of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["gear-lightning", *arguments])
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1, capsys.readouterr().err
    return 0, capsys.readouterr().err


ALL = [(page, arguments) for page in PAGES for arguments in commands(page)]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the checkout's configs, whose modules can be imported."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_there_are_pages_and_commands():
    assert len(PAGES) > 25
    assert len(ALL) > 40


@pytest.mark.parametrize(("page", "arguments"), ALL, ids=[f"{page.stem}: {' '.join(a)[:60]}" for page, a in ALL])
def test_a_command_of_a_page_is_one(page, arguments, desk, capsys, monkeypatch):
    assert arguments[0] in (*LIGHTNING, *COMMANDS)
    for path in re.findall(r"configs/[\w/]+\.\w+", " ".join(arguments)):
        assert (ROOT / path).exists(), path
    names = write_files(page, desk)
    given = [arguments[i + 1] for i, a in enumerate(arguments) if a == "--config"]
    if arguments[0] in LIGHTNING and all(name in names or name.startswith("configs/") for name in given):
        status, err = called([*arguments, "--print_config"], capsys, monkeypatch)
        assert status == 0, err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        path = link.partition("#")[0]
        if path and "://" not in link:
            assert (page.parent / path).exists(), link


def test_the_first_recipe_of_a_user_trains(desk, capsys, monkeypatch):
    """The policy of the page needs weights; the rest is as written."""
    page = DOCS / "tutorials" / "own_task.md"
    write_files(page, desk)
    (desk / "my_tasks.jsonl").write_text(blocks(page, "json")[0])
    policy = (
        '--model.policy={"class_path": "gear_lightning.models.FromScratch", "init_args": {"layers": 1, '
        '"words": "gear_lightning.environments.lookup_chain.WORDS"}}'
    )
    budgets = ["--generation.budgets.tokens", "8", "--generation.budgets.context", "256"]
    run = ["--trainer.default_root_dir", "run"]
    status, err = called(["fit", "--config", "my_recipe.yaml", policy, *SMALL, *budgets, *run], capsys, monkeypatch)
    assert status == 0, err
    record = (desk / "run" / "rollouts" / "iter_000000.rank_0.jsonl").read_text()
    assert '"right": 0.0' in record
    assert '"short": 0.1' in record


@pytest.mark.parametrize("name", ["own_environment", "own_credit_rule"])
def test_a_piece_of_a_tutorial_trains(name, desk, capsys, monkeypatch):
    page = DOCS / "tutorials" / f"{name}.md"
    recipe = next(file for file in write_files(page, desk) if file.endswith(".yaml"))
    run = [*SHORT, *SMALL, "--data.val_tasks=null", "--trainer.default_root_dir", "run"]
    arguments = ["fit", "--config", "configs/quickstart.yaml", "--config", recipe, *run]
    status, err = called(arguments, capsys, monkeypatch)
    assert status == 0, err


def test_the_engine_of_the_page_on_engines_trains(desk, capsys, monkeypatch):
    _, recipe = write_files(DOCS / "how_to" / "engine.md", desk)
    run = [*SHORT, *SMALL, "--data.val_tasks=null", "--trainer.default_root_dir", "run"]
    status, err = called(["fit", "--config", "configs/quickstart.yaml", "--config", recipe, *run], capsys, monkeypatch)
    assert status == 0, err
    assert "my_engine.OneByOne" in (desk / "run" / "config.yaml").read_text()


def test_the_page_on_engines_has_every_method():
    from gear_lightning.generation import GenerationEngine

    table = set(re.findall(r"^\| `(\w+)` \|", (DOCS / "how_to" / "engine.md").read_text(), re.MULTILINE))
    assert table == {name for name, value in vars(GenerationEngine).items() if callable(value) and name[0] != "_"} - {
        "before_forward", "interrupted"
    }  # fmt: skip


def test_the_program_of_the_page_on_python_trains(desk):
    (name,) = write_files(DOCS / "how_to" / "python.md", desk)
    done = subprocess.run([sys.executable, name], cwd=desk, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((desk / "runs" / "python" / "rollouts").glob("*.jsonl"))) == 2


def test_the_table_of_choices_names_every_open_option_of_gear():
    from gear_lightning.credit import GEAR
    from gear_lightning.teacher import TeacherOptions

    table = (
        (DOCS / "explanation" / "gear.md").read_text().split("## Choices the paper leaves open")[1].split("\n## ")[0]
    )
    rows = [row.split("|")[2] for row in table.splitlines() if row.count("|") == 4]
    named = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    options = {*(f.name for f in fields(GEAR)), *(f"teacher.{f.name}" for f in fields(TeacherOptions))}
    assert named <= options
    explained = {"divergence_top_k", "divergence_limit", "teacher.max_prompt", "teacher.overlong", "teacher.park"}
    explained.add("where")  # of every rule
    assert options - named == explained, "an option that the paper leaves open is missing from the table"


def test_the_metrics_of_the_reference_are_logged(tmp_path):
    import csv

    from model_families import Family
    from tiny_runs import data, generation, module, trainer

    from gear_lightning.callbacks.evaluation_beside import EvaluationBeside
    from gear_lightning.callbacks.noise_floor import NoiseFloor
    from gear_lightning.credit import GEAR, Uniform
    from gear_lightning.distillation import SDAR
    from gear_lightning.generation import VLLMEngine
    from gear_lightning.generation.budgets import Budgets
    from gear_lightning.loss import ClippedSurrogate
    from gear_lightning.module import GearModule

    options = {"objective": ClippedSurrogate(sampler_cap=2.0), "distillation": SDAR()}
    corrected = module(GEAR(anchor_floor=0.0), **options)
    callbacks = generation(engine=Detached(), ahead=1), NoiseFloor(), EvaluationBeside()
    trainer(tmp_path, *callbacks, max_epochs=1, limit_val_batches=None).fit(corrected, datamodule=data())
    masked = tmp_path / "masked"
    thinks = generation(budgets=Budgets(turns=4, tokens=24, turn_tokens=8, thinking_tokens=4, context=96))
    trainer(masked, thinks, max_epochs=1).fit(module(), datamodule=data(truncated="mask", oversample=0.5))
    experts = tmp_path / "experts"
    trainer(experts, generation(), max_epochs=1).fit(GearModule(Family(kind="Qwen3-MoE"), Uniform()), datamodule=data())
    logged = set()
    for run in (tmp_path, masked, experts):
        with (run / "metrics.csv").open() as file:
            logged |= set(next(csv.DictReader(file)))
    named = set(re.findall(r"`([a-z]+/[\w_]+)`", (DOCS / "reference" / "metrics.md").read_text()))
    logged |= {name for name, _, _ in VLLMEngine().metrics()}
    assert named <= logged, named - logged


@pytest.mark.parametrize(
    ("language", "text", "wrong"),
    [
        ("python", "def f(:", "invalid syntax"),
        ("yaml", "a: [1", "while parsing"),
        ("json", '{"a": 1}\n{"a": }', "Expecting value"),
        ("bash", "gear-lightning nonsense", "no command 'nonsense'"),
        ("bash", "gear-lightning fit --config quickstart  # a comment", None),
        ("json", '{"a": 1}\n{"a": 2}', None),
    ],
)
def test_the_build_reports_invalid_code_blocks(language, text, wrong, monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "_ext")
    from code_blocks import problem  # pyright: ignore[reportMissingImports]

    found = problem(language, text)
    assert found is None if wrong is None else wrong in found
