"""Base class of tool-call syntaxes, and the checks that they share."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, ClassVar

from ...checks import deeper_than

MAX_DEPTH = 64  # nesting depth of lists and objects in a tool call
NAME = r"[\w.\-:/]+"  # names of functions and parameters, as text that is not JSON contains them

Tools = Sequence[dict[str, Any]]
Call = dict[str, Any]
"""``{"type": "function", "function": {"name": str, "arguments": dict}}``, and ``"id"`` if the policy wrote one."""

TOOL_PROMPT = """You can call functions. Here are their signatures:
<tools>
{tools}
</tools>
To call one, answer with
{example}"""


class ToolCallError(ValueError):
    """The policy's text contains an invalid tool call."""


class ToolSyntax(ABC):
    """How a model writes tool calls.

    A subclass can be named in a config (``model.chat.tool_syntax.class_path``). It finds and reads calls in the text of
    one assistant turn, from which reasoning has been removed, and writes them for demonstrations.

    Attributes:
        joint: text between the content and the first call.
        any_text: whether arguments can be any text. Otherwise (the from-scratch models) the round trip is not checked,
            and the prompt need not list the tools.
    """

    joint: str = "\n"
    any_text: ClassVar[bool] = True

    @property
    def literal_marks(self) -> tuple[str, ...]:
        """Marks around text without escapes. Where such a mark is a control token, the same text in ordinary tokens
        is not a mark."""
        return ()

    @abstractmethod
    def find(self, text: str, start: int, tools: Tools) -> int:
        """Return the index at which the next call begins, at or after ``start``; -1 if there is none."""

    @abstractmethod
    def read(self, text: str, start: int, tools: Tools) -> tuple[list[Call], int]:
        """Return the calls that begin at ``start`` (one call, or a block of several) and the index behind them.

        The end mark may be missing at the end of the text.

        Raises:
            ToolCallError: a call that cannot be read; the message states what is wrong.
        """

    @abstractmethod
    def write(self, calls: list[dict[str, Any]]) -> str:
        """Return the text of calls. ``calls``: objects with ``name``, ``arguments``, and optionally ``id``."""

    def introduced(self, content: str, calls: str) -> str:
        """Return the text of a turn in which calls follow text.

        Args:
            content: the text; may be empty.
            calls: the text of the calls.
        """
        return content + self.joint + calls.lstrip("\n") if content else calls

    def clean(self, content: str) -> str:
        """Return the answer without marks of the turn format, given the text outside of reasoning and calls."""
        return content.strip()

    def system_text(self, tools: Tools, example: str | None = None) -> str:
        """Return the text that lists tools in the system message, for chat templates that do not list them.

        Args:
            tools: JSON schemas of the tools.
            example: the form of a call; None: `example`.
        """
        listed = "\n".join(dumps(tool) for tool in tools)
        return TOOL_PROMPT.format(tools=listed, example=self.example() if example is None else example)

    def example(self) -> str:
        """Return the form of a call, for `system_text`."""
        return self.write([{"name": "<function>", "arguments": {"<argument>": "<value>"}}])


def dumps(value: Any) -> str:
    """Return JSON as chat templates write it: without escapes of characters that are not ASCII."""
    return json.dumps(value, ensure_ascii=False)


def function_call(name: Any, arguments: Any, identifier: Any = None) -> Call:
    """Return a checked call.

    Args:
        name: the name of the function.
        arguments: an object, or its JSON text.
        identifier: the call's id, if the policy wrote one.

    Raises:
        ToolCallError: the name is not text, or the arguments are not an object.
    """
    if not isinstance(name, str) or not name:
        raise ToolCallError('a tool call must be an object with "name" and "arguments"')
    if isinstance(arguments, str):  # some models write the arguments as a JSON string
        arguments = parse_json(arguments)
    if not isinstance(arguments, dict):
        raise ToolCallError('"arguments" must be an object')
    call: Call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {**call, "id": identifier} if isinstance(identifier, str) and identifier else call


def _reject(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_reject, strict=False)  # NaN and Infinity are not JSON


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ToolCallError: it is not JSON, not encodable, or nested too deeply.
    """
    value, end = read_json(text, 0)
    if text[end:].strip():
        raise ToolCallError(f"not JSON: extra text {text[end:].strip()[:40]!r}")
    return value


def read_json(text: str, start: int) -> tuple[Any, int]:
    """Return the JSON value that begins at ``start``, and the index behind it.

    The decoder finds the end, so marks of the syntax inside strings do not end the call.

    Raises:
        ToolCallError: as in `parse_json`.
    """
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        value, end = _decoder.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise ToolCallError(f"not JSON: {error}") from None
    return checked_value(value), end


def checked_value(value: Any) -> Any:
    """Return a value that other code can write as JSON and encode.

    Raises:
        ToolCallError: it is not encodable, or nested too deeply.
    """
    try:
        # reject 1e999, which is parsed as infinity, and half of a surrogate pair, which tokenizers reject
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError, TypeError) as error:
        raise ToolCallError(f"not JSON: {error}") from None
    if deeper_than(MAX_DEPTH, value):  # code that recurses into the value later must not exceed the stack
        raise ToolCallError(f"nested more than {MAX_DEPTH} deep")
    return value


def unquoted(text: str, start: int) -> Iterator[tuple[int, str, int]]:
    """Yield the characters from ``start`` on that are not inside of strings: (index, character, number of brackets that
    are open behind it).

    Raises:
        ToolCallError: the text ends: a bracket or a quotation mark is not closed.
    """
    depth, at, quote = 0, start, ""
    while at < len(text):
        character = text[at]
        if quote:
            at += character == "\\"
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
            yield at, character, depth
        at += 1
    raise ToolCallError("a bracket or a quotation mark of the call is not closed")


def bracket_end(text: str, start: int) -> int:
    """Return the index behind the bracketed expression at ``start``.

    Raises:
        ToolCallError: a bracket or a quotation mark is not closed.
    """
    return next(at + 1 for at, character, depth in unquoted(text, start) if character in ")]}" and depth <= 0)


@lru_cache(maxsize=256)
def mark(text: str) -> re.Pattern[str]:
    """Return the pattern of a mark. White space in and around it is optional: models vary it."""
    return re.compile(r"\s*" + r"\s*".join(map(re.escape, text.split())))


@lru_cache(maxsize=256)
def searched(text: str) -> re.Pattern[str]:
    """Return the pattern of a mark, as `mark`, without white space before it."""
    return re.compile(r"\s*".join(map(re.escape, text.split())) or r"(?!)")
