"""Calls that are JSON objects, with or without the function's name outside of them."""

import re
from dataclasses import dataclass
from typing import Any

from .base import NAME, Call, ToolCallError, Tools, dumps, function_call, mark, read_json
from .marked import MarkedCalls


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

    def bare(self, text: str, start: int) -> int:
        begins = re.compile(r"\s*\[?\s*\{\s*\"" + re.escape(self.name_key or "")).match(text, start)
        return -1 if not begins else start + len(text[start:]) - len(text[start:].lstrip())

    def body(self, text: str, start: int, tools: Tools) -> tuple[list[Call], int]:
        value, end = read_json(text, start)
        return [self._call(one) for one in (value if isinstance(value, list) else [value])], end

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
        others = ("arguments", "parameters")  # models take one for the other
        key = next((k for k in (self.arguments_key, *others) if k in inner), None)
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
