"""Find classes and functions in source files without importing them: an import of torch and Lightning takes seconds."""

import ast
import pkgutil
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path


class NoSourceError(Exception):
    """The source file of a class of this package or of Lightning is not installed."""


KNOWN = ("gear_lightning", "lightning", "torch")  # packages whose modules are all source files
OPEN = re.compile(r"import \*|__getattr__|__path__|__dict__|sys\.modules|\b(?:globals|vars|setattr|exec)\(")
STEERS = re.compile(r"sys\.(?:path|modules|meta_path)\b|addsitedir")  # in a module that may let others be found

Named = ast.ClassDef | ast.FunctionDef | ast.expr


@dataclass(frozen=True, eq=False)
class Module:
    """A module as text.

    Attributes:
        name: its import path.
        package: the package that its relative imports start from.
        definitions: name -> class, function or assigned value.
        imports: name -> import path, for ``from ... import``.
        modules: name -> module, for ``import``.
        docstrings: class -> docstring, for ``CLASS.__doc__ = ...``.
    """

    name: str
    package: str
    definitions: dict[str, Named]
    imports: dict[str, str]
    modules: dict[str, str]
    docstrings: dict[str, ast.expr]


@dataclass(frozen=True)
class Found:
    """A class, a function or an assigned value, and the module that defines it."""

    module: Module
    name: str
    node: Named

    @property
    def path(self) -> str:
        """Its import path."""
        return f"{self.module.name}.{self.name}"


def spec_of(name: str) -> ModuleSpec | None:
    """Return where a module is, without importing its packages."""
    package, _, _ = name.rpartition(".")
    where = None
    if package:
        parent = spec_of(package)
        if parent is None or parent.submodule_search_locations is None:
            return None
        where = tuple(parent.submodule_search_locations)
        return _search(name, where)
    find = _search if name in KNOWN else _search.__wrapped__  # others are not cached, because sys.path can change
    return find(name, None)


@cache
def _search(name: str, where: tuple[str, ...] | None) -> ModuleSpec | None:
    specs = (finder.find_spec(name, None if where is None else list(where)) for finder in sys.meta_path)
    try:
        return next((spec for spec in specs if spec is not None), None)
    except KeyError:  # a folder without __init__.py inside of a package that is not imported
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(Path(folder, name.rpartition(".")[2])) for folder in where or ()]
        return spec


def module(name: str) -> Module | None:
    """Return a module as text; None if there is no such source file, or if it cannot be parsed."""
    spec = spec_of(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    file = Path(spec.origin)
    try:
        stamp = file.stat()
        return _parsed(name, file, spec.submodule_search_locations is not None, stamp.st_mtime_ns, stamp.st_size)
    except (OSError, SyntaxError, ValueError):
        return None


@cache
def _parsed(name: str, file: Path, is_package: bool, changed: int, size: int) -> Module:
    del changed, size  # only keys of the cache: a file can change within a process
    package = name if is_package else name.rpartition(".")[0]
    out = Module(name, package, {}, {}, {}, {})
    for node in _statements(ast.parse(file.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            out.definitions[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            out.imports.update({alias.asname or alias.name: f"{base}.{alias.name}" for alias in node.names})
        elif isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                out.modules[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            out.definitions[node.targets[0].id] = node.value
        elif isinstance(node, ast.Assign) and dotted(node.targets[0]).endswith(".__doc__"):
            out.docstrings[dotted(node.targets[0]).removesuffix(".__doc__")] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            out.definitions[node.target.id] = node.value
    return out


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module, with those under ``if`` and ``try``; of two branches the first comes last."""
    for node in body:
        if isinstance(node, ast.If):
            yield from _statements([*node.orelse, *node.body])
        elif isinstance(node, ast.Try):
            yield from _statements([*(s for handler in node.handlers for s in handler.body), *node.body])
        else:
            yield node


def absent(path: str) -> str | None:
    """Return the first part of an import path that certainly does not exist; None if all of it may exist."""
    names = path.split(".")
    for end in range(1, len(names) + 1):
        part = ".".join(names[:end])
        if part not in sys.modules and spec_of(part) is None:
            above = ".".join(names[: end - 1])
            return None if above and _may_define(above, names[end - 1], end == len(names)) else part
    return None


def _may_define(home: str, name: str, last: bool) -> bool:
    """Return whether a module may have an attribute: its text has the name, or it can make names in other ways."""
    spec = spec_of(home)
    if spec is None or (spec.origin is not None and not spec.origin.endswith(".py")):
        return True
    if (text := _text(home)) is None:
        return spec.origin is not None  # else a folder
    opens = "import *" in text and last if home.partition(".")[0] in KNOWN else OPEN.search(text)
    return bool(opens or re.search(rf"\b{name}\b", text))


def _text(name: str) -> str | None:
    """Return the source of a module; None if it is not read."""
    spec = spec_of(name)
    try:
        return None if spec is None or spec.origin is None else Path(spec.origin).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def steers_imports(name: str, seen: set[str]) -> bool:
    """Return whether the import of a module may let others be found, by its text and that of the modules it imports.

    Args:
        name: the module.
        seen: modules that were looked at; those found here are added.
    """
    if not name or name in seen or name.partition(".")[0] in (*KNOWN, *sys.stdlib_module_names):
        return False
    seen.add(name)
    spec, found = spec_of(name), module(name)
    if spec is None or "site-packages" in str(spec.origin):
        return steers_imports(name.rpartition(".")[0], seen)
    if found is None or STEERS.search(_text(name) or ""):
        return spec.origin is not None
    used = [name.rpartition(".")[0], *found.modules.values(), *found.imports.values()]
    return any(steers_imports(one, seen) for one in used)


def beside(path: str) -> list[str]:
    """Return the names of the modules, classes and functions beside one that does not exist."""
    above = path.rpartition(".")[0]
    spec, found = (spec_of(above), module(above)) if above else (None, None)
    folders = sys.path if spec is None else spec.submodule_search_locations or ()
    names = [one.name for one in pkgutil.iter_modules(folders)]
    return names if found is None else [*names, *found.definitions, *found.imports]


def find(path: str) -> Found | None:
    """Return what an import path names, through re-exports; None if no source file defines it."""
    return _find(path, 0)


def _find(path: str, depth: int) -> Found | None:
    home, _, name = path.rpartition(".")
    if not home or depth > 20:  # modules can import a name from each other
        return None
    inside = module(home)
    return None if inside is None else _in(inside, name, depth)


def _in(inside: Module, name: str, depth: int) -> Found | None:
    if name in inside.definitions:
        node = inside.definitions[name]
        if isinstance(node, ast.Name | ast.Attribute) and (other := _look_up(inside, node, depth + 1)) is not None:
            return other
        return Found(inside, name, node)
    if name in inside.imports and inside.imports[name] != f"{inside.name}.{name}":
        return _find(inside.imports[name], depth + 1)
    return None


def look_up(inside: Module, node: ast.expr) -> Found | None:
    """Return what a name or a dotted name means in a module; None for anything else, and for built-in names."""
    return _look_up(inside, node, 0)


def _look_up(inside: Module, node: ast.expr, depth: int) -> Found | None:
    if depth > 20:
        return None
    if isinstance(node, ast.Name):
        return _in(inside, node.id, depth)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        first, _, rest = base.partition(".")
        home = inside.modules.get(first) or inside.imports.get(first)
        return None if home is None else _find(".".join(filter(None, [home, rest, node.attr])), depth + 1)
    return None


def dotted(node: ast.expr) -> str:
    """Return a dotted name as text; empty for another expression."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def ancestors(kind: Found) -> tuple[list[Found], bool]:
    """Return a class and its bases in the order in which Python looks up methods, and whether all were found."""
    found, complete = [], True
    for one, known in _bases(kind):
        found = [f for f in found if f.path != one.path] + [one]  # a base class comes after all its subclasses
        complete &= known
    return found, complete


def _bases(kind: Found) -> Iterator[tuple[Found, bool]]:
    """Yield a class and its bases, depth first, each with whether all of its own bases were found."""
    mine, complete = [], True
    for base in kind.node.bases if isinstance(kind.node, ast.ClassDef) else []:
        plain = base.value if isinstance(base, ast.Subscript) else base
        other = look_up(kind.module, plain)
        if other is not None and isinstance(other.node, ast.ClassDef) and other.path != kind.path:
            mine.append(other)
        elif dotted(plain).rpartition(".")[2] not in ("object", "ABC", "Protocol", "Generic", "Exception"):
            complete = False
    yield kind, complete
    for one in mine:
        yield from _bases(one)
