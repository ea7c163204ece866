"""Calls whose arguments are written one by one, between tags."""

import ast
import re
from dataclasses import dataclass
from typing import Any

from .base import (
    NAME,
    Call,
    ToolCallError,
    Tools,
    checked_value,
    dumps,
    function_call,
    mark,
    parse_json,
    searched,
)
from .marked import MarkedCalls
from .schemas import Parameters, kinds_of, parameters_in


@dataclass(frozen=True)
class TaggedCalls(MarkedCalls):
    """``open NAME middle (key_open KEY key_close VALUE value_close)* close``: Qwen3-Coder, Qwen 3.5 and later, GLM 4.5
    and later, MiniMax, Nemotron 3, Seed-OSS.

    A value is text, without escapes. The tool's JSON schema decides whether it is used as it is written (parameters of
    type ``string``) or read as JSON; ``null`` or ``None`` is null where the schema allows both. A value ends at the
    first ``value_close`` that another argument or the end of the call follows, so a value may contain the syntax's own
    tags.

    Args:
        middle: text between the name and the first argument.
        key_open: text before the name of an argument.
        key_close: text between the name and the value of an argument.
        value_close: text behind a value.
        other_key_close: ``key_close`` of values that are not text, where it differs (DeepSeek V3.2).
    """

    middle: str = ""
    key_open: str = ""
    key_close: str = ""
    value_close: str = ""
    other_key_close: str = ""

    def body(self, text: str, start: int, tools: Tools) -> tuple[list[Call], int]:
        head = re.compile(
            rf"\s*(?P<name>{NAME}?)" + (mark(self.middle).pattern if self.middle.strip() else r"(?![\w.\-:/])")
        )
        found = head.match(text, start)
        if not found or not found["name"]:
            raise ToolCallError(f"expected a function's name, found {text[start:].strip()[:40]!r}")
        parameters, arguments, at = parameters_in(tools, found["name"]), {}, found.end()
        while opened := mark(self.key_open).match(text, at):
            key, value, as_text, at = self._argument(text, opened.end())
            if key in arguments:
                raise ToolCallError(f"the argument {key[:40]!r} occurs twice")
            arguments[key] = value if as_text else _value(value, key, parameters)
        return [function_call(found["name"], checked_value(arguments))], at

    def _argument(self, text: str, at: int) -> tuple[str, str, bool, int]:
        """Return an argument's name, its text, whether its mark says that it is text, and the index behind it."""
        closes = [c for c in (self.key_close, self.other_key_close) if c]
        named = [(match, c) for c in closes if (match := searched(c).search(text, at))]
        if not named:
            raise ToolCallError(f"expected {self.key_close.strip()!r} after the name of an argument")
        match, close = min(named, key=lambda pair: pair[0].start())
        key = text[at : match.start()].strip()
        if not key or len(key.splitlines()) > 1:
            raise ToolCallError(f"expected the name of an argument, found {text[at:][:40]!r}")
        begin = match.end()
        if close.endswith("\n") and text[begin : begin + 1] == "\n":
            begin += 1
        stop, behind = self._value_end(text, begin)
        value = text[begin:stop]
        if self.value_close.startswith("\n") and value.endswith("\n"):
            value = value[:-1]
        return key, value, bool(self.other_key_close and close == self.key_close), behind

    def _value_end(self, text: str, begin: int) -> tuple[int, int]:
        """Return the index of the mark that ends a value, and the index behind the mark."""
        last = None
        for match in searched(self.value_close).finditer(text, begin):
            at = match.end()
            if not text[at:].strip():
                return match.start(), at
            follows_key = mark(self.key_open).match(text, at)
            follows_end = mark(self.close).match(text, at)
            if not (follows_key or follows_end):
                continue
            inside = text[begin : match.start()]
            balanced = len(searched(self.key_open).findall(inside)) <= len(searched(self.value_close).findall(inside))
            last = last or match
            if balanced and not (follows_end and self._stray(text, at)):
                return match.start(), at
        if last is None:
            raise ToolCallError(f"expected {self.value_close.strip()!r} after the value of an argument")
        return last.start(), last.end()

    def _stray(self, text: str, at: int) -> bool:
        """Return whether the text between a call's end and the next call has an end of a value: then it is inside of a
        value that quotes this syntax."""
        following = searched(self.open).search(text, at) if self.open.strip() else None
        return bool(searched(self.value_close).search(text, at, following.start() if following else len(text)))

    def written(self, calls: list[dict[str, Any]]) -> list[str]:
        bodies = []
        for call in calls:
            body = call["name"] + self.middle
            for key, value in call["arguments"].items():
                text = value if isinstance(value, str) else dumps(value)
                close = self.key_close if isinstance(value, str) else self.other_key_close or self.key_close
                body += self.key_open + key + close + text + self.value_close
            bodies.append(body)
        return bodies


def _value(text: str, name: str, parameters: Parameters) -> Any:
    """Return the value of an argument: JSON, or a Python literal, which some templates write.

    Where the schema allows text, a value of a type that it does not allow is text: ``007`` of a parameter that is text
    or a list, and every value but null of one that is text or null. Text that is neither JSON nor a literal stays text;
    the environment checks the arguments against the schema.
    """
    kinds = parameters.kinds(name)
    if kinds == {"string"}:
        return text
    if kinds <= {"string", "null"} and "string" in kinds:
        return None if text.strip() in ("null", "None") else text
    value = _literal(text)
    return text if "string" in kinds and not kinds & kinds_of(value) else value


def _literal(text: str) -> Any:
    try:
        return parse_json(text)
    except ToolCallError:
        pass
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        lowered = text.strip().lower()
        return {"true": True, "false": False, "none": None}.get(lowered, text)
    return value if isinstance(value, dict | list | bool | int | float | str | None) else text
