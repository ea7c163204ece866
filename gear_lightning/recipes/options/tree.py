"""The options of a recipe as a tree: sections, groups of options, and classes that an option can name."""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import UnionType
from typing import Any

from .sections import (
    CALLBACKS,
    DATA,
    DEFAULTS,
    MODEL,
    OWN,
    SEED,
    STAGES,
    TRAINER,
    TRAINER_DEFAULTS,
    WARM_START,
    WARM_START_TEXT,
    Own,
)
from .signatures import (
    MANY,
    Option,
    Signature,
    about,
    default_text,
    is_pure_dataclass,
    parts,
    signature,
    type_text,
)
from .source import Found, NoSourceError, ancestors, dotted, find, look_up, module, spec_of

PLAIN = ("str", "int", "float", "bool", "bytes", "None", "Path", "PathLike", "timedelta", "Literal", "Tensor")


@dataclass(frozen=True)
class Takes:
    """What the type of an option allows.

    Attributes:
        group: a dataclass whose options follow the option's name; None if there is none.
        bases: classes; the option names a subclass, whose options follow.
        given: number of arguments that the program passes to the named class.
        many: whether it can be a list.
        text: whether it can be text that names no class.
        any: whether it can have any keys, as a mapping has, or has a type that is not understood here.
        kinds: what single values it can have, if it can have no others than these and ``choices``: ``int``, ``float``,
            ``bool`` and ``null``.
        choices: names that it can have.
    """

    group: Found | None = None
    bases: tuple[Found, ...] = ()
    given: int = 0
    many: bool = False
    text: bool = False
    any: bool = False
    kinds: frozenset[str] = frozenset()
    choices: tuple[str, ...] = ()


def takes(home: Found, annotation: ast.expr | None) -> Takes:
    """Return what a type allows."""
    if annotation is None:
        return Takes(any=True)
    group, bases, given, many, text, anything = None, [], 0, False, False, False
    for where, part in parts(home, annotation):
        name = dotted(part.value if isinstance(part, ast.Subscript) else part).rpartition(".")[2]
        inside = part.slice if isinstance(part, ast.Subscript) else None
        if isinstance(part, ast.Constant) or name in PLAIN:
            text |= name in ("str", "Path", "PathLike", "Literal")
        elif name in MANY and inside is not None:
            of = takes(where, inside.elts[0] if isinstance(inside, ast.Tuple) else inside)
            group, many, anything = group or of.group, True, anything or of.any
            bases += of.bases
        elif name == "Callable" and isinstance(inside, ast.Tuple):
            of = takes(where, inside.elts[-1])
            given = len(inside.elts[0].elts) if isinstance(inside.elts[0], ast.List) else 0
            bases += of.bases
            anything |= of.any or not of.bases or not isinstance(inside.elts[0], ast.List)
        elif (kind := look_up(where.module, part)) is not None and isinstance(kind.node, ast.ClassDef):
            if is_pure_dataclass(kind):
                group = kind
            else:
                bases.append(kind)
        else:
            anything = True
    named = tuple({base.path: base for base in bases}.values())
    return Takes(group, named, given, many, text, anything, *_single(home, annotation))


def _single(home: Found, annotation: ast.expr) -> tuple[frozenset[str], tuple[str, ...]]:
    """Return the kinds of single values that a type allows, and the names; nothing if it allows other values too."""
    kinds, choices = set(), []
    for where, part in parts(home, annotation):
        name = "None" if isinstance(part, ast.Constant) and part.value is None else dotted(part)
        inside = part.slice if isinstance(part, ast.Subscript) and dotted(part.value).endswith("Literal") else None
        names = inside.elts if isinstance(inside, ast.Tuple) else [inside]
        if name in ("int", "float", "bool", "None") and look_up(where.module, part) is None:
            kinds.add(name.replace("None", "null"))
        elif all(isinstance(one, ast.Constant) and isinstance(one.value, str) for one in names):
            choices += [str(one.value) for one in names if isinstance(one, ast.Constant)]
        else:
            return frozenset(), ()
    return frozenset(kinds), tuple(choices)


@dataclass(frozen=True)
class Node:
    """An option of a recipe, or a section.

    Attributes:
        path: its dotted key.
        takes: what its value can be.
        kind: its type as text.
        default: its default as text; None if it is required.
        default_class: import path of the class that is its default; None if there is none.
        text: its documentation.
        section: whether it is a section.
    """

    path: str
    takes: Takes
    kind: str
    default: str | None
    default_class: str | None
    text: str
    section: bool = False

    @cached_property
    def classes(self) -> dict[str, Found]:
        """The known classes that it can name, by their short names."""
        return {name: kind for base in self.takes.bases for name, kind in known_classes(base.path).items()}

    def options(self, kind: Found | None) -> tuple[dict[str, "Node"], bool]:
        """Return the options that follow this one's name, and whether these are all.

        Args:
            kind: the class that it names; None if it names none.
        """
        if self.takes.group is not None:
            return nodes(self.path, signature(self.takes.group))
        if kind is None:
            return {}, not self.takes.any
        found = signature(kind)
        left = dict([*found.options.items()][self.takes.given :])
        return nodes(self.path, Signature(left, found.complete))


def nodes(path: str, found: Signature) -> tuple[dict[str, Node], bool]:
    """Return the options of a signature as nodes below a dotted key, and whether these are all."""
    return {name: node(f"{path}.{name}" if path else name, option) for name, option in found.options.items()}, (
        found.complete
    )


def node(path: str, option: Option) -> Node:
    """Return an option as a node."""
    kind = "" if option.annotation is None else type_text(option.home, option.annotation)
    default, default_class = None if option.required else default_text(option.home, option.default), None
    if not option.required:
        value = option.default
        called = look_up(option.home.module, value.func if isinstance(value, ast.Call) else value)
        if called is not None and isinstance(called.node, ast.ClassDef | ast.FunctionDef):
            default_class = called.path
    allowed = takes(option.home, option.annotation)
    section, _, key = path.partition(".")
    ours = TRAINER_DEFAULTS.get(key, ...) if section == "trainer" else DEFAULTS.get(path, ...)
    if ours is not ...:
        default = json.dumps(ours) if not isinstance(ours, str) else ours
        if isinstance(ours, dict):
            default_class = ours["class_path"]
            default = default_class.rpartition(".")[2] + " with " + _plain(ours["init_args"])
    elif allowed.group is not None and default_class is not None:
        default = ""
    return Node(path, allowed, kind, default, default_class, option.text)


def _plain(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in values.items())


def roots(command: str) -> dict[str, Node]:
    """Return the sections and options of a command that takes a recipe, by their names.

    Raises:
        NoSourceError: the source files are not installed.
    """
    stage = command if command in STAGES else "fit"
    found = {"config": Node("config", Takes(many=True, text=True), "file or packaged recipe", "", None, CONFIG_TEXT)}
    for name, path in {"model": MODEL, "data": DATA, "trainer": TRAINER, **CALLBACKS}.items():
        found[name] = _section(name, path, "")
        if name == "generation":
            found["warm_start"] = Node(
                "warm_start", Takes(group=_class(WARM_START)), "", "null", None, WARM_START_TEXT, True
            )
    for own in (SEED, *OWN.get(command, ())):
        found[own.name] = _own(own)
    trainer = _class(TRAINER)
    assert isinstance(trainer.node, ast.ClassDef)
    method = next(f for f in trainer.node.body if isinstance(f, ast.FunctionDef) and f.name == stage)
    arguments = signature(Found(trainer.module, stage, method))
    for name, one in nodes("", arguments)[0].items():
        if name not in (*STAGES[stage], "self"):
            found[name] = one
    found["print_config"] = Node("print_config", Takes(text=True), "", "", None, PRINT_TEXT)
    return found


CONFIG_TEXT = "A recipe: a file, or a name that `gear-lightning recipes` lists. Can be repeated; later files override."
PRINT_TEXT = "Print the complete resolved recipe and exit."


def _section(name: str, path: str, text: str) -> Node:
    kind = _class(path)
    return Node(name, Takes(group=kind), "", "", None, text or about(kind), True)


def _class(path: str) -> Found:
    if (kind := find(path)) is None:
        raise NoSourceError(f"there is no source file of {path}")
    return kind


def _own(own: Own) -> Node:
    shown = str(own.kind) if isinstance(own.kind, UnionType) else own.kind.__name__
    default = json.dumps(own.default)
    shown = shown.replace("None", "null")
    kinds = frozenset() if "str" in shown else frozenset(shown.split(" | "))
    return Node(own.name, Takes(text=True, kinds=kinds), shown, default, None, own.text)


# -- classes ----------------------------------------------------------------------------------------------------------


@cache
def _declared() -> list[tuple[str, str, frozenset[str]]]:
    """Return (module, name, names of the bases) of the public classes of this package, without parsing its files."""
    out = {}
    for name in ("gear_lightning", "gear_lightning.callbacks"):  # in a wheel the second is a folder of the first
        spec = spec_of(name)
        assert spec is not None
        for folder in spec.submodule_search_locations or ():
            for file in sorted(Path(folder).rglob("*.py")):
                parts = file.relative_to(folder).with_suffix("").parts
                home = ".".join([name, *(part for part in parts if part != "__init__")])
                for kind, bases in CLASS.findall(file.read_text(encoding="utf-8")):
                    names = re.sub(r"\[[^]]*\]", "", bases).split(",")
                    out[home, kind] = frozenset(one.strip().rpartition(".")[2] for one in names)
    return [(home, kind, bases) for (home, kind), bases in out.items()]


CLASS = re.compile(r"^class ([A-Za-z]\w*)(?:\(([^)]*)\))?:", re.MULTILINE)


def package_classes() -> dict[str, list[str]]:
    """Return the import paths of the public classes of this package by their names."""
    out: dict[str, list[str]] = {}
    for home, name, _ in _declared():
        out.setdefault(name, []).append(f"{home}.{name}")
    return out


def _below(base: str) -> Iterator[Found]:
    """Yield the classes of this package that may be subclasses: by the names of their bases."""
    names, before = {base.rpartition(".")[2]}, 0
    while len(names) > before:
        before = len(names)
        names |= {name for _, name, bases in _declared() if bases & names}
    for home, name, _ in _declared():
        if name in names and (kind := find(f"{home}.{name}")) is not None:
            yield kind


def is_abstract(kind: Found) -> bool:
    """Return whether a class has a method that it does not implement."""
    missing: set[str] = set()
    for one in reversed(ancestors(kind)[0]):
        assert isinstance(one.node, ast.ClassDef)
        for member in one.node.body:
            if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                marks = {dotted(mark).rpartition(".")[2] for mark in member.decorator_list}
                (missing.add if "abstractmethod" in marks else missing.discard)(member.name)
            elif isinstance(member, ast.Assign | ast.AnnAssign):
                targets = member.targets if isinstance(member, ast.Assign) else [member.target]
                missing -= {dotted(target) for target in targets}
    return bool(missing)


@cache
def known_classes(base: str) -> dict[str, Found]:
    """Return the classes that a name without an import path can mean where a class is required, sorted by name.

    These are the subclasses in this package, and those in the package of the base class.
    """
    found: dict[str, Found] = {}
    for kind in (*_beside(base), *_below(base)):
        if base in {one.path for one in ancestors(kind)[0]} and not is_abstract(kind):
            found[kind.name] = kind
    return dict(sorted(found.items(), key=lambda pair: pair[0].lower()))


def _beside(base: str) -> Iterator[Found]:
    home, _, _ = base.rpartition(".")
    if home.partition(".")[0] == "gear_lightning":
        return
    for name in (home, home.rpartition(".")[0]):
        inside = module(name) if name else None
        for item in (*inside.definitions, *inside.imports) if inside else ():
            kind = find(f"{name}.{item}")
            if kind is not None and isinstance(kind.node, ast.ClassDef) and not item.startswith("_"):
                yield kind


def class_beside(base: str, name: str) -> Found | None:
    """Return the class of another package that a name means where a class is required, without regard to case."""
    home, _, _ = base.rpartition(".")
    if home.startswith("gear_lightning."):
        return None
    for package in (home, home.rpartition(".")[0]):
        inside = module(package) if package else None
        for item in (*inside.definitions, *inside.imports) if inside else ():
            if item.lower() != name.lower():
                continue
            kind = find(f"{package}.{item}")
            if kind is not None and base in {one.path for one in ancestors(kind)[0]}:
                return kind
    return None


def named_class(option: Node, name: str) -> Found | None:
    """Return the class or function that a value of an option names; None if it is not found."""
    return find(name) if "." in name else option.classes.get(name)


def import_path(kind: Found) -> str:
    """Return the shortest import path of a class."""
    package = kind.module.name
    best = kind.path
    while "." in package:
        package = package.rpartition(".")[0]
        other = find(f"{package}.{kind.name}")
        if other is not None and other.path == kind.path:
            best = f"{package}.{kind.name}"
    return best
