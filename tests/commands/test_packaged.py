"""Recipes by name, a project from `gear-lightning init`, and the wheel outside a checkout."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from checkout import ROOT
from command_line import SHORT, error_of

from gear_lightning.commands.study import study_command
from gear_lightning.errors import UserError
from gear_lightning.recipes.packaged import about, configs, found, packaged, with_packaged


def test_names_of_packaged_recipes_become_their_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quickstart, grpo = str(configs() / "quickstart.yaml"), str(configs() / "credit" / "grpo.yaml")
    given = [
        "--config",
        "quickstart",
        "--config=credit/grpo",
        "--config",
        "configs/credit/grpo.yaml",
        "--x",
        "quickstart",
    ]
    assert with_packaged(given) == [
        "--config", quickstart, f"--config={grpo}", "--config", grpo, "--x", "quickstart",
    ]  # fmt: skip


def test_a_file_of_the_users_goes_before_a_packaged_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("{}")
    assert found("quickstart") == "quickstart"


@pytest.mark.parametrize("name", ["../pyproject", "credit/../../README", "/etc/passwd", "nothing"])
def test_nothing_outside_of_the_packaged_folder_is_found(name):
    assert packaged(name) is None


def test_an_unknown_name_is_reported_with_where_to_look(command):
    assert "gear-lightning recipes" in error_of(command, "fit", "--config", "wholly_unknown")
    assert "did you mean quickstart?" in error_of(command, "fit", "--config", "quickstrat")
    with pytest.raises(UserError, match="no packaged recipe"):
        found("quickstrat")


def test_a_missing_file_is_left_to_the_parser():
    assert found("mine.yaml") == "mine.yaml"
    assert found('{"a": 1}') == '{"a": 1}'
    text = "model: {}\n" + "# a long comment" * 100
    assert found(text) == text


def test_a_directory_does_not_hide_a_packaged_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert found("quickstart") == str(configs() / "quickstart.yaml")


@pytest.mark.parametrize("option", ["--config", "-c", "--cluster"])
def test_options_that_take_a_file_take_a_packaged_name(option):
    place = str(configs() / "credit" / "grpo.yaml")
    assert with_packaged([option, "credit/grpo"]) == [option, place]
    assert with_packaged([f"{option}=credit/grpo"]) == [f"{option}={place}"]


PLANS = [path for path in sorted((configs() / "study").glob("*.yaml")) if "\narms:" in path.read_text()]


@pytest.mark.parametrize("plan", PLANS, ids=[path.stem for path in PLANS])
def test_a_packaged_study_is_planned_outside_a_checkout(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert study_command(["--config", str(plan), "--plan"]) == 0
    assert "GRPO" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["engines.CachedEngine", "engines.GenerateEngine", "budgets.Budgets"])
def test_paths_in_configurations_of_earlier_runs_still_import(path):
    module, _, name = path.partition(".")
    kind = getattr(importlib.import_module(f"gear_lightning.{module}"), name)
    assert kind.__module__.startswith("gear_lightning.generation.")


def test_a_pipe_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert found(str(tmp_path / "pipe")) == str(tmp_path / "pipe")


def test_every_packaged_file_says_in_a_line_what_it_is(command):
    status, out, _ = command("recipes")
    assert status == 0
    for path in configs().rglob("*.yaml"):
        assert len(about(path)) > 15, path
        assert re.search(rf"^  {path.relative_to(configs()).with_suffix('')} +{re.escape(about(path))}$", out, re.M), (
            path
        )


def test_the_path_of_packaged_files_is_printed_alone(command):
    assert command("recipes", "--path")[1] == f"{configs()}\n"


def run(arguments: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        arguments, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_a_new_project_trains_and_its_tests_pass(tmp_path, starts_quickly, command):
    project = tmp_path / "mine"
    status, out, err = command("init", project)
    assert status == 0, err
    assert {path.name for path in project.iterdir()} == {"agent.py", "recipe.yaml", "test_agent.py", "README.md"}
    assert str(project) in out
    python = Path(sysconfig.get_path("scripts")) / "python"
    run(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        project,
        PYTHONPATH=os.pathsep.join([str(ROOT), str(project)]),
    )
    text = run(
        [sys.executable, "-m", "gear_lightning", "fit", "--config", "recipe.yaml"], project, PYTHONPATH=str(ROOT)
    )
    before, after = re.search(r"tasks +([\d.]+) -> ([\d.]+)", text).groups()
    assert float(after) > float(before) + 0.2
    assert (project / "runs" / "first" / "credit_map.html").exists()


def test_a_folder_that_holds_something_is_refused(tmp_path, command):
    (tmp_path / "notes.txt").write_text("mine")
    assert "not an empty directory" in error_of(command, "init", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_wheel_trains_outside_of_a_checkout(tmp_path):
    source = tmp_path / "source"  # a build leaves files behind
    for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split():
        if name.partition("/")[0] not in ("docs", "tests"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name, follow_symlinks=False)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    run([*build, str(source)], tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    names = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*") if path.is_file()}
    for path in [*(ROOT / "callbacks").glob("*.py"), *(ROOT / "configs").rglob("*.yaml")]:
        assert f"gear_lightning/{path.relative_to(ROOT)}" in names, path
    # an environment without the checkout: the other packages, and the wheel; -S leaves out what points to the checkout
    packages = os.pathsep.join([str(tmp_path / "site"), sysconfig.get_path("purelib")])
    work = tmp_path / "work"
    work.mkdir()
    python = [sys.executable, "-S", "-m", "gear_lightning"]
    options = ["fit", "--config", "quickstart", "--config", "credit/rlsd", *SHORT, "--trainer.max_epochs", "1"]
    run([*python, *options], work, PYTHONPATH=packages)
    assert (work / "runs" / "quickstart" / "credit_map.html").exists()
    where = "import gear_lightning.callbacks.health as m; print(m.__file__)"
    assert str(tmp_path / "site") in run([sys.executable, "-S", "-c", where], work, PYTHONPATH=packages)


def test_the_version_has_one_home():
    from gear_lightning import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_every_folder_of_the_package_is_in_the_wheel():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    inner = (path.parent.relative_to(ROOT) for path in (ROOT / "gear_lightning").glob("*/**/__init__.py"))
    there = {".".join(folder.parts) for folder in inner}
    assert listed == {"gear_lightning", "gear_lightning.callbacks", "gear_lightning.configs", *there}
