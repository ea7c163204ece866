"""Where credit went, token by token: one self-contained HTML page of a run, and a terminal print of one rollout.

Both show what `gear_lightning.runs.records` holds and compute nothing but counts. Everything a model wrote is data
here: the page carries it as JSON and turns it into text nodes, the print has its control characters made visible.
"""

import argparse
import os
import shutil
import sys
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..batch import Credit
from ..errors import UserError
from ..runs.files import check_place, replace_text, write_asked
from ..runs.records import Record, read_records, record_files
from .pack import pack_rollouts
from .text import render_credit_text
from .trace import Decode, Trace, load_decoder, trace, visible

_SCRIPTS = ("base", "data", "stats", "filters", "rollout", "inspector", "trace", "charts", "main")
_MAX_BYTES = 40_000_000  # rollouts beyond this are left out: a browser opens no page at ease that is much larger


def render_credit_page(
    records: list[Record],
    decode: Decode,
    *,
    title: str = "Credit map",
    max_rollouts: int = 1000,
    left_out: int = 0,
    others: Mapping[str, Sequence[Credit | None]] | None = None,
    opens: tuple[int, int] = (0, 1),
) -> str:
    """One HTML page that shows rollouts token by token, coloured by credit weight. It loads nothing from elsewhere.

    Args:
        records: what to show, in any order; the newest iterations come first on the page.
        decode: text of a token id.
        title: heading of the page.
        max_rollouts: most rollouts on the page, and fewer where they need more than 40 MB; the page says how many more
            there are.
        left_out: rollouts that the caller has left out already.
        others: what other rules make of the same rollouts, to be shown beside the recorded credit: a name -> the credit
            of each record, in the order of ``records`` (None for a record without tokens).
        opens: which two the page shows first, left and right: 0 for the recorded credit, n for the n-th of ``others``.

    Raises:
        UserError: credit of other records, or of another shape.
    """
    data = pack_rollouts(records, decode, dict(others or {}), max_rollouts, _MAX_BYTES, left_out, opens)
    # Without "<" nothing in the data can end the script element that holds it.
    data = data.replace("<", "\\u003c")
    assets = files("gear_lightning") / "assets" / "lens"
    style = (assets / "lens.css").read_text(encoding="utf-8")
    script = "\n" + "".join((assets / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    # The browser runs the script of this digest and no other, wherever in the page it might stand.
    digest = "sha256-" + b64encode(sha256(script.encode()).digest()).decode()
    safe = title.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    page = files("gear_lightning").joinpath("credit_page.html").read_text(encoding="utf-8")
    head, tail = page.split("@DATA@")
    head = head.replace("@STYLE@", style).replace("@SCRIPT@", digest).replace("@TITLE@", safe)
    return head + data + tail.replace("@CODE@", script)


def write_credit_page(
    run: Path,
    out: Path | None = None,
    iterations: Iterable[int] | None = None,
    max_rollouts: int = 1000,
    others: Mapping[str, Callable[[Record], Credit]] | None = None,
) -> Path:
    """Write the page of a run atomically; records too old to be shown are counted, not read.

    Args:
        run: the run directory (holds ``rollouts/`` and ``tokenizer/``).
        out: the file; None for ``run/credit_map.html``.
        iterations: only these; None for all.
        max_rollouts: see `render_credit_page`.
        others: a name -> what another rule makes of a record; called for records that have tokens.

    Returns:
        The file written.

    Raises:
        UserError: no records, records or a tokenizer that cannot be read, or an ``out`` that is a folder, or in a
            missing one.
        OSError: the file cannot be written.
    """
    out = _place(run, out)
    replace_text(out, _page(run, iterations, max_rollouts, others or {}))
    return out


def _place(run: Path, out: Path | None) -> Path:
    place = Path(out) if out else Path(run) / "credit_map.html"
    check_place(place)
    return place


def _page(
    run: Path,
    iterations: Iterable[int] | None,
    max_rollouts: int = 1000,
    others: Mapping[str, Callable[[Record], Credit]] | None = None,
) -> str:
    """The page of a run; see `write_credit_page`."""
    run = Path(run)
    _iterations(run)
    wanted = None if iterations is None else set(iterations)
    sizes: dict[int, int] = {}
    for iteration, _, path in record_files(run):
        if wanted is None or iteration in wanted:
            sizes[iteration] = sizes.get(iteration, 0) + path.read_bytes().count(b"\n")
    shown: list[int] = []
    for iteration in sorted(sizes, reverse=True):
        if sum(sizes[i] for i in shown) >= max_rollouts:
            break
        shown.append(iteration)
    records = list(read_records(run, shown))
    traced = [any(rollout["row"] is not None for rollout in record.rollouts) for record in records]
    return render_credit_page(
        records,
        load_decoder(run),
        title=f"Credit map of {run.resolve().name}",
        max_rollouts=max_rollouts,
        left_out=sum(size for i, size in sizes.items() if i not in shown),
        others={
            name: [rule(record) if there else None for record, there in zip(records, traced, strict=True)]
            for name, rule in (others or {}).items()
        },
    )


def credit_command(argv: list[str]) -> int:
    """``gear-lightning credit``: print one rollout, list rollouts, or write the page.

    Args:
        argv: the arguments after ``credit``.

    Returns:
        The exit status.

    Raises:
        UserError: no records, or an iteration, task or rollout that they do not hold; a page that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="gear-lightning credit", description="Show the credit that each token of a recorded rollout got."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory (holds rollouts/ and tokenizer/)")
    parser.add_argument("--iteration", type=int, metavar="N", help="default: the last one that has the rollout")
    parser.add_argument("--task", metavar="ID", help="only rollouts of this task")
    parser.add_argument("--rollout", type=int, metavar="K", help="number of the rollout in its group, from 0")
    parser.add_argument("--list", action="store_true", help="print a table of the rollouts instead")
    parser.add_argument(
        "--html",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="PATH",
        help="write the page instead (default RUN/credit_map.html); of all iterations unless --iteration is given",
    )
    parser.add_argument(
        "--no-colour", "--no-color", action="store_true", help="plain text, with the weights written out"
    )
    args = parser.parse_args(argv)
    if args.html is not None:
        if args.task is not None or args.rollout is not None or args.list:
            raise UserError("--html goes with --iteration only; the page has its own picker of tasks and rollouts")
        if args.iteration is not None:
            _find(args.run, args.iteration, None, None)
        out = _place(args.run, None if args.html == Path() else args.html)
        write_asked(out, _page(args.run, None if args.iteration is None else [args.iteration]))
        print(out)
        return 0
    found = _find(args.run, args.iteration, args.task, args.rollout)
    colour = not args.no_colour and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    width = shutil.get_terminal_size((200, 24)).columns
    if args.list:
        print(_table(found, colour, width), end="")
    else:
        record, index = max(found, key=lambda place: _interest(trace(*place)))
        print(render_credit_text(record, index, load_decoder(args.run), colour=colour, width=width), end="")
    return 0


def _iterations(run: Path) -> list[int]:
    next(read_records(run, []), None)  # has the error message for a run without records
    return sorted({iteration for iteration, _, _ in record_files(run)})


def _find(run: Path, iteration: int | None, task: str | None, number: int | None) -> list[tuple[Record, int]]:
    """Record and position of the rollouts asked for, all of one iteration: the last one that has any."""
    there = _iterations(run)
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
