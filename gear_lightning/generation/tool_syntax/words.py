"""The syntax of the from-scratch models."""

import re
from dataclasses import dataclass
from typing import Any

from .base import Call, ToolCallError, Tools, ToolSyntax, function_call


@dataclass(frozen=True)
class WordCalls(ToolSyntax):
    """``name argument argument``: the first word that names a tool starts a call, and the words behind it are its
    arguments, in the order of the tool's parameters."""

    joint = " "
    any_text = False

    def find(self, text: str, start: int, tools: Tools) -> int:
        names = _signatures(tools)
        words = (match for match in re.compile(r"\S+").finditer(text, start) if match[0] in names)
        return next((match.start() for match in words), -1)

    def read(self, text: str, start: int, tools: Tools) -> tuple[list[Call], int]:
        word, *values = text[start:].split()
        names = _signatures(tools)[word]
        if len(names) != len(values):
            raise ToolCallError(f"{word} takes {len(names)} arguments ({', '.join(names)}), got {len(values)}")
        return [function_call(word, dict(zip(names, values, strict=True)))], len(text)

    def write(self, calls: list[dict[str, Any]]) -> str:
        return " ".join(" ".join([c["name"], *map(str, c["arguments"].values())]) for c in calls)


def _signatures(tools: Tools) -> dict[str, list[str]]:
    functions = (tool["function"] for tool in tools)
    return {f["name"]: list((f.get("parameters") or {}).get("properties") or ()) for f in functions}
