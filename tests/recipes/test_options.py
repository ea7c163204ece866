"""Every configurable option is documented and read by some code."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import types
import typing
from functools import cache
from pathlib import Path

import pytest

import gear_lightning
import gear_lightning.callbacks as callbacks
from gear_lightning.learning.warm_start import WarmStart
from gear_lightning.recipes.cli import GearCLI

ROOT = Path(gear_lightning.__file__).parent


ELSEWHERE = ("__main__", "gear_vllm")  # the latter runs in vLLM's environment


def modules() -> list[types.ModuleType]:
    names = [m.name for m in pkgutil.walk_packages([str(ROOT)], "gear_lightning.") if not m.name.endswith(ELSEWHERE)]
    names += [m.name for m in pkgutil.iter_modules(callbacks.__path__, "gear_lightning.callbacks.")]
    return [importlib.import_module(n) for n in names]


def ours(kind: object) -> bool:
    return inspect.isclass(kind) and kind.__module__.startswith("gear_lightning")


def subclasses(kind: type) -> set[type]:
    return {kind} | {s for sub in kind.__subclasses__() for s in subclasses(sub)}


def mentioned(annotation: object) -> set[type]:
    """Return the classes of this package in a type annotation."""
    found = {annotation} if ours(annotation) else set()
    for part in typing.get_args(annotation):  # of a callable, use the return type; its arguments are not options
        found |= set() if isinstance(part, list) else mentioned(part)
    return found


def parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Return the options of a class: the parameters of its constructor, unless another package defines it."""
    if kind.__init__ is object.__init__ or not any("__init__" in vars(k) for k in kind.__mro__ if ours(k)):
        return {}
    found = dict(inspect.signature(kind).parameters)
    return {n: p for n, p in found.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def configurable() -> list[type]:
    """Return all classes that the command line can create: its arguments and, recursively, types of their options."""
    modules()
    roots = [WarmStart]

    class Parser:
        def add_lightning_class_args(self, kind, name):
            roots.append(kind)

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    GearCLI.add_arguments_to_parser(object.__new__(GearCLI), Parser())
    from gear_lightning.data import RolloutDataModule
    from gear_lightning.module import GearModule

    waiting, seen = [*roots, GearModule, RolloutDataModule], set()
    while waiting:
        kind = waiting.pop()
        if kind in seen or not ours(kind):
            continue
        seen.add(kind)
        for parameter in parameters(kind).values():
            waiting += [s for m in mentioned(parameter.annotation) for s in subclasses(m) if ours(s)]
    return sorted((k for k in seen if not inspect.isabstract(k)), key=lambda k: f"{k.__module__}.{k.__name__}")


KINDS = configurable()
OPTIONS = [(kind, option) for kind in KINDS for option in parameters(kind)]


def label(value: object) -> str:
    return value.__name__ if inspect.isclass(value) else str(value)


@cache
def tree(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text())


def only_checks(node: ast.AST) -> bool:
    """Return whether a statement only raises errors for values out of range."""
    if isinstance(node, ast.If | ast.For):
        return not node.orelse and all(map(only_checks, node.body))
    return isinstance(node, ast.Raise)


@cache
def reads(file: str) -> frozenset[tuple[str | None, str]]:
    """Return (class, attribute) of every attribute read in a file: the class for ``self.x``, None for ``other.x``.

    A range check in a constructor does not count as reading the option.
    """
    found = set()

    def visit(node: ast.AST, inside: str | None, making: bool = False) -> None:
        if isinstance(node, ast.FunctionDef):
            making = node.name in ("__init__", "__post_init__")
        for child in ast.iter_child_nodes(node):
            if making and only_checks(child):
                continue
            if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load):
                own = isinstance(child.value, ast.Name) and child.value.id == "self"
                found.add((inside if own else None, child.attr))
            visit(child, child.name if isinstance(child, ast.ClassDef) else inside, making)

    visit(tree(file), None)
    return frozenset(found)


def constructor(kind: type) -> ast.FunctionDef | None:
    for node in ast.walk(tree(inspect.getfile(kind))):
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
            return next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
    return None


def kept(kind: type, option: str) -> tuple[set[str], bool]:
    """Return the attributes that the constructor sets from an option, and whether it uses the option otherwise."""
    if dataclasses.is_dataclass(kind):
        return {option}, False
    owner = next(k for k in kind.__mro__ if "__init__" in vars(k))
    function = constructor(owner)
    assert function is not None
    attributes, used = set(), False
    for statement in function.body:
        if only_checks(statement) or option not in {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}:
            continue
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        if isinstance(target, ast.Attribute):
            attributes.add(target.attr)
        else:
            used = True
    return attributes, used


def is_read(kind: type, option: str) -> bool:
    """Return whether the option is read by its class, a base class, a subclass, or a module that uses the class."""
    names, used = kept(kind, option)
    if used:
        return True
    family = {k for k in kind.__mro__ if ours(k)} | subclasses(kind)
    for relative in family:
        if any((relative.__name__, n) in reads(inspect.getfile(relative)) for n in names):
            return True
    users = {inspect.getfile(m) for m in modules() if uses(m, kind)}
    return any((None, n) in reads(file) for file in users for n in names)


def uses(module: types.ModuleType, kind: type) -> bool:
    """Return whether a module defines or imports the class or one of its bases."""
    return any(vars(module).get(k.__name__) is k for k in kind.__mro__ if ours(k))


def documented(kind: type) -> set[str]:
    """Return the arguments that the docstrings of a class and its bases list under Args."""
    found = set()
    for base in (k for k in kind.__mro__ if ours(k)):
        block = re.search(r"^ *Args:\n((?: +.*\n|\n)*)", inspect.cleandoc(base.__doc__ or "") + "\n", re.MULTILINE)
        found |= set(re.findall(r"^    (\w+): ", block[1], re.MULTILINE)) if block else set()
    return found


def test_the_search_finds_the_configurable_classes():
    names = {k.__name__ for k in KINDS}
    wanted = "GearModule RolloutDataModule GenerationCallback WarmStart Budgets Sampling TeacherOptions ChatOptions"
    assert set(wanted.split()) <= names
    assert {"GEAR", "Uniform", "Placebo", "ClippedSurrogate", "GRPO", "Pretrained", "FromScratch"} <= names
    assert {"CachedEngine", "LookupChain", "LookupChainTasks", "LookupChainDemonstrations", "Health"} <= names
    assert len(OPTIONS) > 100


@pytest.mark.parametrize(("kind", "option"), OPTIONS, ids=label)
def test_every_option_is_read(kind, option):
    assert is_read(kind, option), f"{kind.__name__}.{option} is parsed but never read"


@pytest.mark.parametrize("kind", [k for k in KINDS if parameters(k)], ids=label)
def test_every_option_is_documented_and_every_documented_option_exists(kind):
    missing = set(parameters(kind)) - documented(kind)
    assert not missing, f"{kind.__name__}: options missing under Args"
    inherited = set().union(*(parameters(k) for k in kind.__mro__ if ours(k)))
    assert not documented(kind) - inherited, f"{kind.__name__}: listed under Args but not an option"


def test_an_option_that_is_never_read_would_be_found(tmp_path, monkeypatch):
    source = '''
class Idle:
    """A class with an option that is never read.

    Args:
        used: read.
        passed: used in the constructor.
        dead: stored and checked, but never read.
    """
    def __init__(self, used: int = 1, passed: int = 2, dead: int = 3):
        self.used = used
        self.dead = dead
        print(passed)
        for value in (used, passed, dead, self.dead):
            if value < 0:
                raise ValueError(value)
    def work(self): return self.used
'''
    (tmp_path / "gear_lightning_idle.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    idle = importlib.import_module("gear_lightning_idle").Idle
    assert documented(idle) == {"used", "passed", "dead"}
    assert [option for option in documented(idle) if not is_read(idle, option)] == ["dead"]
