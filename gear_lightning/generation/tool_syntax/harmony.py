"""GPT-OSS's format, in which a turn consists of messages in channels."""

import re
from dataclasses import dataclass
from typing import Any

from .base import NAME, Call, ToolCallError, Tools, ToolSyntax, dumps, function_call, read_json

# The recipient of a call stands before or behind the channel; templates write one form, models often the other.
_CALL = re.compile(
    r"(?:<\|start\|>assistant)?(?:<\|channel\|>\w+)?\s*to=functions\.(?P<name>" + NAME + r")"
    r"(?:(?!<\|message\|>|<\|end\|>|<\|call\|>).)*<\|message\|>",
    re.DOTALL,
)
_HEADER = re.compile(r"<\|start\|>assistant|<\|channel\|>\w*|<\|message\|>|<\|end\|>|<\|return\|>|<\|call\|>")


@dataclass(frozen=True)
class HarmonyCalls(ToolSyntax):
    """``<|start|>assistant to=functions.NAME<|channel|>commentary json<|message|>{...}<|call|>``: GPT-OSS
    (https://github.com/openai/harmony)."""

    joint = ""

    def find(self, text: str, start: int, tools: Tools) -> int:
        found = _CALL.search(text, start)
        return found.start() if found else -1

    def read(self, text: str, start: int, tools: Tools) -> tuple[list[Call], int]:
        found = _CALL.match(text, start)
        if not found:
            raise ToolCallError(f"expected a call, found {text[start:][:40]!r}")
        arguments, end = read_json(text, found.end())
        closed = re.compile(r"\s*(?:<\|call\|>|<\|end\|>)").match(text, end)
        if not closed and text[end:].strip() and not text[end:].lstrip().startswith("<|start|>"):
            raise ToolCallError(f"expected the end of the call, found {text[end:].strip()[:40]!r}")
        return [function_call(found["name"], arguments)], closed.end() if closed else end

    def write(self, calls: list[dict[str, Any]]) -> str:
        form = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}"
        return "<|call|><|start|>assistant".join(form.format(c["name"], dumps(c["arguments"])) for c in calls)

    def introduced(self, content: str, calls: str) -> str:
        opening, closing = "<|channel|>commentary<|message|>", "<|end|><|start|>assistant"
        return opening + content + closing + calls if content else calls

    def clean(self, content: str) -> str:
        return _HEADER.sub("", content).strip()
