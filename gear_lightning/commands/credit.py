"""``gear-lightning credit``: print the credit of one rollout or a table of rollouts, or write the page of a run."""

import os
import shutil
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import UserError
from ..lens.page import iterations_of, page_of_run, page_path
from ..lens.text import render_credit_text
from ..lens.trace import Trace, load_decoder, trace, visible
from ..runs.files import write_asked
from ..runs.records import Record, read_records
from . import parsers


def credit_command(argv: list[str]) -> int:
    """Run ``gear-lightning credit``: print one rollout, list rollouts, or write the page.

    Args:
        argv: the arguments after ``credit``.

    Returns:
        The exit status.

    Raises:
        UserError: there are no records, or none of the given iteration, task or rollout; the page cannot be written.
    """
    args = parsers.credit().parse_args(argv)
    if args.html is not None:
        if args.task is not None or args.rollout is not None or args.list:
            raise UserError("--html can be combined only with --iteration; tasks and rollouts are selected on the page")
        if args.iteration is not None:
            _find(args.run, args.iteration, None, None)
        out = page_path(args.run, None if args.html == Path() else args.html)
        write_asked(out, page_of_run(args.run, None if args.iteration is None else [args.iteration]))
        print(out)
        return 0
    found = _find(args.run, args.iteration, args.task, args.rollout)
    colour = not args.no_colour and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    width = shutil.get_terminal_size((200, 24)).columns
    if args.list:
        print(_table(found, colour, width), end="")
    else:
        record, index = max(found, key=lambda place: _interest(trace(*place)))
        print(render_credit_text(record, index, load_decoder(args.run), color=colour, width=width), end="")
    return 0


def _find(run: Path, iteration: int | None, task: str | None, number: int | None) -> list[tuple[Record, int]]:
    """Return the record and position of each requested rollout, all of one iteration: the last one that has any."""
    there = iterations_of(run)
    if iteration is not None and iteration not in there:
        raise UserError(f"{run}: no records of iteration {iteration}; there are {_some(there)}")
    seen: dict[str, None] = {}
    for wanted in reversed(there) if iteration is None else [iteration]:
        places = [(record, i) for record in read_records(run, [wanted]) for i in range(len(record.rollouts))]
        of_task = [p for p in places if task in (None, str(p[0].rollouts[p[1]]["task_id"]))]
        if found := [p for p in of_task if number in (None, p[0].rollouts[p[1]]["rollout"])]:
            return found
        if of_task and task is not None and iteration is not None:
            numbers = sorted(record.rollouts[i]["rollout"] for record, i in of_task)
            raise UserError(
                f"{run}: task {task!r} has no rollout {number} in iteration {wanted}; it has {_some(numbers)}"
            )
        seen |= dict.fromkeys(f"{record.rollouts[i]['task_id']}" for record, i in places)
    what = " ".join(f"{k} {v}" for k, v in (("task", task), ("rollout", number)) if v is not None) or "rollout"
    where = "" if iteration is None else f" in iteration {iteration}"
    raise UserError(f"{run}: no {what}{where}; the tasks are {_some(list(seen))}")


def _some(values: list) -> str:
    if not values:
        return "none"
    shown = ", ".join(map(str, values if len(values) <= 20 else [*values[:10], "...", *values[-9:]]))
    return shown if len(values) <= 20 else f"{shown} ({len(values)} in all)"


def _interest(one: Trace) -> tuple:
    swing = float((one.columns["weights"] - 1).abs().max()) if one.sampled else 0.0
    return bool(one.segments), not one.rollout.get("success"), bool(one.tokens), swing


def _table(places: list[tuple[Record, int]], colour: bool, width: int) -> str:
    title = f"iteration {places[0][0].iteration}"
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for name in ("rank", "rollout", "reward", "advantage", "tokens", "segments", "weights"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("task", overflow="fold")
    for record, index in places:
        one = trace(record, index)
        rollout, weights = one.rollout, one.columns.get("weights")
        spread = f"{weights.min():.2f}-{weights.max():.2f}" if weights is not None and len(weights) else "-"
        cells = [record.rank, rollout["rollout"]]
        cells += ["-" if rollout["reward"] is None else f"{rollout['reward']:.3g}"]
        cells += ["-" if one.advantage is None else f"{one.advantage:+.2f}"]
        cells += [one.sampled, len(one.anchors), spread, visible(rollout["status"]), visible(rollout["task_id"])]
        table.add_row(*(Text(str(cell)) for cell in cells), style="green" if rollout["success"] else "")
    out = StringIO()
    Console(file=out, width=width, force_terminal=colour, no_color=not colour).print(table)
    return out.getvalue()
