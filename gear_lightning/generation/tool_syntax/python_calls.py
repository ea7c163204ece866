"""Calls written as function calls in Python's notation."""

import ast
import re
from dataclasses import dataclass
from typing import Any

from .base import NAME, Call, ToolCallError, Tools, bracket_end, checked_value, function_call, unquoted
from .marked import BEFORE_BARE, MarkedCalls, before_bare, behind_bare
from .schemas import names_of

WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}


@dataclass(frozen=True)
class PythonCalls(MarkedCalls):
    """``open [name(key=value, ...), ...] close``: LFM2, Llama 4, Llama 3.2's alternative. Values are Python or JSON
    literals. One list holds all calls."""

    def bare(self, text: str, start: int, tools: Tools) -> int:
        begins = re.compile(rf"\s*(?:<\|python_tag\|>\s*)?\[\s*{NAME}\(").match(text, start)
        if begins:
            return start + len(text[start:]) - len(text[start:].lstrip())
        names = "|".join(map(re.escape, sorted(names_of(tools), key=len, reverse=True)))
        call = re.compile(BEFORE_BARE + rf"(?:\[\s*|(?<![\w.\-:/]))(?:{names or '(?!)'})\(")
        for found in call.finditer(text, start):
            try:
                end = bracket_end(text, before_bare(text, found.start())[0])
            except ToolCallError:
                return found.start()
            if not text[behind_bare(text, end) :].strip():
                return found.start()
        return -1

    def body(self, text: str, start: int, tools: Tools) -> tuple[list[Call], int]:
        at, fenced = before_bare(text, start) if self.unmarked else (_skipped(text, start), False)
        listed = text[at : at + 1] == "["
        at, calls = at + listed, []
        while True:
            found = re.compile(rf"\s*(?P<name>{NAME})\s*\(").match(text, at)
            if not found:
                raise ToolCallError(f"a tool call must have the form name(argument=value), found {text[at:][:40]!r}")
            arguments, at = _arguments(text, found.end())
            calls.append(function_call(found["name"], checked_value(arguments)))
            at = _skipped(text, at) if listed else at
            if not listed:
                return calls, behind_bare(text, at, fenced)
            if text[at : at + 1] == ",":
                at = _skipped(text, at + 1)
            elif text[at : at + 1] != "]":
                raise ToolCallError(f"expected ',' or ']' behind a call, found {text[at:][:20]!r}")
            if text[at : at + 1] == "]":
                return calls, behind_bare(text, at + 1, fenced)

    def written(self, calls: list[dict[str, Any]]) -> list[str]:
        def one(call: dict[str, Any]) -> str:
            return f"{call['name']}({', '.join(f'{k}={v!r}' for k, v in call['arguments'].items())})"

        return [f"[{', '.join(map(one, calls))}]"]


def _skipped(text: str, at: int) -> int:
    """Return the index behind white space."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _arguments(text: str, at: int) -> tuple[dict[str, Any], int]:
    """Return the arguments behind an opening bracket, and the index behind the closing one. Names need not be Python's:
    tools have parameters such as ``from``."""
    found: dict[str, Any] = {}
    while True:
        at = _skipped(text, at)
        if text[at : at + 1] == ")":
            return found, at + 1
        key = re.compile(r"(?P<name>[^\s=,()\[\]{}'\"]+)\s*=(?!=)").match(text, at)
        if not key:
            raise ToolCallError(f"a tool call must have the form name(argument=value), found {text[at:][:40]!r}")
        if key["name"] in found:
            raise ToolCallError(f"the argument {key['name'][:40]!r} occurs twice")
        end = _value_end(text, key.end())
        try:
            found[key["name"]] = _literal(ast.parse(f"({text[key.end() : end].strip() or '.'})", mode="eval").body)
        except ToolCallError:
            raise
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise ToolCallError(f"not a literal: {error}") from None
        at = end + (text[end] == ",")


def _value_end(text: str, start: int) -> int:
    """Return the index of the comma or bracket that ends a value."""
    return next(at for at, character, depth in unquoted(text, start) if (character, depth) in ((",", 0), (")", -1)))


def _literal(tree: Any) -> Any:
    match tree:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id=name) if name in WORDS:
            return WORDS[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_text(_literal(k)): _literal(v) for k, v in zip(keys, values, strict=True)}
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
    raise ToolCallError(f"{ast.unparse(tree)[:40]!r} is not a literal")


def _text(key: Any) -> str:
    if not isinstance(key, str):
        raise ToolCallError(f"the key {key!r} is not text")
    return key
