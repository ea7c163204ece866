"""Splits sorted rollouts into micro-batches so that the largest padded micro-batch is as small as possible."""

from collections.abc import Sequence

import numpy as np


def balanced_split(lengths: Sequence[Sequence[int]], parts: int) -> list[range]:
    """Split rows into contiguous parts so that the largest padded size is minimal.

    A part is padded to its longest row in each view, so its size is ``rows x sum over views of the longest``. Among the
    splits with the smallest maximum, one with the smallest sum of sizes (the least padding) is chosen. Ties are broken
    deterministically.

    Args:
        lengths: number of tokens of each row in each view (policy, teacher); rows of similar length should be adjacent.
        parts: number of parts; at least 1.

    Returns:
        One range of rows for each part, in order. If there are fewer rows than parts, the last ranges are empty.

    Raises:
        ValueError: ``parts`` is below 1.
    """
    if parts < 1:
        raise ValueError(f"parts={parts}: must be at least 1")
    rows, filled = len(lengths), min(parts, len(lengths))
    blank = [range(rows, rows)] * (parts - filled)
    if filled <= 1:
        return [range(rows)] * filled + blank
    views = np.array(lengths, dtype=np.int64)
    limit = _smallest_limit(views, filled)
    # least[end]: smallest sum of sizes of the rows before `end`, split into the current number of parts. More parts
    # never increase it, because splitting a part adds no padding. So all parts can be filled.
    sizes = _sizes(views, limit)
    least = np.append(0, np.full(rows, _NEVER))
    choices = []
    for _ in range(filled):
        best, width = np.full(rows + 1, _NEVER), np.zeros(rows + 1, dtype=np.int64)
        for rows_in_last, size in enumerate(sizes, 1):
            total = least[:-rows_in_last] + size
            better = total < best[rows_in_last:]
            best[rows_in_last:][better] = total[better]
            width[rows_in_last:][better] = rows_in_last
        least = best
        choices.append(width)
    cuts, end = [], rows
    for width in reversed(choices):
        start = end - int(width[end])
        cuts.append(range(start, end))
        end = start
    return cuts[::-1] + blank


_NEVER = np.int64(1) << 60


def _smallest_limit(views: np.ndarray, parts: int) -> int:
    """Return the smallest size limit with which ``parts`` parts suffice. The size of a part grows with every row, so
    filling parts greedily up to a limit uses the fewest parts."""
    rows = views.tolist()

    def fits(limit: int) -> bool:
        used, count, longest = 1, 0, [0] * len(rows[0])
        for row in rows:
            count, longest = count + 1, list(map(max, longest, row))
            if count * sum(longest) > limit:
                used, count, longest = used + 1, 1, row
        return used <= parts

    low, high = int(views.sum(1).max()), len(rows) * int(views.max(0).sum())
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def _sizes(views: np.ndarray, limit: int) -> list[np.ndarray]:
    """Return the sizes of all parts of 1, 2, ... rows, by their first row; `_NEVER` if above the limit. Stop at the
    number of rows from which on all are above."""
    found, longest = [], views
    while True:
        count = len(found) + 1
        size = count * longest.sum(1)
        if not (size <= limit).any():
            return found
        found.append(np.where(size <= limit, size, _NEVER))
        if count == len(views):
            return found
        longest = np.maximum(longest[:-1], views[count:])
