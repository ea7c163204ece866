"""Runs the runs of a study: several at a time, each in its own process, and no finished run twice."""

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, printable
from ..runs.files import hold, replace_text
from .plan import Run

PLAN, LOG = "run.json", "log.txt"  # options of a run, and its output
SIGNAL_CHECK_INTERVAL = 0.5  # seconds between two checks for signals
STOP_TIMEOUT = 20.0  # seconds that a run has to end after SIGTERM


def is_done(run: Run) -> bool:
    """Return whether a run has finished with the options and configuration files that it would be started with now.

    Raises:
        UserError: the run has finished with other options or files.
    """
    started, status = _read(run.folder / PLAN), _read(run.folder / "status.json")
    if status.get("phase") != "finished" or not isinstance(started.get("options"), list):
        return False
    otherwise = "use another --out, or remove that folder"
    if started["options"] != list(run.options):
        before, now = set(map(str, started["options"])), set(run.options)
        raise UserError(
            f"{run.folder} was run with {_some(before - now)}, but this study has {_some(now - before)}; {otherwise}"
        )
    if started.get("files") != (now := _digests(run)):
        before = started.get("files")
        changed = next(f for f in now if not isinstance(before, dict) or before.get(f) != now[f])
        raise UserError(f"{run.folder} was run with another version of {changed}; {otherwise}")
    return True


def _read(path: Path) -> dict[str, Any]:
    """Return a file's JSON object; empty if there is none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _digests(run: Run) -> dict[str, str]:
    """Return the digests of the content of the run's configuration files, without comments: file -> digest."""
    found = {}
    for file in run.files:
        try:
            told = os.stat(file)
            found[file] = _digest(file, told.st_mtime_ns, told.st_size)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())})") from None
    return found


@cache
def _digest(file: str, *state: int) -> str:
    """Return the digest of a file with this modification time and size, so that an edited file is read again."""
    said = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def _some(options: set[str]) -> str:
    return " ".join(sorted(options)) or "the same options in another order"


def carry_out(
    runs: list[Run], jobs: int, check: Callable[[Run], object], tell: Callable[[str], None] = print
) -> list[Run]:
    """Start the runs that are not finished, ``jobs`` at a time, and wait for them. One study at a time per folder.

    The first run of each block starts before the others of its block, which then find its warm start in the cache. A
    run that did not finish is started again, and its folder is set aside; a failed run does not affect the others. If
    there are GPUs, each run sees one of them, the one with the fewest runs.

    Args:
        runs: all runs; finished ones are skipped.
        jobs: number of parallel processes.
        check: called with each finished run before others are started; it may raise.
        tell: called with a line for each run that ends.

    Returns:
        The runs that failed.

    Raises:
        UserError: see `is_done`; an arm's recipe is invalid, and no run was started; or another process uses a run's
            folder.
        KeyboardInterrupt: a signal asked to stop; the active runs have been ended.
    """
    waiting = [run for run in runs if not is_done(run)]
    if not waiting:
        return []
    ready = {run.block for run in runs} - {run.block for run in waiting}
    started, ended, failed = time.monotonic(), 0, []
    total, left = len(runs), len(waiting)
    active: dict[Any, tuple[Run, Any, float]] = {}
    gpus = visible_gpus()
    context = start_context(gpus)
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))  # read when the child imports torch
    _check_recipes(context, waiting, next(iter(gpus), None))
    asked: list[int] = []  # signals; handled between two steps, so that every started process is tracked
    before = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        while waiting or active:
            while len(active) < jobs and (run := _next(waiting, ready, active)):
                if aside := _set_aside(run):
                    tell(f"{run}: an earlier attempt did not finish; it was moved to {aside}")
                process = _start(context, run, least_used(gpus, [process.gpu for _, process, _ in active.values()]))
                active[process.sentinel] = run, process, time.monotonic()
            ended_now = wait(list(active), timeout=SIGNAL_CHECK_INTERVAL)
            if asked:
                raise KeyboardInterrupt
            for sentinel in ended_now:
                run, process, since = active.pop(sentinel)
                process.join()
                ready.add(run.block)
                ended += 1
                if process.exitcode or not is_done(run):
                    failed.append(run)
                    what = f"FAILED (exit status {process.exitcode}): {_last_line(run.folder / LOG)}"
                else:
                    check(run)
                    what = f"{time.monotonic() - since:.0f} s"
                rest = (time.monotonic() - started) / ended * (left - ended)
                tell(f"[{total - left + ended}/{total}] {run}: {what}; about {rest / 60:.0f} min left")
    finally:
        for _, process, _ in active.values():
            process.terminate()
        for _, process, _ in active.values():
            process.join(STOP_TIMEOUT)
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    return failed


def _check_recipes(context: Any, runs: list[Run], gpu: str | None) -> None:
    """Check the recipe of every arm at every point of the grid before any run is started."""
    recipes: dict[str, list[str]] = {}
    for run in runs:
        recipes.setdefault(" ".join([run.arm, *map(str, run.point)]), list(run.options))
    told, teller = multiprocessing.Pipe(duplex=False)
    process = context.Process(target=_check_in_child, args=(recipes, teller, gpu))
    process.start()
    teller.close()
    try:
        problem = told.recv()
    except EOFError:  # the process has died: the runs will report the reason
        problem = None
    finally:
        process.terminate()
        process.join()
    if problem:
        raise UserError(problem)


def _last_line(log: Path) -> str:
    """Return the last line that a run printed, which is why it failed, and the path of its log."""
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return f"{printable(lines[-1][-300:])} ({log})" if lines else str(log)


def start_context(gpus: list[str]) -> Any:
    """Return the context in which runs are started.

    Without GPUs, runs are forked from a process that has done the imports. With GPUs they are spawned, because a
    process whose imports have queried the GPUs, as some do, cannot use CUDA after a fork.
    """
    if gpus:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gear_lightning.study.child"])
    return context


def _next(waiting: list[Run], ready: set[int], active: dict[Any, tuple[Run, Any, float]]) -> Run | None:
    """Take the next run whose warm start exists or is not being made by another run; None if there is none."""
    made = {run.block for run, _, _ in active.values()} - ready
    for place, run in enumerate(waiting):
        if run.block not in made:
            return waiting.pop(place)
    return None


def visible_gpus() -> list[str]:
    """Return the names that CUDA_VISIBLE_DEVICES gives to the existing GPUs."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(i) for i in range(count)])[:count]


def least_used(gpus: list[str], taken: list[str]) -> str | None:
    """Return the GPU that occurs least often in ``taken``, the first one of several; None if there are none."""
    return min(gpus, key=taken.count, default=None)


def _set_aside(run: Run) -> Path | None:
    """Move the folder of an unfinished attempt and return its new path; None if there is none."""
    if not run.folder.exists():
        return None
    hold(run.folder / ".lock", f"{run.folder}: a process is still training there; end it, or wait for it").close()
    runs = run.folder.parents[len(run.point) + 1]
    aside = runs.with_name("unfinished") / run.folder.relative_to(runs)  # outside the patterns of runs/
    aside.parent.mkdir(parents=True, exist_ok=True)
    places = (aside.with_name(f"{aside.name}-{number}") for number in itertools.count(1))
    return run.folder.rename(next(place for place in places if not place.exists()))


def _start(context: Any, run: Run, gpu: str | None) -> Any:
    run.folder.mkdir(parents=True)
    plan = {"arm": run.arm, "seed": run.seed, "options": list(run.options), "files": _digests(run)}
    replace_text(run.folder / PLAN, json.dumps(plan))
    process = context.Process(target=_child, args=(run.arguments, str(run.folder / LOG), gpu), name=str(run))
    process.gpu = gpu
    process.start()
    return process


def _check_in_child(recipes: dict[str, list[str]], told: Any, gpu: str | None) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    from .child import check_recipes

    check_recipes(recipes, told)


def _child(arguments: list[str], log: str, gpu: str | None) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    from .child import fit  # not at the top: the study itself does not need its imports

    fit(arguments, log)
