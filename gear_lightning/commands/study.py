"""``gear-lightning study``: plan and run a study, and compare its arms."""

import json
import os
import shlex
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ..errors import UserError, require_extra
from ..runs.files import hold, replace_text
from ..study.plan import Run, Study

PLAN = "study.json"


def study_command(argv: list[str]) -> int:
    """Run a study, or continue it, and compare its arms.

    Args:
        argv: the arguments after ``study``.

    Returns:
        The exit status: 0; 1 if runs failed; 130 if it was asked to stop.

    Raises:
        UserError: the plan is invalid, the folder belongs to another study, or there is nothing to compare yet.
    """
    from jsonargparse import ActionYesNo, ArgumentParser

    parser = ArgumentParser(prog="gear-lightning study", description="Compare arms of a recipe over seeds.")
    parser.add_argument("--config", action="config", help="Config file of the study; later options override it.")
    parser.add_class_arguments(Study, None)
    for name, what in (
        ("--report_only", "Only compare the finished runs. With another --metric, write to a folder of its name."),
        ("--plan", "Only print the command of every run."),
    ):
        parser.add_argument(name, action=ActionYesNo, nargs="?", default=False, help=what)
    given = parser.parse_args(argv)
    require_extra("scipy")
    options = given.as_dict()
    options.pop("config", None)
    only, plan = options.pop("report_only"), options.pop("plan")
    study = Study(**options)
    if plan:
        for run in study.runs:
            print("gear-lightning " + shlex.join(run.arguments))
        return 0
    from ..study.runner import is_done  # not above: --plan does not need these imports

    failed = [] if only else _carry_out(study)
    if failed is None:
        return 130
    for run in failed:
        print(f"failed: {run} ({run.folder / 'log.txt'})", flush=True)
    _report(study, [run for run in study.runs if is_done(run)], _place(study))
    return 1 if failed else 0


def _carry_out(study: Study) -> list[Run] | None:
    """Run the unfinished runs. Return those that failed; None if the study was asked to stop."""
    from ..study.results import read_curve
    from ..study.runner import carry_out, is_done

    out = Path(study.out)
    done = [run for run in study.runs if is_done(run)]
    for run in done[:1]:
        read_curve(study, run)
    try:
        out.mkdir(parents=True, exist_ok=True)
        busy = f"out={study.out}: another study is running there; wait for it, or give another --out"
        lock = hold(out / ".lock", busy)
        replace_text(out / PLAN, json.dumps(asdict(study), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"out={study.out} cannot be written to ({error.strerror})") from None
    jobs = study.jobs or os.cpu_count() or 1
    print(f"{len(study.runs)} runs, {len(done)} of them done; {jobs} at a time, in {out / 'runs'}", flush=True)
    try:
        return carry_out(study.runs, jobs, partial(read_curve, study), partial(print, flush=True))
    except KeyboardInterrupt:
        kept = sum(is_done(run) for run in study.runs)
        print(f"\nstopped; {kept} of {len(study.runs)} runs are done; the same command continues with the others")
        return None
    finally:
        lock.close()


def _place(study: Study) -> Path:
    """Return the folder of the report: the study's folder, or a subfolder if the metric is not that of the plan."""
    out = Path(study.out)
    try:
        own = json.loads((out / PLAN).read_text())["metric"]
    except (OSError, ValueError, LookupError, TypeError):
        return out
    return out if own == study.metric else out / study.metric.replace("/", "_")


def _report(study: Study, done: list[Run], out: Path) -> None:
    """Compare the finished runs: write files to a folder, and print a table."""
    from ..recipes.rule_options import caveat_of_run
    from ..study.onset import onset_of
    from ..study.report import draw, tables
    from ..study.results import analyse, collect, write_results
    from ..study.tables import markdown, print_tables

    curves = collect(study, done)
    results = analyse(study, curves)
    best = {arm: study.points[place] for arm, place in results["best_point"].items()}
    try:
        results["onset"] = onset_of(run for run in done if best.get(run.arm) == run.point)
    except UserError as error:  # this needs rollout records, the comparison does not
        results["onset"] = {}
        print(f"The analysis of the first wrong decision is left out: {error}")
    results["caveats"] = [*dict.fromkeys(text for run in done if (text := caveat_of_run(run.folder)))]
    out.mkdir(exist_ok=True)
    write_results(study, curves, results, out)
    found = tables(results)
    replace_text(out / "report.md", markdown(found))
    files = draw(curves, results, out)
    print_tables(found[:1])
    if len(curves.seeds) < study.seeds:
        print(f"{study.seeds - len(curves.seeds)} of {study.seeds} seeds are not complete and are left out.")
    if results["left_out"]:
        print(f"Left out, because no seed has completed: {', '.join(results['left_out'])}.")
    if results["begin_elsewhere"]:
        print(
            f"{', '.join(results['begin_elsewhere'])}: the first value differs from that of {study.baseline}, so the "
            "arms differ in more than their options (another warm start: the policy, the demonstrations or the text "
            "shown to the teacher)."
        )
    print("  ".join(str(path) for path in [out / "results.json", out / "curves.csv", out / "report.md", *files]))
