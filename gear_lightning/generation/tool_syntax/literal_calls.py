"""Calls written as function calls: Python's notation, and Gemma 4's."""

import ast
import re
from dataclasses import dataclass
from typing import Any

from .base import NAME, Call, ToolCallError, Tools, checked_value, dumps, function_call, mark
from .marked import MarkedCalls

_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}


@dataclass(frozen=True)
class PythonCalls(MarkedCalls):
    """``open [name(key=value, ...), ...] close``: LFM2, Llama 4, Llama 3.2's alternative. Values are Python or JSON
    literals. One list holds all calls."""

    def bare(self, text: str, start: int) -> int:
        begins = re.compile(rf"\s*\[\s*{NAME}\(").match(text, start)
        return -1 if not begins else text.index("[", start)

    def body(self, text: str, start: int, tools: Tools) -> tuple[list[Call], int]:
        start += len(text[start:]) - len(text[start:].lstrip())
        end = _expression_end(text, start)
        source = text[start:end].strip()
        try:
            tree: Any = ast.parse(f"({source})", mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise ToolCallError(f"not a function call: {error}") from None
        found = tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]
        if not found:
            raise ToolCallError("the list of calls is empty")
        return [_python_call(one) for one in found], end

    def written(self, calls: list[dict[str, Any]]) -> list[str]:
        def one(call: dict[str, Any]) -> str:
            return f"{call['name']}({', '.join(f'{k}={v!r}' for k, v in call['arguments'].items())})"

        return [f"[{', '.join(map(one, calls))}]"]


def _expression_end(text: str, start: int) -> int:
    """Return the index behind the bracketed expression at ``start``: brackets inside of strings do not count."""
    depth, at, quote = 0, start, ""
    while at < len(text):
        character = text[at]
        if quote:
            at += character == "\\"
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth <= 0:
                return at + 1
        at += 1
    raise ToolCallError("a bracket or a quotation mark of the call is not closed")


def _python_call(tree: Any) -> Call:
    if not isinstance(tree, ast.Call) or tree.args or any(k.arg is None for k in tree.keywords):
        raise ToolCallError("a tool call must have the form name(argument=value)")
    try:
        arguments = {k.arg: _literal(k.value) for k in tree.keywords}
        return function_call(ast.unparse(tree.func), checked_value(arguments))
    except RecursionError:
        raise ToolCallError("nested too deeply") from None


def _literal(tree: Any) -> Any:
    match tree:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id=name) if name in _WORDS:
            return _WORDS[name]
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


@dataclass(frozen=True)
class GemmaCalls(MarkedCalls):
    """``<|tool_call>call:NAME{key:value,...}<tool_call|>``: Gemma 4. Keys are bare, and strings stand between
    ``<|"|>`` marks.

    Args:
        open: mark before the name of the function.
        close: mark behind the arguments.
        joint: text between the content and the first call.
        quote: mark before and behind a string.
    """

    open: str = "<|tool_call>call:"
    close: str = "<tool_call|>"
    joint: str = ""
    quote: str = '<|"|>'

    def body(self, text: str, start: int, tools: Tools) -> tuple[list[Call], int]:
        found = re.compile(rf"\s*(?P<name>{NAME}?)\s*(?=\{{)").match(text, start)
        if not found:
            raise ToolCallError(f"expected a function's name, found {text[start:][:40]!r}")
        try:
            arguments, at = self._read(text, found.end())
            following = text.find(self.open, at)
            behind = text[at : following if following >= 0 else len(text)]
            if behind.count(self.close) > 1:  # a string quotes the end of a call
                limit = text.rfind(self.close, 0, following if following >= 0 else len(text))
                arguments, at = self._read(text, found.end(), limit)
        except RecursionError:
            raise ToolCallError("nested too deeply") from None
        return [function_call(found["name"], checked_value(arguments))], at

    def _read(self, text: str, at: int, limit: int | None = None) -> tuple[Any, int]:
        """Return the value at an index, and the index behind it. With a ``limit``, strings extend to the last mark
        before it that can end them."""
        if text.startswith(self.quote, at):
            begin = at + len(self.quote)
            end = self._string_end(text, begin, limit)
            return text[begin:end], end + len(self.quote)
        if text[at : at + 1] == "{":
            return self._sequence(text, at + 1, "}", limit)
        if text[at : at + 1] == "[":
            return self._sequence(text, at + 1, "]", limit)
        found = re.compile(r"[^,{}\[\]]+").match(text, at)
        if not found:
            raise ToolCallError(f"expected a value, found {text[at:][:40]!r}")
        word = found[0].strip()
        if word in _WORDS:
            return _WORDS[word], found.end()
        try:
            return ast.literal_eval(word), found.end()
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return word, found.end()

    def _string_end(self, text: str, begin: int, limit: int | None) -> int:
        """Return the index of the mark that ends a string: the next one (before a limit: the last one) that a separator
        follows."""
        pattern = re.compile(re.escape(self.quote) + r"(?=\s*[,:}\]])")
        found = [match.start() for match in pattern.finditer(text, begin, len(text) if limit is None else limit)]
        if not found:
            raise ToolCallError("a string of the call is not closed")
        return found[0] if limit is None else found[-1]

    def _sequence(self, text: str, at: int, closing: str, limit: int | None) -> tuple[Any, int]:
        keyed = closing == "}"
        found: list[Any] = []
        space = re.compile(r"\s*")
        while True:
            at = space.match(text, at).end()  # type: ignore[union-attr]
            if text[at : at + 1] == closing:
                return (dict(found) if keyed else found), at + 1
            if found:
                if text[at : at + 1] != ",":
                    raise ToolCallError(f"expected ',' or {closing!r}, found {text[at:][:20]!r}")
                at = space.match(text, at + 1).end()  # type: ignore[union-attr]
            key = None
            if keyed:
                key, at = self._key(text, at)
            value, at = self._read(text, space.match(text, at).end(), limit)  # type: ignore[union-attr]
            found.append((key, value) if keyed else value)

    def _key(self, text: str, at: int) -> tuple[str, int]:
        if text.startswith(self.quote, at):
            key, at = self._read(text, at)
        else:
            found = re.compile(r"[^:,{}\[\]]+").match(text, at)
            if not found:
                raise ToolCallError(f"expected the name of an argument, found {text[at:][:20]!r}")
            key, at = found[0].strip(), found.end()
        colon = mark(":").match(text, at)
        if not colon:
            raise ToolCallError(f"expected ':' after the name of an argument, found {text[at:][:20]!r}")
        return key, colon.end()

    def written(self, calls: list[dict[str, Any]]) -> list[str]:
        return [call["name"] + self._written(call["arguments"]) for call in calls]

    def _written(self, value: Any) -> str:
        if isinstance(value, str):
            return self.quote + value + self.quote
        if isinstance(value, dict):
            return "{" + ",".join(f"{key}:{self._written(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(self._written, value)) + "]"
        return dumps(value)
