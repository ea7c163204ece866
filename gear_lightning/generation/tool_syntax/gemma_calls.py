"""Gemma 4's calls, whose strings have no escapes."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .base import NAME, Call, ToolCallError, Tools, checked_value, dumps, function_call, mark
from .marked import MarkedCalls
from .python_calls import WORDS

MAX_READINGS = 500  # ends of strings that are tried in one call

Reading = Iterator[tuple[Any, int]]


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

    @property
    def literal_marks(self) -> tuple[str, ...]:
        return (self.quote,)

    def body(self, text: str, start: int, tools: Tools) -> tuple[list[Call], int]:
        found = re.compile(rf"\s*(?P<name>{NAME}?)\s*(?=\{{)").match(text, start)
        if not found:
            raise ToolCallError(f"expected a function's name, found {text[start:][:40]!r}")
        reader = _GemmaReader(self, text)
        try:
            for arguments, end in reader.value(found.end()):
                if not self._stray(text, end):
                    return [function_call(found["name"], checked_value(arguments))], end
        except RecursionError:
            raise ToolCallError("nested too deeply") from None
        raise ToolCallError(reader.problem or "a string of the call contains the marks of another call")

    def _stray(self, text: str, end: int) -> bool:
        """Return whether marks stand between the end of a call and the next call: then the call does not end there."""
        closed = mark(self.close).match(text, end)
        at = closed.end() if closed else end
        following = text.find(self.open, at)
        behind = text[at : following if following >= 0 else len(text)]
        return self.quote in behind or self.close in behind or bool(not closed and behind.strip())

    def written(self, calls: list[dict[str, Any]]) -> list[str]:
        return [call["name"] + self._written(call["arguments"]) for call in calls]

    def _written(self, value: Any) -> str:
        if isinstance(value, str):
            return self.quote + value + self.quote
        if isinstance(value, dict):
            return "{" + ",".join(f"{self._key(key)}:{self._written(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(self._written, value)) + "]"
        return dumps(value)

    def _key(self, key: str) -> str:
        plain = re.fullmatch(r"[^:,{}\[\]]+", key) and key == key.strip() and self.quote not in key
        return key if plain else self.quote + key + self.quote


class _GemmaReader:
    """Yields the readings of a value, the most likely one first. Strings have no escapes: one that quotes calls may end
    at several marks.

    Args:
        syntax: the marks.
        text: the text of the turn.
    """

    def __init__(self, syntax: GemmaCalls, text: str):
        self.syntax, self.text = syntax, text
        self.problem = ""
        self._left = MAX_READINGS
        self._space = re.compile(r"\s*")

    def value(self, at: int) -> Reading:
        at = self._skipped(at)
        if self.text.startswith(self.syntax.quote, at):
            yield from self._strings(at + len(self.syntax.quote))
        elif self.text[at : at + 1] == "{":
            yield from self._items(at + 1, "}")
        elif self.text[at : at + 1] == "[":
            yield from self._items(at + 1, "]")
        else:
            yield from self._words(at)

    def _skipped(self, at: int) -> int:
        found = self._space.match(self.text, at)
        return found.end() if found else at

    def _failed(self, expected: str, at: int) -> None:
        self.problem = self.problem or f"expected {expected}, found {self.text[at:][:40]!r}"

    def _strings(self, begin: int) -> Reading:
        """Yield the texts that may begin at an index. Those that contain whole calls come before those that contain the
        beginning of a call, and short ones before long ones."""
        pattern = re.compile(re.escape(self.syntax.quote) + r"(?=\s*[,:}\]])")
        ends = [match.start() for match in pattern.finditer(self.text, begin)]
        if not ends:
            self.problem = self.problem or "a string of the call is not closed"
        for whole in (True, False):
            for end in ends:
                if self._holds_whole_calls(begin, end) is not whole:
                    continue
                self._left -= 1
                if self._left < 0:
                    raise ToolCallError("the marks of the call's strings are ambiguous")
                yield self.text[begin:end], end + len(self.syntax.quote)

    def _holds_whole_calls(self, begin: int, end: int) -> bool:
        opened, closed = (self.text.count(m, begin, end) for m in (self.syntax.open, self.syntax.close))
        return opened == closed and self.text.count(self.syntax.quote, begin, end) % 2 == 0

    def _words(self, at: int) -> Reading:
        found = re.compile(r"[^,{}\[\]]+").match(self.text, at)
        if not found or not found[0].strip():
            self._failed("a value", at)
            return
        word = found[0].strip()
        if word in WORDS:
            yield WORDS[word], found.end()
            return
        try:
            yield ast.literal_eval(word), found.end()
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            if self.syntax.quote in word or ":" in word:
                self._failed("',' behind a value", at)
                return
            yield word, found.end()

    def _items(self, at: int, closing: str) -> Reading:
        """Yield the objects or lists whose items begin at an index."""
        readings, found = [self._item(at, closing, first=True)], []
        while readings:
            item = next(readings[-1], None)
            if item is None:  # no further reading of this item: try the next reading of the one before it
                readings.pop()
                found[-1:] = []
                continue
            value, end, done = item
            if done:
                yield (dict(found) if closing == "}" else list(found)), end
                continue
            found.append(value)
            readings.append(self._item(end, closing, first=False))

    def _item(self, at: int, closing: str, *, first: bool) -> Iterator[tuple[Any, int, bool]]:
        """Yield the readings of an item, or of the closing bracket: (item, index behind it, whether it is the
        bracket)."""
        at = self._skipped(at)
        if self.text[at : at + 1] == closing:
            yield None, at + 1, True
            return
        if not first:
            if self.text[at : at + 1] != ",":
                self._failed(f"',' or {closing!r}", at)
                return
            at = self._skipped(at + 1)
        for key, begin in self._keys(at) if closing == "}" else [(None, at)]:
            for value, end in self.value(begin):
                yield value if key is None else (key, value), end, False

    def _keys(self, at: int) -> Iterator[tuple[str, int]]:
        if self.text.startswith(self.syntax.quote, at):
            names = self._strings(at + len(self.syntax.quote))
        else:
            found = re.compile(r"[^:,{}\[\]]+").match(self.text, at)
            if not found or self.syntax.quote in found[0] or not found[0].strip():
                self._failed("the name of an argument", at)
                return
            names = iter([(found[0].strip(), found.end())])
        for name, end in names:
            colon = mark(":").match(self.text, end)
            if colon:
                yield name, colon.end()
            else:
                self._failed("':' after the name of an argument", end)
