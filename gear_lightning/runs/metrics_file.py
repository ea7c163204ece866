"""Read ``metrics.csv`` of a run: the metrics of every logged optimizer step."""

import csv
import math
from pathlib import Path

import numpy as np

from ..errors import UserError


def read_columns(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read the columns of a metrics file.

    The last line may be incomplete. If a step was logged again, because the run resumed from an earlier checkpoint, the
    newest value counts, and earlier rows of later steps are dropped.

    Returns:
        Metric -> (optimizer steps, values), both [points], with increasing steps and finite values.

    Raises:
        UserError: the file cannot be read, holds no row, or is torn; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    whole = text if text.endswith("\n") else text[: text.rfind("\n") + 1]
    lines = csv.reader(whole.splitlines(keepends=True))
    names = next(lines, [])
    if "step" not in names:
        raise UserError(f"{path}: {'empty' if not text.strip() else 'no column named step in its first line'}")
    rows: list[tuple[int, dict[str, float]]] = []
    for cells in lines:
        where = f"{path}:{lines.line_num}"
        if len(cells) != len(names):
            raise UserError(f"{where}: {len(cells)} cells, but the table has {len(names)} columns; the file is torn")
        try:
            row = {name: float(cell) for name, cell in zip(names, cells, strict=True) if cell}
        except ValueError as error:
            raise UserError(f"{where}: {error}; the file is torn") from None
        step = row.pop("step", math.nan)
        if not (math.isfinite(step) and step >= 0 and step == int(step)):
            raise UserError(f"{where}: step is not a non-negative integer; the file is torn")
        while rows and rows[-1][0] > step:
            rows.pop()
        if rows and rows[-1][0] == step:
            row = rows.pop()[1] | row
        rows.append((int(step), row))
    if not rows:
        raise UserError(f"{path}: no rows; the run has logged nothing yet")
    found = {}
    for name in names:
        points = [(step, row[name]) for step, row in rows if math.isfinite(row.get(name, math.nan))]
        if points and name != "step":
            steps, values = zip(*points, strict=True)
            found[name] = np.array(steps, dtype=float), np.array(values)
    return found
