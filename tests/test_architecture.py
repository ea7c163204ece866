"""docs/architecture.md: its examples run, its files exist, and its folders are those of the package."""

import re

import pytest
import torch.distributed as dist
from checkout import ROOT
from command_line import SHORT

import gear_lightning

PAGE = (ROOT / "docs" / "architecture.md").read_text()
SECTIONS = dict(re.findall(r"^## (Add .*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))


def block(section: str, language: str) -> str:
    return re.findall(rf"```{language}\n(.*?)```", SECTIONS[section], re.DOTALL)[0]


@pytest.fixture
def _alone():
    """No process group is left behind in this process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_an_example_trains(section, tmp_path, command, monkeypatch):
    name = f"my_pieces_{sorted(SECTIONS).index(section)}"  # each its own: modules stay imported
    code = block(section, "python")
    assert len(code.splitlines()) <= 30
    (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "mine.yaml").write_text(block(section, "yaml").replace("my_pieces", name))
    monkeypatch.syspath_prepend(tmp_path)
    run = ["--trainer.default_root_dir", tmp_path / "run", "--trainer.max_epochs", "1", "--data.val_tasks=null"]
    status, _, err = command(
        "fit", "--config", "configs/quickstart.yaml", "--config", tmp_path / "mine.yaml", *SHORT, *run
    )
    assert status == 0, err
    assert name in (tmp_path / "run" / "config.yaml").read_text()


def test_every_file_that_the_page_names_exists():
    for path in re.findall(r"\]\(\.\./([^)#]+)\)", PAGE):
        assert (ROOT / path).exists(), path


def test_every_folder_of_the_package_is_in_the_table():
    named = set(re.findall(r"^\| `(\w+)/` \|", PAGE, re.MULTILINE))
    package = ROOT / "gear_lightning"
    assert gear_lightning.__file__ == str(package / "__init__.py")
    assert named == {"callbacks", *(path.parent.name for path in package.glob("*/__init__.py"))}
