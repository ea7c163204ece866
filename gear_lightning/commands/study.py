"""``gear-lightning study``: plan, carry out, compare."""

import json
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ..errors import UserError, require_extra
from ..runs.files import hold, replace_text
from ..study.plan import Run, Study

PLAN = "study.json"


def study_command(argv: list[str]) -> int:
    """Carry out a study, or go on with it, and compare its arms.

    Args:
        argv: the arguments after ``study``.

    Returns:
        0; 1 where runs failed; 130 where it was asked to stop.

    Raises:
        UserError: a plan that cannot be carried out, a folder of another study, or nothing to compare yet.
    """
    from jsonargparse import ActionYesNo, ArgumentParser

    parser = ArgumentParser(prog="gear-lightning study", description="Compare arms of a recipe over seeds.")
    parser.add_argument("--config", action="config", help="The study as a file; options after it replace its own.")
    parser.add_class_arguments(Study, None)
    for name, what in (
        ("--report_only", "Compare the runs that are done; start none. Of another --metric: in a folder of its name."),
        ("--plan", "Print the command of every run and start none."),
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
            print("gear-lightning " + " ".join(_quoted(argument) for argument in run.arguments))
        return 0
    from ..study.runner import is_done  # not above: the plan alone needs none of these imports

    failed = [] if only else _carry_out(study)
    if failed is None:
        return 130
    for run in failed:
        print(f"failed: {run} ({run.folder / 'log.txt'})", flush=True)
    _report(study, [run for run in study.runs if is_done(run)], _place(study))
    return 1 if failed else 0


def _carry_out(study: Study) -> list[Run] | None:
    """Do what is not done. Returns the runs that failed; None where it was asked to stop."""
    from ..study.results import check_run
    from ..study.runner import carry_out, is_done

    out = Path(study.out)
    done = [run for run in study.runs if is_done(run)]
    for run in done[:1]:
        check_run(study, run)
    try:
        out.mkdir(parents=True, exist_ok=True)
        busy = f"out={study.out}: another study is at work there; wait for it, or give another --out"
        lock = hold(out / ".lock", busy)
        replace_text(out / PLAN, json.dumps(asdict(study), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"out={study.out} cannot be written to ({error.strerror})") from None
    jobs = study.jobs or os.cpu_count() or 1
    print(f"{len(study.runs)} runs, {len(done)} of them done; {jobs} at a time, in {out / 'runs'}", flush=True)
    try:
        return carry_out(study.runs, jobs, partial(check_run, study), partial(print, flush=True))
    except KeyboardInterrupt:
        kept = sum(is_done(run) for run in study.runs)
        print(f"\nstopped; {kept} of {len(study.runs)} runs are done, and the same command goes on with the others")
        return None
    finally:
        lock.close()


def _place(study: Study) -> Path:
    """Where a report goes: the study's folder; one in it for another metric than the study was carried out for."""
    out = Path(study.out)
    try:
        own = json.loads((out / PLAN).read_text())["metric"]
    except (OSError, ValueError, LookupError, TypeError):
        return out
    return out if own == study.metric else out / study.metric.replace("/", "_")


def _report(study: Study, done: list[Run], out: Path) -> None:
    """Compare what is done: files in a folder, and a table here."""
    from ..recipes.rule_options import caveat_of_run
    from ..study.onset import onset_of
    from ..study.report import draw, markdown, print_results
    from ..study.results import analyse, collect, write_results

    curves = collect(study, done)
    results = analyse(study, curves)
    best = {arm: study.points[place] for arm, place in results["best_point"].items()}
    try:
        results["onset"] = onset_of(run for run in done if best.get(run.arm) == run.point)
    except UserError as error:  # records alone tell it, and the comparison needs none
        results["onset"] = {}
        print(f"Where credit finds the first wrong decision is left out: {error}")
    results["caveats"] = [*dict.fromkeys(told for run in done if (told := caveat_of_run(run.folder)))]
    out.mkdir(exist_ok=True)
    write_results(study, curves, results, out)
    replace_text(out / "report.md", markdown(results))
    files = draw(curves, results, out)
    print_results(results)
    if len(curves.seeds) < study.seeds:
        print(f"{study.seeds - len(curves.seeds)} of {study.seeds} seeds are not complete and are left out.")
    if results["left_out"]:
        print(f"Arms that no seed has completed, left out: {', '.join(results['left_out'])}.")
    if results["begin_elsewhere"]:
        print(
            f"{', '.join(results['begin_elsewhere'])}: the first value is not that of {study.baseline}; more than the "
            "arm differs (another warm start: the policy, the demonstrations or what the teacher is shown)."
        )
    print("  ".join(str(path) for path in [out / "results.json", out / "curves.csv", out / "report.md", *files]))


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)
