"""Report of a study: tables for a terminal and for a document, and figures of its curves and differences."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..runs.files import replace_file
from .results import Curves
from .statistics import bootstrap_interval

# Okabe and Ito's colors: distinguishable with color blindness, and on light and dark backgrounds
COLOURS = ("#000000", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999933")
MARKERS = "osD^vP*X"


def label(results: dict[str, Any], point: int) -> str:
    """Return a point of the grid in words, with the last parts of its keys."""
    pairs = zip(results["grid"], results["points"][point], strict=True)
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in pairs) or "the recipe"


def rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the comparison over all points of the grid as a table: header and rows of text."""
    head = ["arm", "mean over the curve", f"against {results['baseline']}", "p (sign, Holm)", "wins"]
    head += ["best point, mean", "against the baseline's best", "updates to threshold", "collapsed"]
    head += ["share of the headroom", "share at the best points"] if results["headroom"] else []
    body = []
    for arm, told in results["arms"].items():
        paired, best = results["paired"].get(arm), results["best_point"][arm]
        row = [arm, _interval(told["mean"], "iqm")]
        if paired is None:
            row += ["", "", "", f"{_interval(told['points'][best]['mean'], 'iqm')} at {label(results, best)}", ""]
        else:
            test = paired["all"]["test"]
            row += [_interval(paired["all"], "mean", "+"), f"{paired['all']['holm']:.3f}"]
            row += [f"{test['wins']}:{test['losses']}"]
            row += [f"{_interval(told['points'][best]['mean'], 'iqm')} at {label(results, best)}"]
            row += [_interval(paired["best"], "mean", "+")]
        reached = told["to_threshold"]
        row += ["never" if reached is None else f"{reached:.0f}", f"{told['collapsed']:.0%}"]
        for headroom in (results["headroom"] or {}).values():
            row += ["" if paired is None else _share(headroom, arm, results["ceiling"])]
        body.append(row)
    return head, body


def _share(headroom: dict[str, Any], arm: str, ceiling: str) -> str:
    """Return an arm's gain as a share of the ceiling's gain, with Fieller's interval."""
    share, interval = headroom["shares"].get(arm), headroom["intervals"].get(arm)
    if share is None:
        return "headroom not certain" if headroom["there"] is False else "unknown"
    if interval is None or arm == ceiling:
        return f"{share:.0%}"
    return f"{share:.0%} [{interval[0]:.0%}, {interval[1]:.0%}]"


def _interval(told: dict[str, Any], key: str, sign: str = "") -> str:
    ends = "" if told["low"] is None else f" [{told['low']:{sign}.3f}, {told['high']:{sign}.3f}]"
    return f"{told[key]:{sign}.3f}{ends}"


def markdown(results: dict[str, Any]) -> str:
    """Return the comparison for a document: over all points, then point by point."""
    parts = [_table(*rows(results)), "", *(f"{told}\n" for told in results.get("caveats", ()))]
    arms = list(results["arms"])
    body = [
        [label(results, p), *(_interval(results["arms"][arm]["points"][p]["mean"], "iqm") for arm in arms)]
        for p in range(len(results["points"]))
    ]
    parts += ["Mean over the curve:", "", _table(["", *arms], body), ""]
    body = [
        [label(results, p), *(f"{results['arms'][arm]['points'][p]['collapsed']:.0%}" for arm in arms)]
        for p in range(len(results["points"]))
    ]
    parts += ["Runs that collapsed:", "", _table(["", *arms], body), ""]
    blocks = results["blocks"]
    if len(blocks["seeds"]) < results["seeds"]:
        parts += [shared_beginnings(results), ""]
        if len(blocks["seeds"]) > 1:
            body = [[arm, *(f"{gain:+.3f}" for gain in gains)] for arm, gains in blocks["gains"].items()]
            head = ["gain over all points", *(f"weights {i} ({n} seeds)" for i, n in enumerate(blocks["seeds"], 1))]
            parts += [_table(head, body), ""]
    if results.get("onset"):
        body = [
            [arm, iteration, _area(told["divergence"]), _area(told["segment"]), str(told["first_wrong"])]
            for arm, iterations in results["onset"].items()
            for iteration, told in iterations.items()
        ]
        head = ["arm", "iteration", "AUC of the divergence", "AUC of the segments", "tokens of first wrong decisions"]
        what = "First wrong decisions against the right ones before them, at the best point of each arm:"
        parts += [what, "", _table(head, body), ""]
    return "\n".join(parts)


def shared_beginnings(results: dict[str, Any]) -> str:
    """Return a sentence on the intervals of a study whose seeds share warm starts."""
    count = len(results["blocks"]["seeds"])
    what = "the same weights" if count == 1 else f"{count} sets of weights"
    return (
        f"{results['seeds']} seeds begin with {what}: intervals and p hold for other seeds, not for other initial "
        "weights."
    )


def _area(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(head: list[str], body: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def print_results(results: dict[str, Any]) -> None:
    """Print the comparison on a terminal, in its full width."""
    head, body = rows(results)
    counts = [
        f"{n} {what}{'s' * (n != 1)}" for n, what in ((results["seeds"], "seed"), (len(results["points"]), "point"))
    ]
    title = f"{results['metric']}, {counts[0]}, {counts[1]} of the grid"
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for name in head:
        table.add_column(name, overflow="fold")
    for row in body:
        table.add_row(*row)
    Console(width=max(80, shutil.get_terminal_size((170, 24)).columns)).print(table)
    for told in results.get("caveats", ()):
        print(told)
    if len(results["blocks"]["seeds"]) < results["seeds"]:
        print(shared_beginnings(results))


def draw(curves: Curves, results: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``curves.png`` and ``differences.png``; with a ceiling and a grid of several options ``headroom.png``.

    Raises:
        UserError: matplotlib is not installed.
    """
    from ..errors import require_extra

    require_extra("matplotlib")
    files = [_save(_curves(curves, results), folder / "curves.png")]
    if results["paired"]:
        files.append(_save(_differences(results), folder / "differences.png"))
    if results["headroom"] and len(results["grid"]) > 1:
        files.append(_save(_headroom(results), folder / "headroom.png"))
    return files


def _figure(count: int, columns: int = 4, height: float = 3.4) -> tuple[Any, list[Any]]:
    """Return a figure with ``count`` panels, in rows of ``columns``; ``height`` of a row in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(columns, count)
    lines = -(-count // columns)
    size = (max(4.2, 3.4 * columns), lines * height)
    figure, axes = plt.subplots(lines, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis in axes.flat[count:]:
        axis.remove()
    for axis in axes.flat[:count]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    return figure, list(axes.flat[:count])


def _curves(curves: Curves, results: dict[str, Any]) -> Any:
    columns = len({point[-1] for point in curves.points}) if len(results["grid"]) > 1 else 4
    figure, axes = _figure(len(curves.points), columns, 2.8 if len(curves.points) > columns else 3.4)
    for p, axis in enumerate(axes):
        for i, arm in enumerate(curves.arms):
            values = curves.values[i, p]
            colour = COLOURS[i % len(COLOURS)]
            axis.plot(curves.steps, values.mean(0), color=colour, marker=MARKERS[i % 8], markersize=4, label=arm)
            if len(values) > 1:
                low, high = bootstrap_interval(values[None])
                axis.fill_between(curves.steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_title(label(results, p), fontsize=9)
        axis.set_xlabel("updates")
    figure.supylabel(results["metric"], fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    return figure


def _differences(results: dict[str, Any]) -> Any:
    """Draw a forest plot: the gain of each arm over the baseline, over all points and at each of them."""
    arms = list(results["paired"])
    names = ["all", *(label(results, p) for p in range(len(results["points"])))]
    figure, axes = _figure(len(names), height=0.9 + 0.34 * len(arms))
    for column, axis in enumerate(axes):
        axis.axvline(0, color="#888888", linewidth=1)
        for place, arm in enumerate(arms):
            told = results["paired"][arm]["all"] if column == 0 else results["paired"][arm]["points"][column - 1]
            ends = None
            if told["low"] is not None:
                ends = np.array([[told["mean"] - told["low"]], [told["high"] - told["mean"]]]).clip(min=0)
            colour = COLOURS[(1 + place) % len(COLOURS)]
            axis.errorbar(told["mean"], place, xerr=ends, fmt=MARKERS[1 + place % 7], color=colour, capsize=3)
        axis.set_yticks(range(len(arms)), arms)
        axis.set_title(names[column], fontsize=9)
        axis.grid(False)
    axes[0].invert_yaxis()
    figure.supxlabel(f"mean over the curve, minus that of {results['baseline']} (paired, 95 % interval)", fontsize=9)
    return figure


def _headroom(results: dict[str, Any]) -> Any:
    """Draw a map of the ceiling's gain over the baseline: columns are the grid's last option, rows the others."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points, gains = results["points"], results["paired"][results["ceiling"]]["points"]
    columns = list(dict.fromkeys(point[-1] for point in points))
    lines = list(dict.fromkeys(tuple(point[:-1]) for point in points))
    names = [key.rpartition(".")[2] for key in results["grid"]]
    table = np.full((len(lines), len(columns)), np.nan)
    figure, axis = plt.subplots(figsize=(2.6 + 1.5 * len(columns), 1.2 + 0.6 * len(lines)), layout="constrained")
    for point, gain in zip(points, gains, strict=True):
        table[lines.index(tuple(point[:-1])), columns.index(point[-1])] = gain["mean"]
    bound = max(0.05, float(np.nanmax(np.abs(table))))
    axis.imshow(table, cmap="PuOr_r", vmin=-bound, vmax=bound, aspect="auto")
    for point, gain in zip(points, gains, strict=True):
        place = columns.index(point[-1]), lines.index(tuple(point[:-1]))
        ends = "" if gain["low"] is None else f"\n[{gain['low']:+.2f}, {gain['high']:+.2f}]"
        ink = "white" if abs(gain["mean"]) > 0.6 * bound else "black"
        axis.text(*place, f"{gain['mean']:+.3f}{ends}", ha="center", va="center", fontsize=8, color=ink)
    axis.set_xticks(range(len(columns)), [f"{column}" for column in columns])
    axis.set_xlabel(names[-1])
    told = [", ".join(f"{n} {v}" for n, v in zip(names, line, strict=False)) for line in lines]
    axis.set_yticks(range(len(lines)), told)
    axis.set_title(f"{results['ceiling']} minus {results['baseline']}, mean over the curve", fontsize=9)
    return figure


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    content = io.BytesIO()
    figure.savefig(content, dpi=140, facecolor="white", format="png")
    plt.close(figure)
    replace_file(path, lambda file: file.write(content.getvalue()))
    return path
