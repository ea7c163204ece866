"""Carries out the runs of a study: so many at a time, each in a process of its own, and none that is done again."""

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

PLAN, LOG = "run.json", "log.txt"  # what a run was started with, and what it printed
HEARING = 0.5  # seconds between two looks at whether to stop
PATIENCE = 20.0  # seconds that a run has to end when it is told to


def is_done(run: Run) -> bool:
    """Whether a run has finished, with the options and configuration files it would be started with now.

    Raises:
        UserError: it has finished with others.
    """
    started, status = _read(run.folder / PLAN), _read(run.folder / "status.json")
    if status.get("phase") != "finished" or not isinstance(started.get("options"), list):
        return False
    otherwise = "give another --out, or remove that folder"
    if started["options"] != list(run.options):
        before, now = set(map(str, started["options"])), set(run.options)
        raise UserError(
            f"{run.folder} was made with {_some(before - now)}, and this study has {_some(now - before)}; {otherwise}"
        )
    if started.get("files") != (now := _digests(run)):
        before = started.get("files")
        changed = next(f for f in now if not isinstance(before, dict) or before.get(f) != now[f])
        raise UserError(f"{run.folder} was made with another {changed}, which has changed since; {otherwise}")
    return True


def _read(path: Path) -> dict[str, Any]:
    """Of a JSON object; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _digests(run: Run) -> dict[str, str]:
    """What the run's configuration files say, whatever their comments: file -> digest."""
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
    """Of a file in a state; one that is edited while a study runs is read again."""
    said = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def _some(options: set[str]) -> str:
    return " ".join(sorted(options)) or "the same options in another order"


def carry_out(
    runs: list[Run], jobs: int, check: Callable[[Run], None], tell: Callable[[str], None] = print
) -> list[Run]:
    """Start what is not done, ``jobs`` at a time, and wait for it. One study at a time in a folder.

    The first run of each block goes ahead of the others of its block, which then find its warm start made. A run that
    came to no end is begun again, and its folder set aside; a run that fails costs itself alone. Where there are GPUs,
    each run sees one of them, the one with the fewest runs.

    Args:
        runs: all of them; those that are done are passed over.
        jobs: processes at a time.
        check: called with each run that is done, before others are started; it may raise.
        tell: called with a line for each run that ends.

    Returns:
        The runs that failed.

    Raises:
        UserError: see `is_done`; an arm's recipe cannot be run, and none has been; or a run's folder is another's.
        KeyboardInterrupt: asked to stop; the runs in progress have been ended.
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
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))  # read when torch is imported, there
    _rehearse(context, waiting, next(iter(gpus), None))
    asked: list[int] = []  # signals; heard between two steps, so that no process is started and forgotten
    before = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        while waiting or active:
            while len(active) < jobs and (run := _next(waiting, ready, active)):
                if aside := _set_aside(run):
                    tell(f"{run}: an earlier attempt came to no end, and is now in {aside}")
                process = _start(context, run, least_used(gpus, [process.gpu for _, process, _ in active.values()]))
                active[process.sentinel] = run, process, time.monotonic()
            ended_now = wait(list(active), timeout=HEARING)
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
            process.join(PATIENCE)
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    return failed


def _rehearse(context: Any, runs: list[Run], gpu: str | None) -> None:
    """Have the recipe of every arm at every point of the grid read, before any of it is run."""
    recipes: dict[str, list[str]] = {}
    for run in runs:
        recipes.setdefault(" ".join([run.arm, *map(str, run.point)]), list(run.options))
    told, teller = multiprocessing.Pipe(duplex=False)
    process = context.Process(target=_reader, args=(recipes, teller, gpu))
    process.start()
    teller.close()
    try:
        complaint = told.recv()
    except EOFError:  # it has died: the runs will tell of what
        complaint = None
    finally:
        process.terminate()
        process.join()
    if complaint:
        raise UserError(complaint)


def _last_line(log: Path) -> str:
    """Of what a run printed, which is why it failed, and where the rest is."""
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return f"{printable(lines[-1][-300:])} ({log})" if lines else str(log)


def start_context(gpus: list[str]) -> Any:
    """How runs are started: forked from a process that has done the imports; not where there are GPUs, for a process
    whose imports have asked about them, as some do, cannot use CUDA after a fork."""
    if gpus:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gear_lightning.study.child"])
    return context


def _next(waiting: list[Run], ready: set[int], active: dict[Any, tuple[Run, Any, float]]) -> Run | None:
    """Take the next run whose warm start is there, or is not being made; None for none."""
    made = {run.block for run, _, _ in active.values()} - ready
    for place, run in enumerate(waiting):
        if run.block not in made:
            return waiting.pop(place)
    return None


def visible_gpus() -> list[str]:
    """The names that CUDA_VISIBLE_DEVICES has for the GPUs that there are."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(i) for i in range(count)])[:count]


def least_used(gpus: list[str], taken: list[str]) -> str | None:
    """The GPU that stands least often, or first, in ``taken``; None where there are none."""
    return min(gpus, key=taken.count, default=None)


def _set_aside(run: Run) -> Path | None:
    """Where the folder of an attempt that came to no end now is; None where there was none."""
    if not run.folder.exists():
        return None
    hold(run.folder / ".lock", f"{run.folder}: a process is still training there; end it, or wait for it").close()
    runs = run.folder.parents[len(run.point) + 1]
    aside = runs.with_name("unfinished") / run.folder.relative_to(runs)  # where no pattern of runs/ finds it
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


def _reader(recipes: dict[str, list[str]], told: Any, gpu: str | None) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    from .child import rehearse as read

    read(recipes, told)


def _child(arguments: list[str], log: str, gpu: str | None) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    from .child import fit  # not here at the top: the study itself does without its imports

    fit(arguments, log)
