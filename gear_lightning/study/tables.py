"""Tables: their terminal, Markdown and HTML forms, and numbers as text."""

import csv
import html
import io
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..errors import printable


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; notes follow it as paragraphs."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def print_tables(tables: Iterable[Table]) -> None:
    """Print tables on a terminal, in its full width."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(width=max(80, shutil.get_terminal_size((170, 24)).columns), highlight=False)
    for table in tables:
        title = Text(printable(table.title))
        shown = RichTable(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
        for place, name in enumerate(table.columns):
            shown.add_column(Text(printable(name)), justify="right" if place else "left", overflow="fold")
        for row in table.rows:
            shown.add_row(*(Text(printable(cell)) for cell in row))
        console.print(shown)
        for note in table.notes:
            console.print(Text(printable(note)), style="dim")
        console.print()


def markdown(tables: Iterable[Table]) -> str:
    """Return tables for a Markdown document."""
    parts = []
    for table in tables:
        rows = [table.columns, ["---"] * len(table.columns), *table.rows]
        cells = [[printable(cell).replace("|", "\\|") for cell in row] for row in rows]
        lines = "".join(f"| {' | '.join(row)} |\n" for row in cells)
        parts += [f"{printable(table.title)}:\n", lines, *(f"{printable(note)}\n" for note in table.notes)]
    return "\n".join(parts)


def to_html(tables: Iterable[Table]) -> str:
    """Return tables for an HTML page."""
    text = lambda kind, content: f"<{kind}>{html.escape(printable(content))}</{kind}>"  # noqa: E731
    parts = []
    for table in tables:
        parts += [text("h2", table.title), '<div class="wide"><table>']
        for kind, row in [("th", table.columns), *(("td", row) for row in table.rows)]:
            parts.append(f"<tr>{''.join(text(kind, cell) for cell in row)}</tr>")
        parts += ["</table></div>", *(text("p", note) for note in table.notes)]
    return "\n".join(parts)


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Return rows of values as CSV."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


def with_interval(value: float, interval: tuple[float, float] | None, sign: str = "") -> str:
    """Return a value and its interval as text; ``sign="+"`` writes the signs of positive numbers, too."""
    text = f"{value:{sign}{_form(value)}}"
    return text if interval is None else f"{text} [{', '.join(f'{x:{sign}{_form(value)}}' for x in interval)}]"


def p_value(p: float) -> str:
    """Return p as text."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def _form(value: float) -> str:
    return ".3f" if abs(value) < 100 else ".4g"
