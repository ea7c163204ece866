"""`gear-lightning compare RUN RUN ...`: compare learning curves and numbers of runs."""

import glob
import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UserError, printable, require_extra
from ..runs.files import replace_text
from ..study.comparison import draw, tables, write_page
from ..study.figure import write_figure
from ..study.numbers import Measure, measure
from ..study.runs import Arm, check_metric, check_tasks, make_arms, read_run
from ..study.tables import Table, csv_text, markdown, print_tables
from . import parsers

KINDS = (".html", ".png", ".svg", ".csv", ".md")


def compare_command(argv: list[str]) -> int:
    """Run ``gear-lightning compare``: print the tables, and write the page, the figure, the numbers or the tables.

    Args:
        argv: the arguments after ``compare``.

    Returns:
        The exit status.

    Raises:
        UserError: runs cannot be read or compared, or options contradict each other.
    """
    options = parsers.compare().parse_args(argv)
    for out in options.out or []:
        if out.suffix not in KINDS:
            raise UserError(f"--out {out}: its name must end in {', '.join(KINDS)}")
        if not out.parent.is_dir():
            raise UserError(f"{out}: the folder {out.parent} does not exist")
    if options.threshold is not None and not math.isfinite(options.threshold):
        raise UserError(f"--threshold {options.threshold}: must be a finite number")
    require_extra("scipy")
    require_extra("matplotlib")
    missing = [path for path in options.runs if options.names and not path.is_dir()]
    if missing:
        raise UserError(f"{missing[0]}: no such directory; --names takes comma-separated names: --names A,B")
    paths, groups = _paths(options.runs, options.group or [])
    runs = [read_run(path) for path in paths]
    check_metric(runs, options.metric)
    if not options.allow_different_tasks:
        check_tasks(runs)
    arms = _named(make_arms(runs, groups), options.names)
    threshold = options.threshold
    if threshold is None and options.metric.endswith("success"):
        threshold = 0.8
    what = measure(runs, options.metric, options.over, threshold)
    found = tables(arms, what)
    print_tables(found)
    for out in options.out or [paths[0].resolve().parent / "compare.html"]:
        _write(out, arms, what, found)
        print(f"Written: {printable(str(out))}")
    return 0


def _paths(given: list[Path], groups: list[str]) -> tuple[list[Path], dict[Path, str]]:
    """Return the run directories in order, groups first, and the labels of those in a group."""
    labels: dict[Path, str] = {}
    for group in groups:
        label, equals, pattern = group.partition("=")
        if not (label and equals and pattern):
            raise UserError(f"--group {group}: must be LABEL=GLOB, in quotes: 'GRPO=runs/grpo_*'")
        found = sorted(Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True))
        found = [path for path in found if path.is_dir()]
        if not found:
            raise UserError(f"--group {group}: no directory matches {pattern}")
        for path in found:
            if labels.setdefault(path, label) != label:
                raise UserError(f"{path} is in two groups, {labels[path]} and {label}")
    grouped = {path.resolve() for path in labels}
    paths = [*labels, *(path for path in given if path.resolve() not in grouped)]
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise UserError(f"{path} is given twice")
        seen.add(path.resolve())
    if len(paths) < 2:
        raise UserError(f"{len(paths)} run{'s' * (not paths)} given: give two or more run directories")
    return paths, labels


def _named(arms: list[Arm], names: list[str] | None) -> list[Arm]:
    if names is None:
        return arms
    if len(names) != len(arms) or len(set(names)) < len(names) or "" in names:
        there = "; ".join(f"{arm.name} ({', '.join(str(run.path) for run in arm.runs)})" for arm in arms)
        raise UserError(f"--names: give {len(arms)} different comma-separated names, for the arms {there}")
    return [replace(arm, name=name) for arm, name in zip(arms, names, strict=True)]


def _write(out: Path, arms: list[Arm], what: Measure, found: list[Table]) -> None:
    try:
        if out.suffix == ".html":
            write_page(out, arms, what.metric, found)
        elif out.suffix in (".csv", ".md"):
            replace_text(out, _rows(arms, what) if out.suffix == ".csv" else markdown(found))
        else:
            write_figure(out, partial(draw, arms, what.metric))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error})") from None


def _rows(arms: list[Arm], what: Measure) -> str:
    """Return the numbers as CSV with one row per run, for further analysis."""
    rows: list[list[Any]] = [["arm", "run", "seed", "mean_over_curve", "final", f"{what.over}_to_threshold"]]
    for arm in arms:
        for seed, run in zip(arm.seeds, arm.runs, strict=True):
            place = "" if math.isinf(reached := what.reached(run)) else reached
            rows.append([arm.name, run.path, seed, what.mean(run), what.final(run), place])
    return csv_text(rows)
