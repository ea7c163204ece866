"""Style of figures: colors, panels, curves with bands, labels, files."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import printable
from ..runs.files import replace_file
from .statistics import bootstrap_interval

INK = "#1b2631"  # the page of a comparison replaces it by its text color
# Okabe and Ito's colors and one more: distinguishable with color blindness, and on light and dark backgrounds
COLOURS = (INK, "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999933")
LINES, MARKERS = ("-", "--", ":"), "osD^vP*X"  # other lines distinguish further arms
STYLE: Any = {
    "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "text.parse_math": False, "svg.hashsalt": "gear_lightning", "svg.fonttype": "path",
}  # fmt: skip


def render(draw: Callable[[], Any], kind: str, **options: Any) -> bytes:
    """Return a figure as a file's content.

    Args:
        draw: returns the figure; is called with `STYLE` in effect.
        kind: ``png`` or ``svg``.
        options: of matplotlib's ``savefig``.
    """
    import matplotlib

    content = BytesIO()
    if kind == "svg":  # without the date, and without the URLs of vocabularies
        options["metadata"] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(STYLE):
        draw().savefig(content, format=kind, dpi=150, bbox_inches="tight", pad_inches=0.15, **options)
    return content.getvalue()


def write_figure(path: Path, draw: Callable[[], Any]) -> Path:
    """Write a figure as ``.png`` or ``.svg`` on a white background, see `render`. Return the path."""
    content = render(draw, path.suffix[1:], facecolor="white")
    replace_file(path, lambda file: file.write(content))
    return path


def new_figure(count: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """Return a figure and its ``count`` panels of a width and a height in inches, in rows of at most ``columns``."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(4.2, width * columns), height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    for axes in panels[:count]:
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels[:count]


def style_of(number: int) -> dict[str, Any]:
    """Return the line's properties of an arm, by its place among the arms."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number // len(COLOURS) % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4,
    }


def plot_arm(axes: Any, x: np.ndarray, values: np.ndarray, number: int, name: str) -> Any:
    """Draw the mean curve of an arm, and from three seeds on the 95 % bootstrap interval of the mean as a band.

    Args:
        axes: of the panel.
        x: [places].
        values: [seeds, places].
        number: the arm's place, see `style_of`.
        name: of the arm.

    Returns:
        The line.
    """
    (line,) = axes.plot(x, values.mean(0), linewidth=1.8, markevery=0.1, label=printable(name), **style_of(number))
    if len(values) > 2:
        axes.fill_between(x, *bootstrap_interval(values[None]), color=line.get_color(), alpha=0.15, linewidth=0)
    return line


def label_ends(axes: Any, lines: list[Any]) -> None:
    """Write the lines' names at the right edge, as near to their ends as possible, with a connector."""
    low, high = axes.get_ylim()
    wanted = [(line.get_ydata()[-1] - low) / (high - low) for line in lines]
    for line, place in zip(lines, _spread(wanted, min(0.085, 1 / len(lines))), strict=True):
        name = line.get_label()
        arrow = {"arrowstyle": "-", "linewidth": 1, "linestyle": ":", "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2}
        axes.annotate(
            name if len(name) <= 28 else f"{name[:27]}…",
            line.get_xydata()[-1],
            (1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            annotation_clip=False,
            arrowprops={**arrow, "color": line.get_color()},
        )


def _spread(wanted: list[float], gap: float) -> list[float]:
    """Return heights at least ``gap`` apart, in the same order, as near to the wanted ones as possible.

    Uses least squares. The heights lie within 0 and 1 if they fit.
    """
    from scipy.optimize import isotonic_regression

    order, gaps = np.argsort(wanted, kind="stable"), gap * np.arange(len(wanted))
    heights = isotonic_regression(np.array(wanted)[order] - gaps).x.clip(0, max(1 - gaps[-1], 0)) + gaps
    return heights[np.argsort(order)].tolist()
