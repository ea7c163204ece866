"""Random access to the lines of a large JSON Lines file. The whole file is read and checked once, then single lines.

`LineSource` is what has such lines: a `JsonlFile`, or rows of other files that are written as lines (`dataset_rows`).
"""

import gzip
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ..checks import deeper_than
from ..errors import UserError, require_extra
from ..runs.files import build_once, cache_dir
from .base import TaskSource

MAX_DEPTH = 64  # nesting depth of lists and objects in a line
SMALL = 1 << 22  # bytes up to which a file is kept in memory and its index is not cached
LARGE = 1 << 27  # bytes from which on a log line reports that the file is being read
COMPRESSED = (".gz", ".zst")
_PART = 1 << 20
_MARK = b"\xef\xbb\xbf"  # byte order mark of UTF-8
KINDS = {"start": "q", "length": "q", "number": "q", "crc": "I"}  # columns of an index, and their types

Look = Callable[[int, dict[str, Any]], str | None]


class LineSource(ABC):
    """Lines with one JSON object each, one after another.

    Attributes:
        name: of the file or data set, for messages.
        size: bytes of the file or files.
        digest: changes whenever a line changes.
        text: the text that the lines are parts of, for access by position: all bytes, or an open file. None: there is
            none, so the lines are copied.
    """

    name: str
    size: int
    digest: str
    text: bytes | IO[bytes] | None = None

    @abstractmethod
    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield the number and the bytes of each line. Numbers rise.

        Raises:
            UserError: a line cannot be read.
        """

    @abstractmethod
    def where(self, number: int) -> str:
        """Return which line a number means, for errors."""

    def earlier(self, number: int) -> str:
        """Return which line a number means, in an error about a later one."""
        return self.where(number)


class JsonlFile(LineSource):
    """Lines of a .jsonl, .jsonl.gz or .jsonl.zst file."""

    def __init__(self, path: Path, file: IO[bytes]):
        self.name = str(path)
        self.path = path
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.digest = digest_of(file)
        file.seek(0)
        if path.suffix not in COMPRESSED:
            self.text = file.read() if self.size <= SMALL else file

    def lines(self) -> Iterator[tuple[int, bytes]]:
        stream = io.BytesIO(self.text) if isinstance(self.text, bytes) else unpacked(self.path, self.file)
        yield from numbered(self.name, stream)

    def where(self, number: int) -> str:
        return f"{self.name}:{number}"

    def earlier(self, number: int) -> str:
        return f"line {number}"


def unpacked(path: Path, file: IO[bytes]) -> IO[bytes]:
    """Return the content of an open file that may be compressed, from its start.

    Raises:
        UserError: .zst, and the extra ``datasets`` is not installed.
    """
    file.seek(0)
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if path.suffix == ".zst":
        require_extra("pyarrow")
        import pyarrow as pa

        own = os.fdopen(os.dup(file.fileno()), "rb")  # because the stream closes it
        own.seek(0)
        return io.BufferedReader(pa.CompressedInputStream(own, "zstd"))  # type: ignore[arg-type]
    return file


def numbered(name: str, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the number (from 1) and the bytes of each line of a file.

    Raises:
        UserError: the file cannot be read to its end.
    """
    number = 0
    try:
        for number, line in enumerate(stream, 1):
            yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name}: cannot be read beyond line {number} ({error})") from None


def digest_of(file: IO[bytes]) -> str:
    """Return the SHA-256 of an open file."""
    sha = hashlib.sha256()
    while part := file.read(_PART):
        sha.update(part)
    return sha.hexdigest()


class IndexedLines:
    """Lines by index. It stores the position of each line, not its content.

    Args:
        source: the lines, for errors.
        text: the text that the positions are about: the source's, or a copy.
        index: ``start``, ``length``, ``number`` and ``crc`` of each line.
        notes: the ``notes`` of `index_lines`, or those found in the cache.
    """

    def __init__(
        self, source: LineSource, text: bytes | IO[bytes], index: dict[str, np.ndarray], notes: dict[str, Any]
    ):
        self.path = source.name
        self.notes = notes
        self.digest = source.digest
        self.source = source
        self._text = text
        self.index = index

    def __len__(self) -> int:
        return len(self.index["start"])

    def __getitem__(self, place: int) -> tuple[int, dict[str, Any]]:
        """Return the line number and the JSON object of a line.

        Raises:
            IndexError: there is no such line.
            UserError: the file was changed after it was indexed.
        """
        start, length, number, crc = (int(self.index[name][place]) for name in ("start", "length", "number", "crc"))
        where = self.source.where(number)
        if isinstance(self._text, bytes):
            line = self._text[start : start + length]
        else:
            line = os.pread(self._text.fileno(), length, start)  # no file position, so threads and forks can share it
            if zlib.crc32(line) != crc:
                raise UserError(
                    f"{where}: the file was changed while the run was using it; restore it, or restart with "
                    "--ckpt_path last to continue with the new file"
                )
        return number, parsed(line, where)

    def where(self, place: int) -> str:
        """Return which line the index means, for errors."""
        return self.source.where(int(self.index["number"][place]))

    def longest(self, count: int, among: int) -> list[int]:
        """Return the sorted indices of the ``count`` longest lines among the first ``among`` lines."""
        lengths = self.index["length"][:among]
        return sorted(np.argsort(-lengths, kind="stable")[:count].tolist())


def index_lines(path: str | Path, key: str, look: Look, notes: dict[str, Any]) -> IndexedLines:
    """Return the indexed lines of a file. Reads and checks the whole file, or uses a cached index of it.

    Args:
        path: a .jsonl, .jsonl.gz or .jsonl.zst file. Empty lines are skipped.
        key: a text that identifies everything that ``look`` depends on.
        look: takes the number and the object of each line. Returns the line's id, which must be unique, or None to skip
            the line. Raises `UserError` for an invalid line.
        notes: a dict that ``look`` may fill; it is stored with the index.

    Raises:
        UserError: the file cannot be read, a line is not a JSON object, two lines have the same id, or ``look`` raised
            it; names file and line.
    """
    path = Path(path)
    try:
        file = path.open("rb")
        before, source = os.fstat(file.fileno()), JsonlFile(path, file)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    lines = index_source(source, f"{path.suffix}{key}", look, notes)
    after = os.fstat(file.fileno())
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise UserError(f"{path}: the file was changed while it was read; start again")
    return lines


def index_source(source: LineSource, key: str | None, look: Look, notes: dict[str, Any]) -> IndexedLines:
    """Return the indexed lines of a source, see `index_lines`. Without a ``key``, the index is not cached."""
    large = source.size > LARGE
    if key is None or source.size <= SMALL:
        if large:
            rank_zero_info(f"{source.name}: reading and checking all lines")
        return _made(source, look, notes)
    name = hashlib.sha256(f"{source.digest}{key}".encode("utf-8", "surrogatepass")).hexdigest()
    folder = cache_dir() / "tasks" / name[:32]

    def build(partial: Path) -> None:
        if large:
            rank_zero_info(f"{source.name}: reading and checking all lines; this happens once per file")
        copy = (partial / "text.jsonl").open("w+b") if source.text is None else None
        found = _made(source, look, notes, copy)
        with (partial / "index.npz").open("wb") as index:
            np.savez(index, allow_pickle=False, **found.index)
        (partial / "notes.json").write_text(json.dumps(notes))

    for attempt in range(2):
        try:
            build_once(folder, build)
        except OSError as error:
            rank_zero_warn(
                f"{source.name}: its index cannot be stored in {folder.parent} ({error}); every start recreates it"
            )
            return _made(source, look, notes)
        try:
            with np.load(folder / "index.npz", allow_pickle=False) as stored:
                index = {name: stored[name] for name in KINDS}
            notes |= json.loads((folder / "notes.json").read_text())
            text = (folder / "text.jsonl").open("rb") if source.text is None else source.text
            return IndexedLines(source, text, index, notes)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            if attempt:
                raise
            shutil.rmtree(folder, ignore_errors=True)  # damaged
    raise AssertionError


def _made(source: LineSource, look: Look, notes: dict[str, Any], copy: IO[bytes] | None = None) -> IndexedLines:
    """Index lines now.

    Args:
        source: the lines.
        look: as in `index_lines`.
        notes: as in `index_lines`.
        copy: where to write lines that are not parts of a text. None: a temporary file.
    """
    if source.text is None:
        copy = copy or tempfile.TemporaryFile()  # noqa: SIM115 - stays open as long as the lines are used
    columns = {name: array(kind) for name, kind in KINDS.items()}
    ids = array("Q")
    start = 0
    for number, line in source.lines():
        if copy is not None:
            copy.write(line)
        if line.strip() and (name := look(number, parsed(line, source.where(number)))) is not None:
            found = {"start": start, "length": len(line), "number": number, "crc": zlib.crc32(line)}
            for column, value in found.items():
                columns[column].append(value)
            ids.append(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))
        start += len(line)
    if copy is not None:
        copy.flush()
    index = {name: np.frombuffer(column, dtype=column.typecode) for name, column in columns.items() if len(column)}
    text = copy if source.text is None else source.text
    assert text is not None
    lines = IndexedLines(source, text, index or {name: np.zeros(0, kind) for name, kind in KINDS.items()}, notes)
    _check_ids(lines, np.frombuffer(ids, dtype="Q") if ids else np.zeros(0, "Q"), look)
    return lines


def _check_ids(lines: IndexedLines, ids: np.ndarray, look: Look) -> None:
    """Check that all ids are unique.

    Args:
        lines: the lines.
        ids: [lines] 64-bit hashes of their ids.
        look: returns a line's id.

    Raises:
        UserError: an id is repeated; names that line and the earlier one.
    """
    order = np.argsort(ids, kind="stable")
    same = ids[order][1:] == ids[order][:-1]
    seen: dict[str | None, int] = {}
    for place in np.unique(np.concatenate([order[1:][same], order[:-1][same]])).tolist():
        number, line = lines[place]
        name = look(number, line)
        if name in seen:
            where, earlier = lines.source.where(number), lines.source.earlier(seen[name])
            raise UserError(f"{where}: found id {name!r} again (first in {earlier}), expected a unique id")
        seen[name] = number


def parsed(line: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object of a line.

    Args:
        line: UTF-8 text.
        where: which line it is, for errors.

    Raises:
        UserError: it is not a JSON object, is nested too deeply, or has text or numbers that cannot be used.
    """
    try:
        found = _DECODER.decode(line.removeprefix(_MARK).decode())
        if b"\\u" in line:  # an escape can be half of a surrogate pair, which tokenizers reject
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise UserError(f"{where}: found bytes that are not UTF-8, expected JSON") from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise UserError(f"{where}: found {half}, half of a surrogate pair, expected whole characters") from None
    except RecursionError:
        raise UserError(f"{where}: found JSON that is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where}: found invalid JSON ({error}), expected one JSON object{_hint(line)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: found {kind_of(found)}, expected one JSON object{_hint(line)}")
    # code that copies or renders the object later recurses into it and must not exceed the stack
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and deeper_than(MAX_DEPTH, found):
        raise UserError(f"{where}: found JSON that is nested too deeply")
    return found


def _hint(line: bytes) -> str:
    """Return what to do about a file that is one JSON array; empty if the line starts none."""
    array = line.removeprefix(_MARK).lstrip().startswith(b"[")
    return " in each line; if the file is one JSON array: jq -c '.[]' FILE.json > FILE.jsonl" if array else ""


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(number: str) -> float:
    if math.isinf(float(number)):
        raise ValueError(f"{number[:40]} is too large for a float")
    return float(number)


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)


def kind_of(value: Any) -> str:
    """Return a short description of a JSON value."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if value in ("", [], {}):
        return {"str": "empty text", "list": "an empty list", "dict": "an empty object"}[type(value).__name__]
    if isinstance(value, str):
        return json.dumps(value if len(value) <= 40 else value[:40] + "...", ensure_ascii=False)
    return "a list" if isinstance(value, list) else "an object"


class LineTasks(TaskSource):
    """Base of sources whose tasks are lines of an index: a frozen dataclass that sets ``_lines``."""

    _lines: IndexedLines

    def __reduce__(self):
        return type(self), tuple(getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]

    @property
    def size(self) -> int:
        return len(self._lines)

    def place_of(self, index: int) -> str:
        return self._lines.where(range(self.size)[index])

    def longest(self, count: int) -> list[int]:
        return self._lines.longest(count, self.size)
