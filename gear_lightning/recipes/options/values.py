"""Whether an option can have a value: numbers, true and false, null, and names from a list. Others are not judged."""

import re
from typing import Any

import yaml

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
