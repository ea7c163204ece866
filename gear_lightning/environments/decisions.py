"""Which tokens of a turn hold the decisions that an environment judged."""

import itertools
import re
from typing import Any


def decision_marks(pieces: list[str], decisions: list[dict[str, Any]]) -> list[int]:
    """1 on the tokens of right decisions, -1 on those of wrong ones, 0 elsewhere.

    Args:
        pieces: text of each token of the turn.
        decisions: as `base.Step` says.

    Raises:
        ValueError: the turn does not contain one of them, so that the others are in doubt too.
    """
    marks = [0] * len(pieces)
    for decision in decisions:
        where = find(pieces, decision["text"], decision["occurrence"])
        if not where:
            raise ValueError(f"step gave the decision {decision['text']!r}, which the turn does not contain")
        for place in where:
            marks[place] = 1 if decision["right"] else -1
    return marks


def find(pieces: list[str], text: str, occurrence: int) -> list[int]:
    """Places of the pieces that hold one occurrence of a text: whole pieces, or a part of all of them; none without."""
    spans = [[place] for place, piece in enumerate(pieces) if piece.strip() == text]
    if not spans:
        starts = [0, *itertools.accumulate(map(len, pieces))]
        for found in re.finditer(re.escape(text), "".join(pieces)):
            spans.append([p for p in range(len(pieces)) if starts[p] < found.end() and starts[p + 1] > found.start()])
    return spans[occurrence] if -len(spans) <= occurrence < len(spans) else []
