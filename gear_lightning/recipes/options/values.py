"""YAML with line numbers, and whether an option can have a value: a number, true, false, null, a name from a list."""

import re
from pathlib import Path
from typing import Any

import yaml

from ...errors import UserError
from ...hints import did_you_mean, some
from .tree import Node

KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "null": "null"}  # tag -> what it is
SHOWN = 60  # characters of a value in a message


_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Loader(_Base):
    """Reads YAML as the parser does, for which 1e3 is a number."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?)$"),
    list("-+0123456789."),
)


def text_of(path: Path) -> str:
    """Return the text of a config file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def composed(text: str, name: str) -> yaml.Node | None:
    """Return YAML as nodes, which know their lines; None if there is none.

    Args:
        text: the YAML.
        name: its name in messages.

    Raises:
        UserError: it is no YAML, or a mapping has a key twice.
    """
    try:
        found = yaml.compose(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        said = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{name}{'' if mark is None else f':{mark.line + 1}'}: no valid YAML: {said}") from None
    check_keys(found, name)
    return found


def check_keys(found: yaml.Node | None, name: str) -> None:
    """Check that no mapping has a key twice, of which YAML would use the last.

    Args:
        found: what to check, with all that is inside.
        name: see `composed`.

    Raises:
        UserError: one has; names the lines.
    """
    waiting, seen = [found], set()
    while waiting:
        node = waiting.pop(0)
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:  # an alias can be inside of its own anchor
            continue
        seen.add(id(node))
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            line, same = key.start_mark.line + 1, (key.tag, str(key.value))
            if same in lines and "merge" not in key.tag:
                where, both = f"{name}:{line}", f", in lines {lines[same]} and {line}"
                where, both = (name, "") if name.startswith("--") else (where, both)
                raise UserError(f"{where}: the key {key.value} is there twice{both}; remove one")
            lines[same] = line
            waiting.append(value)
        waiting += node.value if isinstance(node, yaml.SequenceNode) else ()


def problem(node: Node, value: str | yaml.Node, where: str) -> str | None:
    """Return the message about a value of a wrong type; None if it may be right.

    Args:
        node: the option.
        value: text of the command line, or a value in a file.
        where: how the message begins: the option as typed, or file, line and key.
    """
    kinds, choices = node.takes.kinds, node.takes.choices
    text = value if isinstance(value, str) else str(value.value) if isinstance(value, yaml.ScalarNode) else None
    if not (kinds or choices) or (text is not None and "${" in text):
        return None
    found = _kind(value)
    may_be_null = node.default == "null" or isinstance(value, yaml.Node)  # in a file, null stands for the default
    if found in kinds or text in choices or (found == "int" and "float" in kinds) or (found == "null" and may_be_null):
        return None
    names = [KINDS[kind] for kind in KINDS if kind in kinds and not (kind == "int" and "float" in kinds)]
    names += [f"one of {some(choices)}"] if choices else []
    question = did_you_mean(text, choices) if text else ""
    shown = "" if text is None else f"={text if len(text) <= SHOWN else text[:SHOWN] + '...'}"
    return f"{where}{shown}: must be {' or '.join(names)}{question}"


def _kind(value: str | yaml.Node) -> str:
    """Return the last part of a value's tag. Text in quotes is read once more, as the parser does."""
    if isinstance(value, str):
        if value.strip().lstrip("-").isdigit():
            return "int"
        try:
            found = yaml.compose(value, Loader)
        except yaml.YAMLError:
            return "str"
        return "str" if found is None else _kind(found)
    kind = value.tag.rpartition(":")[2]
    if isinstance(value, yaml.ScalarNode) and kind == "str" and (value.style in ("'", '"') or value.value.isdigit()):
        return _kind(str(value.value))
    return kind
