"""Report of a study: its tables, and figures of its curves and differences."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import require_extra
from .figure import new_figure, plot_arm, style_of, write_figure
from .results import Curves
from .tables import Table, p_value, with_interval


def label(results: dict[str, Any], point: int) -> str:
    """Return a point of the grid in words, with the last parts of its keys."""
    pairs = zip(results["grid"], results["points"][point], strict=True)
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in pairs) or "the recipe"


def tables(results: dict[str, Any]) -> list[Table]:
    """Return the comparison: over all points of the grid, and then point by point."""
    blocks, onset = results["blocks"], results.get("onset")
    found = [
        arm_table(results),
        _by_point("Mean over the curve", results, lambda told: _interval(told["mean"], "iqm")),
        _by_point("Runs that collapsed", results, lambda told: f"{told['collapsed']:.0%}"),
    ]
    if 1 < len(blocks["seeds"]) < results["seeds"]:
        head = ["arm", *(f"weights {i} ({n} seeds)" for i, n in enumerate(blocks["seeds"], 1))]
        body = [[arm, *(f"{gain:+.3f}" for gain in gains)] for arm, gains in blocks["gains"].items()]
        found.append(Table("Gain over all points, by the weights at the beginning", head, body))
    if onset:
        title = "First wrong decisions against the right ones before them, at the best point of each arm"
        head = ["arm", "iteration", "AUC of the divergence", "AUC of the segments", "tokens of first wrong decisions"]
        body = [
            [arm, iteration, _area(told["divergence"]), _area(told["segment"]), str(told["first_wrong"])]
            for arm, iterations in onset.items()
            for iteration, told in iterations.items()
        ]
        found.append(Table(title, head, body))
    return found


def arm_table(results: dict[str, Any]) -> Table:
    """Return the comparison over all points of the grid, with one row for each arm."""
    head = ["arm", "mean over the curve", f"against {results['baseline']}", "p (sign, Holm)", "wins"]
    head += ["best point, mean", "against the baseline's best", "updates to threshold", "collapsed"]
    head += ["share of the headroom", "share at the best points"] if results["headroom"] else []
    body = []
    for arm, told in results["arms"].items():
        paired, best, reached = results["paired"].get(arm), results["best_point"][arm], told["to_threshold"]
        against, against_best = ["", "", ""], ""
        if paired is not None:
            test, against_best = paired["all"]["test"], _interval(paired["best"], "mean", "+")
            against = [_interval(paired["all"], "mean", "+"), p_value(paired["all"]["holm"])]
            against += [f"{test['wins']}:{test['losses']}"]
        at_best = f"{_interval(told['points'][best]['mean'], 'iqm')} at {label(results, best)}"
        row = [arm, _interval(told["mean"], "iqm"), *against, at_best, against_best]
        row += ["never" if reached is None else f"{reached:.0f}", f"{told['collapsed']:.0%}"]
        for headroom in (results["headroom"] or {}).values():
            row += ["" if paired is None else _share(headroom, arm, results["ceiling"])]
        body.append(row)
    seeds, points = results["seeds"], len(results["points"])
    title = f"{results['metric']}, {seeds} seed{'s' * (seeds != 1)}, {points} point{'s' * (points != 1)} of the grid"
    notes = [*results.get("caveats", ())]
    if len(results["blocks"]["seeds"]) < seeds:
        notes.append(_shared_beginnings(results))
    return Table(title, head, body, notes)


def _by_point(title: str, results: dict[str, Any], cell: Callable[[dict[str, Any]], str]) -> Table:
    """Return a table with one row for each point of the grid, and one column for each arm."""
    arms, points = results["arms"], range(len(results["points"]))
    body = [[label(results, p), *(cell(told["points"][p]) for told in arms.values())] for p in points]
    return Table(title, ["", *arms], body)


def _share(headroom: dict[str, Any], arm: str, ceiling: str) -> str:
    """Return an arm's gain as a share of the ceiling's gain, with Fieller's interval."""
    share, interval = headroom["shares"].get(arm), headroom["intervals"].get(arm)
    if share is None:
        return "headroom not certain" if headroom["there"] is False else "unknown"
    if interval is None or arm == ceiling:
        return f"{share:.0%}"
    return f"{share:.0%} [{interval[0]:.0%}, {interval[1]:.0%}]"


def _interval(told: dict[str, Any], key: str, sign: str = "") -> str:
    return with_interval(told[key], None if told["low"] is None else (told["low"], told["high"]), sign)


def _shared_beginnings(results: dict[str, Any]) -> str:
    """Return a sentence on the intervals of a study whose seeds share warm starts."""
    count = len(results["blocks"]["seeds"])
    what = "the same weights" if count == 1 else f"{count} sets of weights"
    return (
        f"{results['seeds']} seeds begin with {what}: intervals and p hold for other seeds, not for other initial "
        "weights."
    )


def _area(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# -- figures ----------------------------------------------------------------------------------------------------------


def draw(curves: Curves, results: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``curves.png`` and ``differences.png``; with a ceiling and a grid of several options ``headroom.png``.

    Raises:
        UserError: matplotlib is not installed.
    """
    require_extra("matplotlib")
    files = [write_figure(folder / "curves.png", partial(_curves, curves, results))]
    if results["paired"]:
        files.append(write_figure(folder / "differences.png", partial(_differences, results)))
    if results["headroom"] and len(results["grid"]) > 1:
        files.append(write_figure(folder / "headroom.png", partial(_headroom, results)))
    return files


def _curves(curves: Curves, results: dict[str, Any]) -> Any:
    columns = len({point[-1] for point in curves.points}) if len(results["grid"]) > 1 else 4
    figure, axes = new_figure(len(curves.points), columns, 3.4, 2.8 if len(curves.points) > columns else 3.4)
    for p, axis in enumerate(axes):
        for i, arm in enumerate(curves.arms):
            plot_arm(axis, curves.steps, curves.values[i, p], i, arm)
        axis.set_title(label(results, p), fontsize=9)
        axis.set_xlabel("updates")
    figure.supylabel(results["metric"], fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    return figure


def _differences(results: dict[str, Any]) -> Any:
    """Draw a forest plot: the gain of each arm over the baseline, over all points and at each of them."""
    arms = list(results["paired"])
    names = ["all", *(label(results, p) for p in range(len(results["points"])))]
    figure, axes = new_figure(len(names), 4, 3.4, 0.9 + 0.34 * len(arms))
    for column, axis in enumerate(axes):
        axis.axvline(0, color="#888888", linewidth=1)
        for place, arm in enumerate(arms):
            told = results["paired"][arm]["all"] if column == 0 else results["paired"][arm]["points"][column - 1]
            ends = None
            if told["low"] is not None:
                ends = np.array([[told["mean"] - told["low"]], [told["high"] - told["mean"]]]).clip(min=0)
            style = {**style_of(list(results["arms"]).index(arm)), "linestyle": "none"}
            axis.errorbar(told["mean"], place, xerr=ends, capsize=3, **style)
        axis.set_yticks(range(len(arms)), arms)
        axis.set_title(names[column], fontsize=9)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(False)
    axes[0].invert_yaxis()
    figure.supxlabel(f"mean over the curve, minus that of {results['baseline']} (paired, 95 % interval)", fontsize=9)
    return figure


def _headroom(results: dict[str, Any]) -> Any:
    """Draw a map of the ceiling's gain over the baseline: columns are the grid's last option, rows the others."""
    from matplotlib.figure import Figure

    points, gains = results["points"], results["paired"][results["ceiling"]]["points"]
    columns = list(dict.fromkeys(point[-1] for point in points))
    lines = [point[:-1] for point in points[:: len(columns)]]
    names = [key.rpartition(".")[2] for key in results["grid"]]
    table = np.reshape([gain["mean"] for gain in gains], (len(lines), len(columns)))
    figure = Figure(figsize=(2.6 + 1.5 * len(columns), 1.2 + 0.6 * len(lines)), layout="constrained")
    axis = figure.subplots()
    bound = max(0.05, float(np.abs(table).max()))
    axis.imshow(table, cmap="PuOr_r", vmin=-bound, vmax=bound, aspect="auto")
    for place, gain in enumerate(gains):
        row, column = divmod(place, len(columns))
        ends = "" if gain["low"] is None else f"\n[{gain['low']:+.2f}, {gain['high']:+.2f}]"
        ink = "white" if abs(gain["mean"]) > 0.6 * bound else "black"
        axis.text(column, row, f"{gain['mean']:+.3f}{ends}", ha="center", va="center", fontsize=8, color=ink)
    axis.set_xticks(range(len(columns)), [f"{column}" for column in columns])
    axis.set_xlabel(names[-1])
    told = [", ".join(f"{n} {v}" for n, v in zip(names, line, strict=False)) for line in lines]
    axis.set_yticks(range(len(lines)), told)
    axis.set_title(f"{results['ceiling']} minus {results['baseline']}, mean over the curve", fontsize=9)
    return figure
