"""Tables, figure and HTML page of a comparison of run directories."""

import html
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, printable
from ..recipes.rule_options import caveat
from ..runs.files import replace_text
from .axes import AXES
from .figure import INK, label_ends, new_figure, plot_arm, render
from .numbers import Measure, contrasts, summarise
from .runs import Arm
from .statistics import on_grid
from .tables import Table, p_value, to_html, with_interval

PLACES = 200  # maximum number of points of a band
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


def tables(arms: list[Arm], what: Measure) -> list[Table]:
    """Return the numbers of the arms, their differences from the first one, and the options that differ."""
    found = [summary_table(arms, what)]
    found += [contrast_table(arms, what)] if len(arms) > 1 else []
    return [*found, difference_table(arms)] if any(arm.differs for arm in arms) else found


def summary_table(arms: list[Arm], what: Measure) -> Table:
    """Return the table with one row for each arm."""
    columns = ["arm", "runs", "seeds", "mean over the curve", "final"]
    columns += [] if what.threshold is None else [f"{what.over} to {what.threshold:g}"]
    judged = what.metric.endswith("success")
    columns += ["collapsed"] if judged else []
    rows = []
    for arm in arms:
        one, runs = summarise(arm, what), len(arm.runs)
        row = [arm.name, str(runs), str(len(arm.by_seed()))]
        row += [with_interval(one.mean, one.mean_interval), with_interval(one.final, one.final_interval)]
        if one.reached is not None:
            many = "" if runs == 1 else f" ({one.runs_reached} of {runs})"
            row.append(("never" if math.isinf(one.reached) else _count(one.reached)) + many)
        rows.append([*row, f"{one.collapsed * runs:.0f} of {runs}"] if judged else row)
    stretch = f"from {_count(what.low)} to {_count(what.high)} {what.over}, which all runs have"
    told = f"Mean over the curve: height of the curve {stretch}; mean over the seeds. Final: value at the end of that, "
    notes = [
        told + "interquartile mean over the seeds. In brackets: 95 % bootstrap intervals, too narrow below ten seeds."
    ]
    if what.threshold is not None:
        notes.append(
            f"{what.over.capitalize()} to {what.threshold:g}: first measurement at or above it, median over the runs "
            "(and the number of runs that reached it)."
        )
    notes += ["Collapsed: below half of its best value at the end."] if judged else []
    ends = {run.path: run.curve(what.metric, what.over)[0][-1] for arm in arms for run in arm.runs}
    if what.over == "iterations" and max(ends.values()) > 1.05 * what.high:
        short = f"{min(ends, key=lambda path: ends[path])} ends at iteration {what.high:g}"
        notes.append(
            f"Warning: {short}, others continue to {max(ends.values()):g}; the tables only use the first part."
        )
    rules = dict.fromkeys(run.config.get("model.credit.class_path") for arm in arms for run in arm.runs)
    notes += [told for rule in rules if (told := caveat(rule))]
    return Table(f"{what.metric} by arm", columns, rows, notes)


def contrast_table(arms: list[Arm], what: Measure) -> Table:
    """Return the table with one row for each arm except the first."""
    base = arms[0]
    columns = [f"against {base.name}", "pairs", "mean over the curve", "+/-/=", "p", "p (Holm)", "final", "P(higher)"]
    rows, notes, fewest = [], [], math.inf
    for one in contrasts(arms, what):
        if one.mean is None or one.final is None:
            rows.append([one.arm.name, "0", *["-"] * 5, f"{one.improvement:.2f}"])
            notes.append(f"{one.arm.name} and {base.name} share no seed: they are not paired.")
            continue
        test = one.mean.test
        fewest = min(fewest, one.mean.pairs)
        row = [one.arm.name, str(one.mean.pairs), with_interval(one.mean.mean, one.mean.interval, "+")]
        row += [f"{test.wins}/{test.losses}/{test.ties}", p_value(test.p), p_value(one.mean.holm)]
        rows.append([*row, with_interval(one.final.mean, one.final.interval, "+"), f"{one.improvement:.2f}"])
    notes += [
        "Differences between runs of the same seed; in brackets Student's 95 % intervals.",
        "+/-/=: number of differences above, below and at zero.",
        "p: exact sign test on the mean over the curve; Holm: corrected for the number of rows.",
        "P(higher): probability that a seed of this arm has the higher mean over the curve.",
    ]
    if fewest < 6:
        notes.append(
            f"With {fewest} pair{'s' * (fewest > 1)} p cannot be below {p_value(min(1.0, 2.0 ** (1 - fewest)))}."
        )
    return Table(f"{what.metric}, paired by seed", columns, rows, notes)


def difference_table(arms: list[Arm]) -> Table:
    """Return the table of options that differ between the arms."""
    keys = list(dict.fromkeys(key for arm in arms for key in arm.differs))
    rows = [[arm.name, *(arm.differs[key] for key in keys)] for arm in arms]
    note = "Options that belong to a class, and those that do not affect training, are omitted."
    return Table("Options that differ between the arms", ["arm", *keys], rows, [note])


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:g}"


# -- figure and page --------------------------------------------------------------------------------------------------


def write_page(path: Path, arms: list[Arm], metric: str, found: list[Table]) -> None:
    """Write one HTML page with the figure and the tables. The page loads no resources and runs no scripts."""
    _, start, figure = render(partial(draw, arms, metric), "svg", transparent=True).decode().partition("<svg")
    title = html.escape(printable(f"{metric}: {', '.join(arm.name for arm in arms)}"))
    label = f'{start} role="img" aria-label="{html.escape(printable(metric), quote=True)} of each arm"'
    figure = label + figure.replace(INK, "currentColor")
    replace_text(path, PAGE.format(title=title, figure=figure, tables=to_html(found)))


def draw(arms: list[Arm], metric: str) -> Any:
    """Return the figure with one panel for each axis that all runs have logged."""
    known = [over for over in AXES if _is_logged(arms, metric, over)]
    figure, panels = new_figure(len(known), columns=2, width=5, height=3.4)
    for place, (axes, over) in enumerate(zip(panels, known, strict=True)):
        _panel(axes, arms, metric, over)
        axes.set_ylabel("" if place % 2 else metric)
    figure.text(0.0, -0.01, _caption(arms), fontsize=8, va="top", alpha=0.75)
    return figure


def _is_logged(arms: list[Arm], metric: str, over: str) -> bool:
    try:
        return all(len(run.curve(metric, over)) for arm in arms for run in arm.runs)
    except UserError:
        return False


def _caption(arms: list[Arm]) -> str:
    most = max(len(arm.by_seed()) for arm in arms)
    if most == 1:
        return "One seed per arm: the effect of chance cannot be estimated."
    told = "Lines: mean over the seeds; thin lines: runs"
    return f"{told}." if most == 2 else f"{told}; bands: 95 % bootstrap interval of the mean, for three or more seeds."


def _panel(axes: Any, arms: list[Arm], metric: str, over: str) -> None:
    from matplotlib.ticker import EngFormatter

    unit, name = _unit(arms, metric, over)
    lines = []
    for number, arm in enumerate(arms):
        x = _grid([run.curve(metric, over)[0] for run in arm.runs])
        curves = [[run.curve(metric, over) for run in runs] for runs in arm.by_seed().values()]
        values = np.array([np.mean([on_grid(*curve, x) for curve in mine], axis=0) for mine in curves])
        line = plot_arm(axes, x / unit, values, number, arm.name)
        for places, heights in (curve for mine in curves for curve in mine if len(arm.runs) > 1):
            axes.plot(places / unit, heights, line.get_linestyle(), color=line.get_color(), linewidth=0.7, alpha=0.4)
        lines.append(line)
    axes.set_xlabel(name)
    axes.set_xlim(left=0)
    if axes.get_xlim()[1] > 2000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k
    if metric.endswith("success"):
        axes.set_ylim(-0.02, 1.02)
    label_ends(axes, lines)


def _unit(arms: list[Arm], metric: str, over: str) -> tuple[float, str]:
    """Return the divisor of the x values, and the name of the axis."""
    longest = max(run.curve(metric, over)[0][-1] for arm in arms for run in arm.runs)
    if over == "seconds":
        unit, name = (3600, "hours") if longest > 7200 else (60, "minutes") if longest > 300 else (1, "seconds")
        return float(unit), f"{name} of rollouts and updates"
    return 1.0, "sampled tokens" if over == "tokens" else over


def _grid(curves: list[np.ndarray]) -> np.ndarray:
    """Return the x values at which all curves are defined; evenly spaced ones if there are too many."""
    low, high = max(x[0] for x in curves), min(x[-1] for x in curves)
    places = np.unique(np.concatenate(curves))
    places = places[(places >= low) & (places <= high)]
    return places if len(places) <= PLACES else np.linspace(low, high, PLACES)
