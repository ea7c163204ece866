"""Calls between marks: the layout that most syntaxes share."""

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from .base import Call, ToolCallError, Tools, ToolSyntax, mark, searched


@dataclass(frozen=True)
class MarkedCalls(ToolSyntax):
    """Calls of the form ``first open BODY close open BODY close last``.

    ``first`` and ``last`` enclose a block of calls; many syntaxes have none, and repeat ``open BODY close`` instead.

    Args:
        open: mark before each call. May be empty if ``first`` is set, or if a call needs no mark.
        close: mark behind each call. May be empty.
        first: mark before the first call of a block.
        last: mark behind the last call of a block.
        joint: text between the content and the first call.
    """

    open: str = ""
    close: str = ""
    first: str = ""
    last: str = ""
    joint: str = "\n"

    @abstractmethod
    def body(self, text: str, start: int, tools: Tools) -> tuple[list[Call], int]:
        """Return the calls of one body, and the index behind it. Raises `ToolCallError`."""

    @abstractmethod
    def written(self, calls: list[dict[str, Any]]) -> list[str]:
        """Return the bodies of calls."""

    def bare(self, text: str, start: int, tools: Tools) -> int:
        """Return the index of a call without marks: one that begins at ``start`` or behind white space, or one that
        ends the text; -1 if there is none."""
        return -1

    @property
    def unmarked(self) -> bool:
        """Whether calls have no mark before them."""
        return not (self.first.strip() or self.open.strip())

    def find(self, text: str, start: int, tools: Tools) -> int:
        if self.unmarked:
            return self.bare(text, start, tools)
        marks = [m for m in (self.first, self.open) if m.strip()]
        found = [match.start() for m in marks if (match := searched(m).search(text, start))]
        return min(found, default=-1)

    def read(self, text: str, start: int, tools: Tools) -> tuple[list[Call], int]:
        block = mark(self.first).match(text, start) if self.first.strip() else None
        at = block.end() if block else start
        calls: list[Call] = []
        while True:
            opened = mark(self.open).match(text, at)
            if not opened:
                raise ToolCallError(f"expected {self.open.strip()!r}, found {_shown(text, at)}")
            found, at = self.body(text, opened.end(), tools)
            calls += found
            closed = mark(self.close).match(text, at)
            if not closed and text[at:].strip():
                raise ToolCallError(f"expected {self.close.strip()!r} after the arguments, found {_shown(text, at)}")
            at = closed.end() if closed and self.close.strip() else at
            if not block or not text[at:].strip():
                return calls, at if text[at:].strip() else len(text)
            if self.last.strip() and (ended := mark(self.last).match(text, at)):
                return calls, ended.end()
            if not self.open.strip():
                return calls, at

    def write(self, calls: list[dict[str, Any]]) -> str:
        between = "" if self.first.strip() else "\n"
        return self.first + between.join(self.open + body + self.close for body in self.written(calls)) + self.last


# What models write before a call without marks, although no template renders it.
BEFORE_BARE = r"(?:```\w*\s*)?(?:<\|python_tag\|>\s*)?"


def before_bare(text: str, start: int) -> tuple[int, bool]:
    """Return the index of a call without marks behind `BEFORE_BARE`, and whether a fence encloses it."""
    found = re.compile(r"\s*" + BEFORE_BARE).match(text, start)
    assert found
    return found.end(), "```" in found[0]


def behind_bare(text: str, at: int, fenced: bool = True) -> int:
    """Return the index behind the fence that may follow a call without marks."""
    found = re.compile(r"\s*```").match(text, at) if fenced else None
    return found.end() if found else at


def _shown(text: str, at: int) -> str:
    return repr(text[at:].strip()[:40]) if text[at:].strip() else "the end of the text"
