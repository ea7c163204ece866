"""Values that the check refuses are values that the parser refuses."""

import inspect
from typing import Literal

import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from gear_lightning.recipes.options.signatures import signature
from gear_lightning.recipes.options.source import absent, find
from gear_lightning.recipes.options.tree import Node, nodes
from gear_lightning.recipes.options.values import Loader, problem


class Typed:
    def __init__(
        self,
        whole: int = 8,
        number: float = 0.5,
        switch: bool = False,
        maybe: int | None = None,
        maybe_number: float | None = 0.5,
        name: Literal["all", "answer"] = "all",
        maybe_name: Literal["a", "1", "true"] | None = None,
        seed: bool | int = 0,
        either: Literal["x"] | float = 1.0,
        none: int = None,  # type: ignore[assignment]  # noqa: RUF013
    ): ...


VALUES = (
    "4", "8.0", "1e3", "1E+5", "1_000", "x", "", "null", "~", "None", "true", "TRUE", "yes", "off", "n", "0x10", "010",
    "1:30", ".5", "-.5", ".inf", "inf", ".nan", "NaN", "+4", "-.5e3", "5.", "1e-05", "'4'", '"x"', "all", "'all'",
    "ALL", "answers", "1", "a", "[4]", "{a: 1}", "4 # c", "x: 1", "2026-01-01", "007", "1e400", "!!int 4", "@x", "&a 4",
    "4 5", "-0", "1e", " 4", "٣",
)  # fmt: skip
NAMES = [*inspect.signature(Typed).parameters]
UNSEEN = ("'4'", '"4"')  # quotes inside of the quotes of a shell: left to the parser


def read_nodes() -> dict[str, Node]:
    kind = find(f"{__name__}.Typed")
    assert kind is not None
    return nodes("t", signature(kind))[0]


def parses(arguments: list[str]) -> bool:
    parser = LightningArgumentParser(exit_on_error=False, parser_mode="omegaconf+")
    parser.add_class_arguments(Typed, "t")
    parser.add_argument("--config", action="config")
    try:
        parser.parse_args(arguments)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_values_of_the_command_line(name):
    for value in VALUES:
        refused = problem(read_nodes()[name], value, "")
        assert (refused is None) == parses([f"--t.{name}={value}"]) or (value in UNSEEN and not refused), value


@pytest.mark.parametrize("name", NAMES)
def test_values_of_a_file(name, tmp_path):
    file = tmp_path / "run.yaml"
    for value in VALUES:
        file.write_text(f"t:\n  {name}: {value}\n")
        try:
            found = yaml.compose(file.read_text(), Loader).value[0][1].value[0][1]
        except yaml.YAMLError:
            continue
        refused = problem(read_nodes()[name], found, "")
        typed = name == "maybe_name" and value in ("1", "true")  # a number where the names are digits
        assert (refused is None) == parses(["--config", str(file)]) or typed, value


def test_modules_that_cannot_be_read_may_exist(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("class Seen:\n    class Inner: ...\n")
    (package / "lazy.py").write_text("def __getattr__(name): ...\n")
    (package / "built.so").write_bytes(b"")
    (package / "plain.py").write_text("from os import *\n")
    for path in ("Seen.Inner", "lazy.Anything", "plain.Anything"):
        assert absent(f"own_package.{path}") is None, path
    for path, missing in (("nosuch.X", "nosuch"), ("Sen", "Sen"), ("lazi.X", "lazi")):
        assert absent(f"own_package.{path}") == f"own_package.{missing}"
    (package / "__init__.py").write_text("__path__ = ['elsewhere']\n")
    assert absent("own_package.nosuch.X") is None
    assert absent("nosuch_package.X") == "nosuch_package"
    assert absent("torch.nn.GELU") is None
    assert absent("torch.ops.X") is None
    assert absent("math.X") is None
    assert absent("__main__.X") is None
