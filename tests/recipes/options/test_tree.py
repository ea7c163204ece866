"""Options that are read from source files are those of the real parser."""

import inspect

import pytest
from jsonargparse._util import import_object

from gear_lightning.commands.noise_floor import NoiseFloorCLI
from gear_lightning.commands.teacher_check import TeacherCheckCLI
from gear_lightning.recipes.cli import GearCLI
from gear_lightning.recipes.options.known import Options
from gear_lightning.recipes.options.signatures import signature
from gear_lightning.recipes.options.source import find
from gear_lightning.recipes.options.tree import Node, known_classes, package_classes, roots

NONE = ("config", "print_config", "help")
DOCUMENTED = 0.9  # share of Lightning's options whose text is read; ours must all be


class Built(Exception):
    """Ends a command line after its parser has been built."""


def parser_of(command: str):
    """Return the parser that a command builds."""
    kind = {"noise-floor": NoiseFloorCLI, "teacher-check": TeacherCheckCLI}.get(command, GearCLI)
    stage = command if command in ("fit", "validate", "test", "predict") else "fit"

    class Stop(kind):
        def parse_arguments(self, parser, args):
            raise Built(self)

    with pytest.raises(Built) as built:
        Stop([stage])
    return built.value.args[0]._subcommand_parsers[stage]


def read(command: str) -> dict[str, Node]:
    """Return the options that are read for a command: those that the parser has, without those of classes."""
    found, waiting = {}, [*roots(command).values()]
    while waiting:
        node = waiting.pop()
        nullable = node.takes.group is not None and node.default == "null"
        if node.takes.group is not None and not nullable:
            waiting += node.options(None)[0].values()
        else:
            found[node.path] = node
    return found


@pytest.mark.parametrize("command", ["fit", "validate", "predict", "teacher-check", "noise-floor"])
def test_sections_have_the_options_of_the_parser(command):
    parser = parser_of(command)
    actions = [a for a in parser._actions if not a.dest.endswith(".help")]
    groups = {a.dest.rpartition(".")[0] for a in actions}  # these take a config file for all their options
    real = {a.dest: a for a in actions if a.dest not in groups}
    mine = read(command)
    assert set(mine) - set(NONE) == set(real) - set(NONE)
    for path in set(mine) - set(NONE):
        assert (mine[path].default is None) == real[path].required, path
    texts = {path: " ".join((real[path].help or "").split()) for path in set(mine) - set(NONE)}
    ours = [path for path in texts if not path.startswith("trainer.")]
    assert [p for p in ours if texts[p] and not mine[p].text] == []
    theirs = [path for path in texts if path.startswith("trainer.") and texts[path]]
    assert sum(bool(mine[path].text) for path in theirs) >= DOCUMENTED * len(theirs)


def test_defaults_are_those_of_the_parser():
    parser = parser_of("fit")
    plain = {str: str, bool: lambda v: str(v).lower(), int: str, float: str, type(None): lambda v: "null"}
    for path, node in read("fit").items():
        if path in NONE or node.default is None:
            continue
        value = parser.get_default(path)
        if type(value) in plain and "{" not in str(value) and "\n" not in str(value):
            assert node.default.strip("'") == plain[type(value)](value), path


def ours() -> list[str]:
    return sorted(path for paths in package_classes().values() for path in paths)


def test_every_class_has_the_options_of_its_signature():
    nodes = [node for node in read("fit").values() if node.takes.bases]
    bases = {base.path for node in nodes for base in node.takes.bases}
    kinds = {kind.path for base in bases for kind in known_classes(base).values()}
    assert len(kinds) > 100
    for path in kinds:
        mine = signature(find(path))  # pyright: ignore[reportArgumentType]
        real = inspect.signature(import_object(path)).parameters.values()  # pyright: ignore[reportArgumentType]
        names = {p.name for p in real if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        assert names <= set(mine.options) or not mine.complete, path
        passes_on = any(p.kind is p.VAR_KEYWORD for p in real)
        assert set(mine.options) == names or passes_on or not mine.complete, path
        if path.startswith("gear_lightning."):
            assert mine.complete, path


@pytest.mark.parametrize("path", ["model.credit", "model.policy", "data.advantage", "generation.engine"])
def test_known_classes_are_those_that_python_knows(path):
    node = read("fit")[path]
    base = import_object(node.takes.bases[0].path)

    def below(kind):
        return {kind} | {one for sub in kind.__subclasses__() for one in below(sub)}

    names = {
        k.__name__ for k in below(base) if k.__module__.startswith("gear_lightning.") and not inspect.isabstract(k)
    }
    assert {name for name in names if not name.startswith("_")} == set(node.classes)


def test_classes_of_modules_that_nothing_imports_are_found():
    assert {"JsonlTasks", "LookupChainTasks", "GSM8KTasks"} <= set(read("fit")["data.train_tasks"].classes)
    assert {"FSDP2", "ZeRO", "DDPStrategy"} <= set(read("fit")["trainer.strategy"].classes)
    assert {"EarlyStopping", "StepRecorder"} <= set(read("fit")["trainer.callbacks"].classes)


def test_a_file_that_changes_is_read_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "own_changing.py"
    file.write_text("class Mine:\n    def __init__(self, one: int = 1): ...\n")
    assert set(signature(find("own_changing.Mine")).options) == {"one"}  # pyright: ignore[reportArgumentType]
    file.write_text("class Mine:\n    def __init__(self, one: int = 1, two: int = 2): ...\n")
    assert set(signature(find("own_changing.Mine")).options) == {"one", "two"}  # pyright: ignore[reportArgumentType]


def test_a_class_in_folders_without_init_is_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    inner = tmp_path / "own_folder" / "inner"
    inner.mkdir(parents=True)
    (inner / "mine.py").write_text("class Mine:\n    def __init__(self, one: int = 1): ...\n")
    assert set(signature(find("own_folder.inner.mine.Mine")).options) == {"one"}  # pyright: ignore[reportArgumentType]
    assert find("own_folder.inner.other.Mine") is None
    assert find("own_folder.other.mine.Mine") is None


def test_options_that_cannot_be_known_are_accepted(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_open.py").write_text(
        "from gear_lightning.credit import Uniform\n"
        "class Open(Uniform):\n    def __init__(self, **options): self.options = options\n"
        "def make(): return Uniform()\n"
    )
    known = Options("fit")
    credit = known.below(known.roots["model"])[0]["credit"]
    known.check_class(credit, "own_open.Open", "--model.credit")
    assert known.step(credit, "anything", "", "--model.credit.anything") is None


def test_without_source_files_the_parser_answers(command, monkeypatch):
    from gear_lightning.recipes.options import tree

    monkeypatch.setattr(tree, "find", lambda path: None)
    status, out, err = command("fit", "--help")
    assert status == 0, err
    assert "--model.teacher.rate RATE" in out
