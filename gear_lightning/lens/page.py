"""Credit token by token: one self-contained HTML page of a run.

The page shows the data of `gear_lightning.runs.records` and computes only counts. Model output is only data here: the
page contains it as JSON and shows it in text nodes.
"""

from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from ..batch import Credit
from ..runs.files import check_place, replace_text
from ..runs.records import Record, read_records, record_files
from .pack import pack_rollouts
from .trace import Decode, load_decoder

_SCRIPTS = ("base", "data", "stats", "filters", "rollout", "inspector", "trace", "charts", "main")
_MAX_BYTES = 40_000_000  # further rollouts are omitted: browsers are slow with much larger pages


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
    """Return an HTML page that shows rollouts token by token, colored by credit weight. It loads no other resources.

    Args:
        records: the records to show, in any order; the newest iterations come first on the page.
        decode: returns the text of a token id.
        title: heading of the page.
        max_rollouts: maximum number of rollouts on the page, and fewer if they need more than 40 MB; the page shows how
            many were omitted.
        left_out: number of rollouts that the caller has already omitted.
        others: credit of other rules for the same rollouts, shown next to the recorded credit: a name -> the credit of
            each record, in the order of ``records`` (None for a record without tokens).
        opens: the two sets that the page shows first, left and right: 0 for the recorded credit, n for the n-th of
            ``others``.

    Raises:
        UserError: credit of other records, or of another shape.
    """
    data = pack_rollouts(records, decode, dict(others or {}), max_rollouts, _MAX_BYTES, left_out, opens)
    # Without "<" the data cannot close the script element that contains it.
    data = data.replace("<", "\\u003c")
    assets = files("gear_lightning") / "lens" / "assets"
    style = (assets / "lens.css").read_text(encoding="utf-8")
    script = "\n" + "".join((assets / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    # The browser runs only the script with this digest, whatever other scripts the page contains.
    digest = "sha256-" + b64encode(sha256(script.encode()).digest()).decode()
    safe = title.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    page = files("gear_lightning").joinpath("lens/page.html").read_text(encoding="utf-8")
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
    """Write the page of a run atomically; rollouts too old to be shown are counted, not read.

    Args:
        run: the run directory (contains ``rollouts/`` and ``tokenizer/``).
        out: the file; None for ``run/credit_map.html``.
        iterations: only these; None for all.
        max_rollouts: see `render_credit_page`.
        others: a name -> function that returns another rule's credit of a record; called for records with tokens.

    Returns:
        The written file.

    Raises:
        UserError: no records, records or a tokenizer that cannot be read, or an ``out`` that is a folder or in a
            missing folder.
        OSError: the file cannot be written.
    """
    out = page_path(run, out)
    replace_text(out, page_of_run(run, iterations, max_rollouts, others or {}))
    return out


def page_path(run: Path, out: Path | None) -> Path:
    """Return the path of a run's page.

    Raises:
        UserError: the path is a folder, or in a missing folder.
    """
    place = Path(out) if out else Path(run) / "credit_map.html"
    check_place(place)
    return place


def page_of_run(
    run: Path,
    iterations: Iterable[int] | None,
    max_rollouts: int = 1000,
    others: Mapping[str, Callable[[Record], Credit]] | None = None,
) -> str:
    """Return the page of a run; see `write_credit_page`."""
    run = Path(run)
    iterations_of(run)
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


def iterations_of(run: Path) -> list[int]:
    """Return the iterations that have records, in order.

    Raises:
        UserError: there are none.
    """
    next(read_records(run, []), None)  # raises the error for a run without records
    return sorted({iteration for iteration, _, _ in record_files(run)})
