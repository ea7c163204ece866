"""How models write tool calls: one class per notation, learned from the chat template or set in the config."""

from .base import Call, ToolCallError, ToolSyntax
from .gemma_calls import GemmaCalls
from .harmony import HarmonyCalls
from .json_calls import JsonCalls, NamedJsonCalls
from .python_calls import PythonCalls
from .tagged_calls import TaggedCalls
from .words import WordCalls

__all__ = [
    "Call",
    "GemmaCalls",
    "HarmonyCalls",
    "JsonCalls",
    "NamedJsonCalls",
    "PythonCalls",
    "TaggedCalls",
    "ToolCallError",
    "ToolSyntax",
    "WordCalls",
]
