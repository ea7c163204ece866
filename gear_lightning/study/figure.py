"""Figure of a comparison, and the HTML page that contains it."""

import html
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import printable
from ..runs.files import replace_file, replace_text
from .runs import AXES, Arm, Run
from .statistics import bootstrap_interval, on_grid
from .tables import Table

# Okabe and Ito's colors, distinguishable with color blindness, ordered by their contrast on white and on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LINES, MARKERS = ("-", "--", ":"), ("o", "s", "^", "D", "v", "P")  # these distinguish further arms
INK = "#1b2631"  # the page replaces it by its text color
PLACES = 200  # maximum number of points of a band
STYLE: Any = {
    "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "text.parse_math": False, "svg.hashsalt": "gear_lightning", "svg.fonttype": "path",
}  # fmt: skip
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ max-width: 68rem; margin: 2rem auto; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif;
  background: #fff; color: #1b2631 }}
h1 {{ font-size: 1.4rem }} h2 {{ font-size: 1.05rem; margin-top: 2rem }}
svg {{ width: 100%; height: auto }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ text-align: right; padding: .25rem .8rem; white-space: nowrap; border-bottom: 1px solid #8886 }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0 }}
p {{ margin: .5rem 0; max-width: 60rem }}
@media (prefers-color-scheme: dark) {{ body {{ background: #14181d; color: #dfe4ea }} }}
</style></head><body>
<h1>{title}</h1>
{figure}
{tables}
</body></html>
"""


def write_figure(path: Path, arms: list[Arm], metric: str) -> None:
    """Write the figure as ``.png`` or ``.svg`` on a white background."""
    content = BytesIO()
    kind = path.suffix[1:]
    _draw(arms, metric, content, kind, facecolor="white")
    replace_file(path, lambda file: file.write(content.getvalue()))


def write_page(path: Path, arms: list[Arm], metric: str, tables: list[Table]) -> None:
    """Write one HTML page with the figure and the tables. The page loads no resources and runs no scripts."""
    content = BytesIO()
    _draw(arms, metric, content, "svg", transparent=True)
    _, start, figure = content.getvalue().decode().partition("<svg")
    title = html.escape(printable(f"{metric}: {', '.join(arm.name for arm in arms)}"))
    label = f'{start} role="img" aria-label="{html.escape(printable(metric), quote=True)} of each arm"'
    figure = label + figure.replace(INK, "currentColor")
    replace_text(path, PAGE.format(title=title, figure=figure, tables="\n".join(map(_html_table, tables))))


def _html_table(table: Table) -> str:
    out = StringIO()
    cell = lambda kind, text: f"<{kind}>{html.escape(printable(text))}</{kind}>"  # noqa: E731
    out.write(f'<h2>{html.escape(table.title)}</h2>\n<div class="wide"><table>\n')
    out.write("<tr>" + "".join(cell("th", name) for name in table.columns) + "</tr>\n")
    out.writelines("<tr>" + "".join(cell("td", text) for text in row) + "</tr>\n" for row in table.rows)
    out.write("</table></div>\n")
    out.writelines(f"<p>{html.escape(printable(note))}</p>\n" for note in table.notes)
    return out.getvalue()


# -- drawing ----------------------------------------------------------------------------------------------------------


def _draw(arms: list[Arm], metric: str, out: BytesIO, kind: str, **options: Any) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    known = [over for over in AXES if all(run.curve(metric, over) is not None for arm in arms for run in arm.runs)]
    columns = min(2, len(known))
    rows = -(-len(known) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 0.6 + 3.1 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for place, axes in enumerate(grid.flat):
            if place < len(known):
                _panel(axes, arms, metric, known[place], show_unit=place % columns == 0)
            else:
                axes.set_axis_off()
        figure.text(0.0, -0.01, _caption(arms), fontsize=8, va="top", alpha=0.75)
        if kind == "svg":  # without the date, and without the URLs of vocabularies
            options["metadata"] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format=kind, dpi=150, bbox_inches="tight", pad_inches=0.15, **options)


def _caption(arms: list[Arm]) -> str:
    most = max(len(arm.by_seed()) for arm in arms)
    if most == 1:
        return "One seed per arm: the effect of chance cannot be estimated."
    told = "Lines: mean over the seeds; thin lines: runs"
    return f"{told}." if most == 2 else f"{told}; bands: 95 % bootstrap interval of the mean, for three or more seeds."


def _panel(axes: Any, arms: list[Arm], metric: str, over: str, *, show_unit: bool) -> None:
    from matplotlib.ticker import EngFormatter

    unit, name = _unit(arms, metric, over)
    ends = []
    for number, arm in enumerate(arms):
        colour = COLOURS[number % len(COLOURS)]
        line = LINES[number // len(COLOURS) % len(LINES)]
        seeds = list(arm.by_seed().values())
        curves = [_curve(run, metric, over) for runs in seeds for run in runs]
        x = _grid(curves)
        values = np.array([np.mean([on_grid(*_curve(run, metric, over), x) for run in runs], axis=0) for runs in seeds])
        mean = values.mean(0)
        if len(curves) > 1:
            for places, heights in curves:
                axes.plot(places / unit, heights, line, color=colour, linewidth=0.7, alpha=0.4)
        if len(seeds) > 2:
            low, high = bootstrap_interval(values[None])
            axes.fill_between(x / unit, low, high, color=colour, alpha=0.2, linewidth=0)
        marks = {"marker": MARKERS[number % len(MARKERS)], "markersize": 4, "markevery": 0.1}
        axes.plot(x / unit, mean, line, color=colour, linewidth=1.8, **marks)
        ends.append((x[-1] / unit, mean[-1], colour, arm.name))
    axes.set_xlabel(name)
    axes.set_ylabel(metric if show_unit else "")
    axes.set_xlim(left=0)
    if axes.get_xlim()[1] > 2000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k
    if metric.endswith("success"):
        axes.set_ylim(-0.02, 1.02)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, ends)


def _label(axes: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Write the names at the right edge, as near to the ends of their lines as possible, with a connector."""
    low, high = axes.get_ylim()
    line = {"arrowstyle": "-", "linewidth": 1, "linestyle": ":", "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2}
    wanted = [(height - low) / (high - low) for _, height, _, _ in ends]
    gap = min(0.085, 1 / max(len(ends), 1))
    for (x, y, colour, name), place in zip(ends, _spread(wanted, gap), strict=True):
        short = printable(name if len(name) <= 28 else f"{name[:27]}…")
        axes.annotate(
            short,
            (x, y),
            (1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            annotation_clip=False,
            arrowprops={**line, "color": colour},
        )


def _spread(wanted: list[float], gap: float) -> list[float]:
    """Return heights at least ``gap`` apart, in the same order, as near to the wanted ones as possible.

    Uses least squares by pooling neighbors. The heights lie within 0 and 1 if they fit.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[tuple[float, int]] = []  # mean height of the first of neighbors that touch, and their number
    for rank, here in enumerate(order):
        mean, size = wanted[here] - rank * gap, 1
        while blocks and blocks[-1][0] >= mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    heights = [mean for mean, size in blocks for _ in range(size)]
    room = 1 - (len(order) - 1) * gap  # space left to move all of them
    placed = list(wanted)
    for rank, here in enumerate(order):
        placed[here] = min(max(heights[rank], 0.0), max(room, 0.0)) + rank * gap
    return placed


def _unit(arms: list[Arm], metric: str, over: str) -> tuple[float, str]:
    """Return the divisor of the x values, and the name of the axis."""
    longest = max(_curve(run, metric, over)[0][-1] for arm in arms for run in arm.runs)
    if over == "seconds":
        unit, name = (3600, "hours") if longest > 7200 else (60, "minutes") if longest > 300 else (1, "seconds")
        return float(unit), f"{name} of rollouts and updates"
    return 1.0, "sampled tokens" if over == "tokens" else over


def _curve(run: Run, metric: str, over: str) -> tuple[np.ndarray, np.ndarray]:
    curve = run.curve(metric, over)
    assert curve is not None
    return curve


def _grid(curves: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the x values at which all curves are defined; evenly spaced ones if there are too many."""
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    places = np.unique(np.concatenate([x for x, _ in curves]))
    places = places[(places >= low) & (places <= high)]
    return places if len(places) <= PLACES else np.linspace(low, high, PLACES)
