"""Finds the tokens of a turn that belong to the decisions an environment judged."""

import itertools
import re
from typing import Any


def decision_marks(pieces: list[str], decisions: list[dict[str, Any]]) -> list[int]:
    """Return a mark for each token: 1 in right decisions, -1 in wrong ones, 0 elsewhere.

    Args:
        pieces: text of each token of the turn.
        decisions: as described in `base.Step`.

    Raises:
        ValueError: the turn does not contain one of the decisions, so the others may be wrong too.
    """
    marks = [0] * len(pieces)
    for decision in decisions:
        where = find(pieces, decision["text"], decision["occurrence"])
        if not where:
            raise ValueError(f"step returned the decision {decision['text']!r}, which the turn does not contain")
        for place in where:
            marks[place] = 1 if decision["right"] else -1
    return marks


def find(pieces: list[str], text: str, occurrence: int) -> list[int]:
    """Return the indices of the pieces that contain one occurrence of a text; empty if there is no such occurrence.

    Pieces that equal the text are preferred. Only if there are none, the concatenated pieces are searched.
    """
    spans = [[place] for place, piece in enumerate(pieces) if piece.strip() == text]
    if not spans:
        starts = [0, *itertools.accumulate(map(len, pieces))]
        for found in re.finditer(re.escape(text), "".join(pieces)):
            spans.append([p for p in range(len(pieces)) if starts[p] < found.end() and starts[p + 1] > found.start()])
    return spans[occurrence] if -len(spans) <= occurrence < len(spans) else []
