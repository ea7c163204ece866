"""The options of a class or function: names, types, defaults and documentation, read from its source file."""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from .source import Found, ancestors, dotted, look_up

MANY = ("list", "List", "Sequence", "Iterable", "tuple", "Tuple", "set")
MISSING = ast.Constant("a required option")  # stands for a default that does not exist


@dataclass(frozen=True)
class Option:
    """An option of a class.

    Attributes:
        name: its name.
        home: the class or function whose file the expressions are from.
        annotation: its type; None if it has none.
        default: its default; `MISSING` if it is required.
        text: its documentation; empty if it has none.
    """

    name: str
    home: Found
    annotation: ast.expr | None
    default: ast.expr
    text: str = ""

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is MISSING

    def describe(self) -> str:
        """Return its type and its default, for people."""
        kind = "" if self.annotation is None else type_text(self.home, self.annotation)
        value = "required" if self.required else f"default {default_text(self.home, self.default)}"
        return f"({', '.join(filter(None, [kind, value]))})"


@dataclass(frozen=True)
class Signature:
    """The options of a class or function.

    Attributes:
        options: name -> option, in order.
        complete: whether these are all.
    """

    options: dict[str, Option]
    complete: bool


def is_dataclass(kind: Found) -> bool:
    """Return whether a class itself is decorated as a dataclass."""
    return _dataclass_decorator(kind) is not None


def is_pure_dataclass(kind: Found) -> bool:
    """Return whether a class and all its bases are dataclasses: its options need no ``class_path``. ``ABC`` is none."""
    family, complete = ancestors(kind)
    plain = (is_dataclass(one) and not _derives_from_abc(one) for one in family)
    return complete and isinstance(kind.node, ast.ClassDef) and all(plain)


def _derives_from_abc(kind: Found) -> bool:
    bases = kind.node.bases if isinstance(kind.node, ast.ClassDef) else []
    return any(dotted(base).rpartition(".")[2] in ("ABC", "Protocol") for base in bases)


def _dataclass_decorator(kind: Found) -> ast.expr | None:
    for mark in kind.node.decorator_list if isinstance(kind.node, ast.ClassDef) else []:
        if dotted(mark.func if isinstance(mark, ast.Call) else mark) in ("dataclass", "dataclasses.dataclass"):
            return mark
    return None


def signature(kind: Found) -> Signature:
    """Return the options of a class (those of its constructor) or of a function."""
    if isinstance(kind.node, ast.FunctionDef):
        return _of_function(kind, kind.node, _documented(kind), skip=0)
    if not isinstance(kind.node, ast.ClassDef):
        return Signature({}, False)
    family, complete = ancestors(kind)
    texts: dict[str, str] = {}
    for one in reversed(family):
        texts |= {name: text for name, text in _documented(one).items() if text}
    found = _constructor(family, complete)
    return replace(found, options={n: replace(o, text=texts.get(n, o.text)) for n, o in found.options.items()})


def _constructor(family: list[Found], complete: bool) -> Signature:
    for place, one in enumerate(family):
        assert isinstance(one.node, ast.ClassDef)
        methods = {f.name: f for f in one.node.body if isinstance(f, ast.FunctionDef)}
        if "__init__" in methods:
            method = methods["__init__"]
            mine = _of_function(one, method, {}, skip=1)
            if method.args.kwarg is None:
                return mine
            passed = _passed_on(method)
            if passed is None:
                return Signature(mine.options, False)
            above = _constructor(family[place + 1 :], complete)
            taken = {*mine.options, *passed}
            rest = {n: o for n, o in above.options.items() if n not in taken}
            return Signature(mine.options | rest, above.complete)
        if "__new__" in methods:
            return Signature({}, False)
        if is_dataclass(one):
            return _fields(one)
    return Signature({}, complete)


def _passed_on(method: ast.FunctionDef) -> set[str] | None:
    """Return the keywords that a constructor sets itself where it passes ``**kwargs`` to its base; None if nowhere."""
    assert method.args.kwarg is not None
    rest = method.args.kwarg.arg
    for call in ast.walk(method):
        if not isinstance(call, ast.Call) or ast.unparse(call.func) != "super().__init__":
            continue
        if any(k.arg is None and dotted(k.value) == rest for k in call.keywords) and not call.args:
            return {k.arg for k in call.keywords if k.arg is not None}
    return None


def _of_function(kind: Found, node: ast.FunctionDef, texts: dict[str, str], skip: int) -> Signature:
    names = [*node.args.posonlyargs, *node.args.args]
    plain = [MISSING] * (len(names) - len(node.args.defaults)) + node.args.defaults
    pairs = [*zip(names, plain, strict=True)][skip:]
    pairs += [
        (a, MISSING if d is None else d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    ]
    texts = texts or _args_of(ast.get_docstring(node) or "")
    found = {a.arg: Option(a.arg, kind, a.annotation, d, texts.get(a.arg, "")) for a, d in pairs}
    return Signature(found, node.args.kwarg is None)


def _fields(kind: Found) -> Signature:
    found: dict[str, Option] = {}
    for one in reversed(ancestors(kind)[0]):
        if not is_dataclass(one):
            continue
        assert isinstance(one.node, ast.ClassDef)
        for node in one.node.body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            if "ClassVar" in ast.unparse(node.annotation):
                continue
            value = node.value
            if isinstance(value, ast.Call) and dotted(value.func).endswith("field"):
                given = {k.arg: k.value for k in value.keywords}
                if isinstance(made := given.get("init"), ast.Constant) and made.value is False:
                    continue
                factory = given.get("default_factory")
                value = given.get("default") or (factory and ast.Call(factory, [], []))
            found[node.target.id] = Option(node.target.id, one, node.annotation, value or MISSING)
    return Signature(found, True)


@cache
def _args_of(docstring: str) -> dict[str, str]:
    """Return the texts under ``Args:`` of a docstring."""
    from docstring_parser import parse
    from docstring_parser.common import DocstringStyle, ParseError

    try:
        found = parse(docstring, DocstringStyle.GOOGLE).params
    except ParseError:  # another style
        return {}
    return {param.arg_name: _flat(param.description or "") for param in found}


def _documented(kind: Found) -> dict[str, str]:
    if isinstance(kind.node, ast.FunctionDef):
        return _args_of(ast.get_docstring(kind.node) or "")
    if not isinstance(kind.node, ast.ClassDef):
        return {}
    inside = [f for f in kind.node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
    own = _args_of(ast.get_docstring(inside[0]) or "") if inside else {}
    return _args_of(docstring(kind)) | own


def docstring(kind: Found) -> str:
    """Return the docstring of a class or function; empty if it has none."""
    if not isinstance(kind.node, ast.ClassDef | ast.FunctionDef):
        return ""
    assigned = kind.module.docstrings.get(kind.name)
    return inspect.cleandoc(_joined(kind, assigned)) if assigned else ast.get_docstring(kind.node) or ""


def _joined(home: Found, node: ast.expr) -> str:
    """Return text that is put together from literals and assigned names: torch shares texts of its optimizers."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _joined(home, node.left) + _joined(home, node.right)
    if isinstance(node, ast.JoinedStr):
        return "".join(_joined(home, part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _joined(home, node.value)
    other = look_up(home.module, node)
    return _joined(other, other.node) if other is not None and isinstance(other.node, ast.Constant) else ""


def about(kind: Found) -> str:
    """Return the docstring of a class or function up to its sections, of the nearest base class that has one."""
    family = ancestors(kind)[0] if isinstance(kind.node, ast.ClassDef) else [kind]
    text = next(filter(None, map(docstring, family)), "")
    return re.split(r"\n *(?:(?:Args|Raises|Attributes|Returns|Examples?|Notes?):|\.\. \w+::)", text)[0].strip()


def first_sentence(text: str) -> str:
    """Return the first sentence of a docstring."""
    return re.split(r"(?<=\w[.`)])(?<!e\.g\.)(?<!i\.e\.)(?<=\.)\s", _flat(text.partition("\n\n")[0]))[0]


def _flat(text: str) -> str:
    return " ".join(text.split())


# -- types ------------------------------------------------------------------------------------------------------------


def meaning(home: Found, node: ast.expr) -> tuple[Found, ast.expr]:
    """Return what a type means: an assigned name is replaced by its value, and a type in quotes by the type."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        try:
            return meaning(home, ast.parse(node.value, mode="eval").body)
        except SyntaxError:
            return home, node
    other = look_up(home.module, node)
    if other is not None and isinstance(other.node, ast.Subscript | ast.BinOp | ast.Name | ast.Attribute):
        return meaning(other, other.node)
    return home, node


def parts(home: Found, node: ast.expr) -> Iterator[tuple[Found, ast.expr]]:
    """Yield the types of a union; a type that is no union yields itself."""
    home, node = meaning(home, node)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from parts(home, node.left)
        yield from parts(home, node.right)
    elif isinstance(node, ast.Subscript) and dotted(node.value).endswith(("Union", "Optional")):
        inside = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for one in inside:
            yield from parts(home, one)
        if dotted(node.value).endswith("Optional"):
            yield home, ast.Constant(None)
    else:
        yield home, node


def type_text(home: Found, node: ast.expr) -> str:
    """Return a type as text: unions with bars, literals without quotes, and names without their modules."""
    texts = [_text(*part) for part in parts(home, node)]
    return " | ".join(dict.fromkeys(texts))


def _text(home: Found, node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return "null" if node.value is None else str(node.value)
    if isinstance(node, ast.Subscript):
        name = dotted(node.value).rpartition(".")[2]
        inside = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name == "Literal":
            return " | ".join(str(one.value) if isinstance(one, ast.Constant) else ast.unparse(one) for one in inside)
        if name == "Callable":  # the command line gives the class that it returns
            return type_text(home, inside[-1])
        if name in ("Annotated", "ClassVar", "Final"):
            return type_text(home, inside[0])
        shown = ", ".join(type_text(home, one) for one in inside)
        return f"{'list' if name in ('Iterable', 'Sequence', 'List') else name.lower()} of {shown}"
    return "null" if dotted(node) == "None" else dotted(node).rpartition(".")[2] or ast.unparse(node)


def default_text(home: Found, node: ast.expr) -> str:
    """Return a default as a config file would give it."""
    if isinstance(node, ast.Constant):
        plain = {None: "null", True: "true", False: "false"}
        if node.value is None or isinstance(node.value, bool):
            return plain[node.value]
        bare = isinstance(node.value, str) and re.fullmatch(r"[\w./-]+", node.value) is None
        return repr(node.value) if bare else str(node.value)
    if isinstance(node, ast.Call) and dotted(node.func) in ("dict", "list", "tuple"):
        return {"dict": "{}", "list": "[]", "tuple": "[]"}[dotted(node.func)]
    if isinstance(node, ast.Name | ast.Attribute):
        other = look_up(home.module, node)
        if other is not None and isinstance(other.node, ast.Constant | ast.UnaryOp | ast.BinOp | ast.Tuple | ast.List):
            return default_text(other, other.node)
        return dotted(node).rpartition(".")[2]
    if isinstance(node, ast.Call) and not node.args and not node.keywords:
        return dotted(node.func).rpartition(".")[2]
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return inspect.cleandoc(ast.unparse(node))
    return "[]" if value == () else str(list(value) if isinstance(value, tuple) else value)
