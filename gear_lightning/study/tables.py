"""Tables of a comparison."""

import math
from dataclasses import dataclass, field

from ..recipes.rule_options import caveat
from .numbers import Contrast, Interval, Measure, Summary
from .runs import Arm


@dataclass(frozen=True)
class Table:
    """Text in rows and columns, for the terminal and for the page."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def summary_table(found: list[Summary], what: Measure) -> Table:
    """Return the table with one row for each arm."""
    columns = ["arm", "runs", "seeds", "mean over the curve", "final"]
    columns += [] if what.threshold is None else [f"{what.over} to {what.threshold:g}"]
    judged = what.metric.endswith("success")
    columns += ["collapsed"] if judged else []
    rows = []
    for one in found:
        runs = len(one.arm.runs)
        row = [one.arm.name, str(runs), str(len(one.arm.by_seed()))]
        row += [_with(one.mean, one.mean_interval), _with(one.final, one.final_interval)]
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
    rules = dict.fromkeys(run.config.get("model.credit.class_path") for one in found for run in one.arm.runs)
    notes += [told for rule in rules if (told := caveat(rule))]
    return Table(f"{what.metric} by arm", columns, rows, notes)


def contrast_table(found: list[Contrast], base: Arm, what: Measure) -> Table:
    """Return the table with one row for each arm except the first."""
    columns = [f"against {base.name}", "pairs", "mean over the curve", "+/-/=", "p", "p (Holm)", "final", "P(higher)"]
    rows, notes, fewest = [], [], math.inf
    for one in found:
        if one.mean is None or one.final is None:
            rows.append([one.arm.name, "0", *["-"] * 5, f"{one.improvement:.2f}"])
            notes.append(f"{one.arm.name} and {base.name} share no seed: they are not paired.")
            continue
        test = one.mean.test
        fewest = min(fewest, one.mean.pairs)
        row = [one.arm.name, str(one.mean.pairs), _with(one.mean.mean, one.mean.interval, "+")]
        row += [f"{test.wins}/{test.losses}/{test.ties}", _p(test.p), _p(one.adjusted)]
        rows.append([*row, _with(one.final.mean, one.final.interval, "+"), f"{one.improvement:.2f}"])
    notes += [
        "Differences between runs of the same seed; in brackets Student's 95 % intervals.",
        "+/-/=: number of differences above, below and at zero.",
        "p: exact sign test on the mean over the curve; Holm: corrected for the number of rows.",
        "P(higher): probability that a seed of this arm has the higher mean over the curve.",
    ]
    if fewest < 6:
        notes.append(f"With {fewest} pair{'s' * (fewest > 1)} p cannot be below {_p(min(1.0, 2.0 ** (1 - fewest)))}.")
    return Table(f"{what.metric}, paired by seed", columns, rows, notes)


def difference_table(arms: list[Arm]) -> Table | None:
    """Return the table of options that differ between the arms; None if there are none."""
    keys = list(dict.fromkeys(key for arm in arms for key in arm.differs))
    if not keys:
        return None
    rows = [[arm.name, *(arm.differs[key] for key in keys)] for arm in arms]
    note = "Options that belong to a class, and those that do not affect training, are omitted."
    return Table("Options that differ between the arms", ["arm", *keys], rows, [note])


def _with(value: float, interval: Interval, sign: str = "") -> str:
    text = f"{value:{sign}{_form(value)}}"
    return text if interval is None else f"{text} [{', '.join(f'{x:{sign}{_form(value)}}' for x in interval)}]"


def _form(value: float) -> str:
    return ".3f" if abs(value) < 100 else ".4g"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:g}"


def _p(p: float | None) -> str:
    return "-" if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"
