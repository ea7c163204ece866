"""Syntaxes by name, and syntaxes of chat templates that do not render the calls of earlier turns.

Such a template describes a call in words, or leaves it to the training of the model. The marks are facts
from the models' cards.
"""

from collections.abc import Callable

from .base import ToolSyntax
from .gemma_calls import GemmaCalls
from .harmony import HarmonyCalls
from .json_calls import JsonCalls, NamedJsonCalls
from .python_calls import PythonCalls
from .words import WordCalls


def json_calls(listed: bool = False) -> JsonCalls:
    """Return ``<tool_call>{...}</tool_call>`` (Qwen, Hermes), or its form with a list (SmolLM2)."""
    return (
        JsonCalls("<tool_call>", "</tool_call>", listed=True)
        if listed
        else JsonCalls("<tool_call>\n", "\n</tool_call>")
    )


NAMED: dict[str, Callable[[], ToolSyntax]] = {
    "json": json_calls,
    "json_list": lambda: json_calls(listed=True),
    "words": WordCalls,
}

# Formats that a template renders in one of several forms, or with marks that depend on the values: marks in the
# template, and the syntax.
FIRST_CHOICE: list[tuple[tuple[str, ...], ToolSyntax]] = [
    (("<act>",), WordCalls()),
    (("<|channel|>", "<|message|>", "<|call|>"), HarmonyCalls()),
    (("<|tool_call>", "<tool_call|>"), GemmaCalls()),
]

# Formats of templates that do not render calls: marks in the template or among the tokenizer's added tokens.
FALLBACK: list[tuple[tuple[str, ...], ToolSyntax]] = [
    (("<|tool_call_start|>", "<|tool_call_end|>"), PythonCalls("<|tool_call_start|>", "<|tool_call_end|>", joint="")),
    (("<|tool_call|>", "<|end_of_role|>"), JsonCalls("<|tool_call|>", listed=True, joint="")),  # Granite 3
    (("<|tool_call|>", "<|/tool_call|>"), JsonCalls("<|tool_call|>", "<|/tool_call|>", joint="")),  # Phi-4-mini
    (
        ("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"),  # DeepSeek R1
        NamedJsonCalls(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            "\n```<｜tool▁call▁end｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "",
            middle="\n```json\n",
        ),
    ),
    (
        ("<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>"),  # Kimi K2
        NamedJsonCalls(
            "<|tool_call_begin|>functions.",
            "<|tool_call_end|>",
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
            "",
            middle=":{index}<|tool_call_argument_begin|>",
            id_format="functions.{name}:{index}",
        ),
    ),
]


def described(source: str) -> ToolSyntax | None:
    """Return JSON between ``<tool_call>`` tags if a template that renders no calls mentions these tags, and no other
    notation inside of them (SmolLM3)."""
    others = ("<function=", "<parameter", "<arg_key>", "<invoke")
    return json_calls() if "<tool_call>" in source and not any(mark in source for mark in others) else None


def known(table: list[tuple[tuple[str, ...], ToolSyntax]], source: str) -> ToolSyntax | None:
    """Return the first syntax of a table whose marks all occur in ``source``; None if there is none."""
    return next((syntax for marks, syntax in table if all(m in source for m in marks)), None)
