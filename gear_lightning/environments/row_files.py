"""Rows of one data file: parquet, Arrow, CSV, JSON and JSON Lines, the text ones also compressed with gzip or zstd."""

import csv
import decimal
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, time, timedelta
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from ..errors import UserError, require_extra
from .lines import COMPRESSED, numbered, parsed, unpacked

KINDS = {  # suffix -> how the file is read
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
}
_BATCH = 1000  # rows of a parquet or Arrow file that are converted together
_CELL = 1 << 30  # longest cell of a CSV file, in characters

Row = dict[str, Any]


@dataclass(frozen=True)
class DataFile:
    """A file with rows.

    Attributes:
        path: the file.
        delimiter: between the cells of a CSV file. None: a comma, or a tab for .tsv.
    """

    path: Path
    delimiter: str | None = None

    @cached_property
    def kind(self) -> str:
        """How the file is read: ``parquet``, ``arrow``, ``csv``, ``lines`` or ``json``.

        Raises:
            UserError: the suffix is not that of a supported file.
        """
        found = KINDS.get(_suffix(self.path))
        if found is None or (self.path.suffix in COMPRESSED and found in ("parquet", "arrow")):
            text = f"{', '.join(KINDS)}; the text files also with .gz or .zst"
            raise UserError(f"{self.path}: not a supported file; supported are {text}")
        return found

    @property
    def typed(self) -> bool:
        """Whether all rows have the same columns."""
        return self.kind in ("parquet", "arrow", "csv")

    @cached_property
    def prefix(self) -> str:
        """The text of `where` up to the number."""
        return f"{self.path}{':' if self.kind in ('csv', 'lines') else ': row '}"

    def where(self, number: int) -> str:
        """Return the place of a row for errors: the line of a text file, else the row, counted from 0."""
        return where(self.prefix, number)

    def rows(self) -> Iterator[tuple[int, Row | UserError]]:
        """Yield the number of each row, see `where`, and the row, or the error of an invalid row.

        Raises:
            UserError: the file does not exist, or cannot be read to its end.
        """
        read = {"parquet": _parquet, "arrow": _arrow, "csv": self._csv, "lines": self._lines, "json": self._json}
        kind = self.kind
        if kind in ("parquet", "arrow"):
            require_extra("pyarrow")
        try:
            with self.path.open("rb") as file:
                yield from read[kind](self.path, file)
        except FileNotFoundError:
            raise UserError(f"{self.path} does not exist") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({' '.join(str(error).split())})") from None

    def count(self) -> int:
        """Return the number of rows."""
        if self.kind == "parquet":
            require_extra("pyarrow")
            with self.path.open("rb") as file:
                return _parquet_file(self.path, file).metadata.num_rows
        return sum(1 for _ in self.rows())

    def _lines(self, path: Path, file: IO[bytes]) -> Iterator[tuple[int, Row | UserError]]:
        for number, line in numbered(str(path), unpacked(path, file)):
            if line.strip():
                yield number, _parsed(line, self.where(number))

    def _json(self, path: Path, file: IO[bytes]) -> Iterator[tuple[int, Row | UserError]]:
        text = b"".join(line for _, line in numbered(str(path), unpacked(path, file))).removeprefix(b"\xef\xbb\xbf")
        if not text.lstrip().startswith(b"["):
            for number, line in enumerate(io.BytesIO(text)):
                if line.strip():
                    row = _parsed(line, f"{path}:{number + 1}")
                    yield number, UserError(f"{row} per line, or a list of them") if isinstance(row, UserError) else row
            return
        try:
            items = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: found invalid JSON ({error}), expected a list of objects") from None
        for number, item in enumerate(items):
            yield number, _parsed(json.dumps(item).encode(), self.where(number))

    def _csv(self, path: Path, file: IO[bytes]) -> Iterator[tuple[int, Row | UserError]]:
        csv.field_size_limit(_CELL)
        delimiter = self.delimiter or ("\t" if _suffix(path) == ".tsv" else ",")
        reader = csv.reader(_decoded(path, unpacked(path, file)), delimiter=delimiter, strict=True)
        header: list[str] = []
        first = 1  # line of the file in which the row begins
        try:
            for cells in reader:
                if not header and cells:
                    header = cells
                    twice = [name for name in header if header.count(name) > 1]
                    if twice or not all(header):
                        found = f"the column {twice[0]!r} twice" if twice else "a column without a name"
                        raise UserError(f"{path}:{first}: found {found}, expected a header line with names of columns")
                elif cells and len(cells) != len(header):
                    text = f"found {len(cells)} cells, expected {len(header)} as in the header"
                    yield first, UserError(f"{path}:{first}: {text}")
                elif cells:
                    yield first, {name: cell or None for name, cell in zip(header, cells, strict=True)}
                first = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}:{first}: found invalid CSV ({error})") from None


def _parsed(line: bytes, where: str) -> Row | UserError:
    try:
        return parsed(line, where)
    except UserError as error:
        return error


def where(prefix: str, number: int) -> str:
    """Return the place of a row for errors, see `DataFile`."""
    return f"{prefix}{number}{' (counted from 0)' if prefix.endswith(' ') else ''}"


def _suffix(path: Path) -> str:
    """Return the suffix that names the kind of file: that before .gz or .zst."""
    return (Path(path.stem) if path.suffix in COMPRESSED else path).suffix.lower()


def _decoded(path: Path, stream: IO[bytes]) -> Iterator[str]:
    for number, line in numbered(str(path), stream):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{path}:{number}: found bytes that are not UTF-8") from None


def _parquet_file(path: Path, file: IO[bytes]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        return parquet.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]})") from None


def _parquet(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Row]]:
    yield from _converted(path, _parquet_file(path, file).iter_batches(batch_size=_BATCH))


def _arrow(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        with pa.memory_map(str(path)) as mapped:
            try:
                stream = pa.ipc.open_stream(mapped)
            except pa.ArrowInvalid:  # files of Feather have the other format
                mapped.seek(0)
                whole = pa.ipc.open_file(mapped)
                stream = (whole.get_batch(place) for place in range(whole.num_record_batches))
            for batch in stream:
                yield from (batch.slice(start, _BATCH) for start in range(0, batch.num_rows, _BATCH))

    yield from _converted(path, batches())


def _converted(path: Path, batches: Iterator[Any]) -> Iterator[tuple[int, Row]]:
    """Yield the rows of record batches as Python values."""
    import pyarrow as pa

    number = 0
    try:
        for batch in batches:
            for row in batch.to_pylist():
                yield number, {key: plain(value) for key, value in row.items()}
                number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read beyond row {number} ({text})") from None


def plain(value: Any) -> Any:
    """Return a value of a table as one of JSON. Keys without a value are removed from objects: Arrow adds them, because
    all objects of a column have the same keys. Values without a counterpart, such as bytes, stay as they are."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal) and value.is_finite():
        return int(value) if value == value.to_integral_value() else float(value)
    of_numpy = getattr(value, "tolist", None)
    return value if of_numpy is None else plain(of_numpy())
