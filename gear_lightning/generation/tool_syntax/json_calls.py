"""Calls that are JSON objects, with or without the function's name outside of them."""

import re
from dataclasses import dataclass
from typing import Any

from .base import NAME, Call, ToolCallError, Tools, bracket_end, dumps, function_call, mark, read_json
from .marked import BEFORE_BARE, MarkedCalls, before_bare, behind_bare
from .schemas import names_of

OTHER_KEYS = ("arguments", "parameters")  # models take one for the other
_SEPARATOR = re.compile(r"\s*[;,]?\s*")


@dataclass(frozen=True)
class JsonCalls(MarkedCalls):
    """``open {"name": NAME, "arguments": {...}} close``: Qwen 2.5 and 3, Hermes, Granite, Llama 3, Mistral 7B, Phi-4.

    A body is one object or a list of objects; both are read.

    Args:
        name_key: key of the function's name. Empty: each object has one key, the name, and its value is the arguments
            (Apertus).
        arguments_key: key of the arguments.
        listed: whether the model writes a list. One list holds all calls.
    """

    name_key: str = "name"
    arguments_key: str = "arguments"
    listed: bool = False

    def bare(self, text: str, start: int, tools: Tools) -> int:
        begins = re.compile(r"\s*(?:<\|python_tag\|>\s*)?\[?\s*\{\s*\"" + re.escape(self.name_key)).match(text, start)
        if begins:
            return start + len(text[start:]) - len(text[start:].lstrip())
        names, at = set(names_of(tools)), start
        while found := re.compile(BEFORE_BARE + r"(?:\[\s*)?\{").search(text, at):
            called, at = self._bare_call(text, before_bare(text, found.start())[0], names)
            if called:
                return found.start()
        return -1

    def _bare_call(self, text: str, begin: int, names: set[str]) -> tuple[bool, int]:
        """Return whether the JSON value at an index is a call that ends the text, and where to search for the next."""
        try:
            value, end = read_json(text, begin)
        except ToolCallError:
            named = re.compile(r"\[?\s*\{\s*\"" + (re.escape(self.name_key) + r'"\s*:\s*"' if self.name_key else ""))
            found = named.match(text, begin)
            tried = found and any(text.startswith(f'{name}"', found.end()) for name in names)
            return bool(tried) and self._ends(text, begin), begin + 1
        calls = value if isinstance(value, list) else [value]
        if not calls or not all(self._is_call(one, names) for one in calls):
            return False, end
        rest = _SEPARATOR.match(text, behind_bare(text, end))
        assert rest
        if rest.end() == len(text):
            return True, end
        return text[rest.end()] in "[{" and self._bare_call(text, rest.end(), names)[0], end

    @staticmethod
    def _ends(text: str, begin: int) -> bool:
        """Return whether the text ends with, or within, the bracketed expression at an index."""
        try:
            return not text[behind_bare(text, bracket_end(text, begin)) :].strip()
        except ToolCallError:
            return True

    def _is_call(self, value: Any, names: set[str]) -> bool:
        if not isinstance(value, dict):
            return False
        if not self.name_key:
            return len(value) == 1 and set(value) <= names
        nested = value.get("function")
        inner = nested if isinstance(nested, dict) else value
        keys = {self.arguments_key, *OTHER_KEYS}
        if inner.get(self.name_key) in names:
            return bool(keys & set(inner)) or not set(inner) - {self.name_key, "id", "type", "tool_call_id"}
        return isinstance(inner.get(self.name_key), str) and any(isinstance(inner.get(key), dict) for key in keys)

    def body(self, text: str, start: int, tools: Tools) -> tuple[list[Call], int]:
        if not self.unmarked:
            value, end = read_json(text, start)
            return [self._call(one) for one in (value if isinstance(value, list) else [value])], end
        calls: list[Call] = []
        names, (at, fenced) = set(names_of(tools)), before_bare(text, start)
        while True:
            value, end = read_json(text, at)
            calls += [self._call(one) for one in (value if isinstance(value, list) else [value])]
            end = behind_bare(text, end, fenced)
            following = _SEPARATOR.match(text, end)
            assert following
            at = following.end()
            if text[at : at + 1] not in ("[", "{") or not self._bare_call(text, at, names)[0]:
                return calls, end

    def _call(self, value: Any) -> Call:
        if not isinstance(value, dict):
            raise ToolCallError('a tool call must be an object with "name" and "arguments"')
        if not self.name_key:
            if len(value) != 1:
                raise ToolCallError("a tool call must be an object with the function's name as its only key")
            return function_call(*next(iter(value.items())))
        nested = value.get("function")
        inner = nested if isinstance(nested, dict) else value
        identifier = value.get("id") or value.get("tool_call_id")
        key = next((k for k in (self.arguments_key, *OTHER_KEYS) if k in inner), None)
        if key is None and set(inner) - {self.name_key, "id", "type", "tool_call_id"}:
            extra = ", ".join(sorted(map(str, set(inner) - {self.name_key})))[:60]
            raise ToolCallError(f'a tool call has no "{self.arguments_key}", but: {extra}')
        return function_call(inner.get(self.name_key), {} if key is None else inner[key], identifier)

    def written(self, calls: list[dict[str, Any]]) -> list[str]:
        if not self.name_key:
            objects: list[dict[str, Any]] = [{c["name"]: c["arguments"]} for c in calls]
        else:
            objects = [{self.name_key: c["name"], self.arguments_key: c["arguments"]} for c in calls]
        return [dumps(objects)] if self.listed else [dumps(one) for one in objects]


@dataclass(frozen=True)
class NamedJsonCalls(MarkedCalls):
    """``open NAME middle {...} close``: the name, then the arguments as JSON. DeepSeek, Kimi K2, Mistral Small,
    Functionary, Solar.

    Args:
        middle: text between the name and the arguments; ``{id}`` stands for the call's id, ``{index}`` for its number.
        before: text between ``open`` and the name, with the same placeholders.
        id_format: how the model names a call, with ``{name}`` and ``{index}``, where ``middle`` has no ``{id}``.
    """

    middle: str = ""
    before: str = ""
    id_format: str = ""

    def body(self, text: str, start: int, tools: Tools) -> tuple[list[Call], int]:
        head = re.compile(_pattern(self.before) + rf"\s*(?P<name>{NAME}?)" + _pattern(self.middle) + r"\s*(?=\{)")
        found = head.match(text, start)
        if not found:
            raise ToolCallError(f"expected the function's name and its arguments, found {text[start:][:40]!r}")
        arguments, end = read_json(text, found.end())
        parts = found.groupdict()
        identifier = parts.get("id")
        if self.id_format:
            identifier = self.id_format.format(name=parts["name"], index=parts.get("index") or 0)
        return [function_call(parts["name"], arguments, identifier)], end

    def written(self, calls: list[dict[str, Any]]) -> list[str]:
        bodies = []
        for index, call in enumerate(calls):
            values = {"{id}": call.get("id") or f"call{index:05d}", "{index}": str(index)}
            before, middle = self.before, self.middle
            for name, value in values.items():
                before, middle = before.replace(name, value), middle.replace(name, value)
            bodies.append(before + call["name"] + middle + dumps(call["arguments"]))
        return bodies


def _pattern(text: str) -> str:
    parts = re.split(r"(\{id\}|\{index\})", text)
    kinds = {"{id}": r"\s*(?P<id>[\w\-]+)", "{index}": r"\s*(?P<index>[0-9]+)"}
    return "".join(kinds.get(part) or (mark(part).pattern if part.strip() else r"\s*") for part in parts)
