"""Learns a chat template's tool-call syntax from the calls that it renders."""

import json
import re
from collections.abc import Iterator
from typing import Any

from .base import ToolCallError, ToolSyntax, read_json
from .json_calls import JsonCalls, NamedJsonCalls
from .python_calls import PythonCalls
from .tagged_calls import TaggedCalls

FIRST, SECOND = "probe_one", "probe_two"  # names of the tools in the probe
IDS = ("a1b2c3d4e", "f6g7h8i9j")  # ids of the calls; some templates require nine letters and digits
_ID = "\0" * 9  # stands for both
TEXT = "one two"
NESTED = {"k": [1, True, None]}
ARGUMENTS: tuple[dict[str, Any], dict[str, Any]] = ({"alpha": TEXT, "beta": NESTED}, {"alpha": "three"})
PROBE_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "A function.",
            "parameters": {
                "type": "object",
                "properties": {
                    "alpha": {"type": "string", "description": "A text."},
                    "beta": {"type": "object", "description": "An object.", "properties": {}},
                },
                "required": ["alpha"],
            },
        },
    }
    for name in (FIRST, SECOND)
]


def candidates(one: str, two: str | None) -> Iterator[ToolSyntax]:
    """Yield the syntaxes that fit rendered calls, the most likely one first.

    Args:
        one: the text of a turn with a call of ``FIRST`` with the first of `ARGUMENTS`, without content and end token.
        two: the same with a call of ``SECOND`` behind it; None if the template cannot render two calls.
    """
    for learn in (_json_object, _named_json, _python, _tagged):
        syntax = learn(one, two or "")
        if syntax is not None:
            yield syntax


def _value_at(text: str, start: int) -> tuple[Any, int] | None:
    try:
        return read_json(text, start)
    except ToolCallError:
        return None


def _is_arguments(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return False
    return value == ARGUMENTS[0]


def _json_object(one: str, two: str) -> ToolSyntax | None:
    """``open {"name": ..., "arguments": ...} close``"""
    at = one.find(FIRST)
    for start, character in enumerate(one[: max(at, 0)]):
        found = _value_at(one, start) if character in "{[" else None
        if not found or found[1] <= at:
            continue
        value, end = found
        listed = isinstance(value, list)
        inner = value[0] if listed and value else value
        if not isinstance(inner, dict):
            continue
        nested = inner.get("function")
        inner = nested if isinstance(nested, dict) else inner
        marks = {"open": one[:start], "close": one[end:], "listed": listed}
        if _is_arguments(inner.get(FIRST)):
            return JsonCalls(**marks, name_key="", arguments_key="")
        names = [key for key, value in inner.items() if value == FIRST]
        arguments = [key for key, value in inner.items() if _is_arguments(value)]
        if names and arguments:
            first, opening, closing, last = _block(one[:start], one[end:], two, end, one[start:at])
            return JsonCalls(opening, closing, first, last, _joint(one), names[0], arguments[0], listed)
    return None


def _named_json(one: str, two: str) -> ToolSyntax | None:
    """``open NAME middle {...} close``"""
    for number, identifier in enumerate(IDS):  # all calls have the same id here, so that it can be part of a mark
        one, two = one.replace(identifier, _ID), two.replace(IDS[number], _ID)
    at = one.find(FIRST)
    start = one.find("{", at) if at >= 0 else -1
    while start >= 0:
        found = _value_at(one, start)
        if found and _is_arguments(found[0]):
            first, opening, closing, last = _block(one[:at], one[found[1] :], two, found[1])
            opening, mark, before = opening.partition(_ID)
            middle = one[at + len(FIRST) : start].replace(_ID, "{id}")
            middle = re.sub(r"(?<=[:#])0(?![0-9])", "{index}", middle)
            own_id = opening.endswith("functions.") and middle.startswith(":{index}")  # Kimi K2
            return NamedJsonCalls(
                opening,
                closing,
                first,
                last,
                _joint(one),
                middle=middle,
                before="{id}" + before if mark else "",
                id_format="functions.{name}:{index}" if own_id else "",
            )
        start = one.find("{", start + 1)
    return None


def _python(one: str, two: str) -> ToolSyntax | None:
    """``open [name(key=value)] close``"""
    at = one.find(FIRST)
    if at < 0 or not re.match(r"\(\s*alpha\s*=", one[at + len(FIRST) :]):
        return None
    start = one.rfind("[", 0, at)
    listed = start >= 0 and not one[start + 1 : at].strip()
    end = one.rfind(")") + 1
    opening = one[:start] if listed else one[:at]
    closing = one[end:].lstrip()
    return PythonCalls(opening, closing[1:] if listed else closing, joint=_joint(one))


def _tagged(one: str, two: str) -> ToolSyntax | None:
    """``open NAME (key_open KEY key_close VALUE value_close)* close``"""
    at = one.find(FIRST)
    after = at + len(FIRST)
    key, value = one.find("alpha", after), one.find(TEXT, after)
    other = one.find("beta", value)
    nested = re.compile(r"\{\s*['\"]k['\"].*?\}").search(one, other) if other >= 0 else None
    if not (0 <= at < key < value < other) or not nested:
        return None
    head, between, rest = one[after:key], one[value + len(TEXT) : other], one[nested.end() :]
    key_open = _common_suffix(head, between)
    value_close = between[: len(between) - len(key_open)]
    if not key_open.strip() or not rest.startswith(value_close):
        return None
    closes = one[key + len("alpha") : value], one[other + len("beta") : nested.start()]
    first, opening, closing, last = _block(one[:at], rest[len(value_close) :], two, nested.end() + len(value_close))
    return TaggedCalls(
        opening,
        closing,
        first,
        last,
        _joint(one),
        middle=head[: len(head) - len(key_open)],
        key_open=key_open,
        key_close=closes[0],
        value_close=value_close,
        other_key_close=closes[1] if closes[1] != closes[0] else "",
    )


def _block(opening: str, closing: str, two: str, end: int, begun: str = "") -> tuple[str, str, str, str]:
    """Return the marks (first, open, close, last) of calls, from what surrounds a single call and what stands between
    two calls.

    Args:
        opening: text before the single call.
        closing: text behind it.
        two: text of two calls; empty if unknown.
        end: index behind the first call, in both texts.
        begun: text between ``opening`` and the name in every call.
    """
    at = two.find(SECOND, end)
    between = two[end:at] if at >= 0 else ""
    own = _common_suffix(opening + begun, between)
    before = (opening + begun)[: len(opening + begun) - len(own)]
    if before.rfind("<") > before.rfind(">"):  # the shared part begins inside of a tag
        own = own.partition(">")[2]
    inner = between[: len(between) - len(own)].rstrip()
    first = (opening + begun)[: len(opening + begun) - len(own)]
    if not first.strip() or not own.endswith(begun) or not closing.startswith(inner):
        return "", opening, closing, ""
    return first, own[: len(own) - len(begun)], closing[: len(inner)], closing[len(inner) :]


def _joint(one: str) -> str:
    return "\n" if one.startswith("\n") else ""


def _common_suffix(one: str, other: str) -> str:
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return one[len(one) - count :]
