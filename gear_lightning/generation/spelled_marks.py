"""Distinguishes a syntax's marks from the same text spelled out in ordinary tokens.

Some syntaxes have strings without escapes, between marks that are control tokens (Gemma 4). A string may quote such a
mark: then its tokens are ordinary ones. The reader of calls sees text; in it a quoted mark is replaced by another
text of the same length, and put back into what was read.
"""

from collections.abc import Callable, Sequence
from typing import Any

from .chat_safety import CLOSE, OPEN
from .turn_text import TurnText

HIDDEN = "\ufdd2"  # a noncharacter, which Unicode reserves for internal use


def hide_marked(text: str, marks: Sequence[str]) -> str:
    """Return rendered text in which marks that are spelled out are hidden."""
    for mark in marks:
        text = text.replace(f"{OPEN}{mark}{CLOSE}", HIDDEN + mark[1:])
    return text


def hide_spelled(text: str, mark: str, own: set[int], ids: list[int], decode: Callable[[list[int]], str]) -> str:
    """Return the text of ids in which a mark is hidden where ordinary tokens spell it.

    Args:
        text: the text.
        mark: the mark.
        own: the id of the mark; empty if it is no control token, and nothing is hidden.
        ids: the ids of the text.
        decode: returns the text of ids.
    """
    if not own or mark not in text:
        return text
    places = {len(decode(ids[:at])) for at, token in enumerate(ids) if token in own}
    at = text.find(mark)
    while at >= 0:
        if at not in places:
            text = text[:at] + HIDDEN + text[at + 1 :]
        at = text.find(mark, at + 1)
    return text


def revealed(value: Any, marks: Sequence[str]) -> Any:
    """Return a value with the hidden marks in its texts put back."""
    if isinstance(value, str):
        for mark in marks:
            value = value.replace(HIDDEN + mark[1:], mark)
        return value
    if isinstance(value, dict):
        return {revealed(key, marks): revealed(item, marks) for key, item in value.items()}
    return [revealed(item, marks) for item in value] if isinstance(value, list) else value


def reveal(turn: TurnText, marks: Sequence[str]) -> TurnText:
    """Put the hidden marks back into the parts of a turn, and return it."""
    if marks:
        turn.reasoning, turn.content = revealed(turn.reasoning, marks), revealed(turn.content, marks)
        turn.calls = revealed(turn.calls, marks)
    return turn
