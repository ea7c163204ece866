"""JSON objects of a large file, one a line, by index: the file is read and checked once, then a line at a time."""

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
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ..checks import deeper_than
from ..errors import UserError
from ..runs.files import build_once, cache_dir

MAX_DEPTH = 64  # lists and objects within each other in a line
SMALL = 1 << 22  # bytes of a file that is kept in memory, and whose index is not stored
LARGE = 1 << 27  # bytes of a file from which on the user is told what takes so long
_PART = 1 << 20
_MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark
KINDS = {"start": "q", "length": "q", "number": "q", "crc": "I"}  # columns of an index, and their types

Look = Callable[[int, dict[str, Any]], str | None]


class IndexedLines:
    """Lines of a .jsonl or .jsonl.gz file by index. It holds where each line is, not what it says.

    Args:
        path: the file, for errors.
        text: the lines: all bytes, or an open file.
        index: ``start``, ``length``, ``number`` (from 1) and ``crc`` of each line.
        notes: what `index_lines` was given, or found in the cache.
        digest: SHA-256 of the file.
    """

    def __init__(
        self, path: Path, text: bytes | IO[bytes], index: dict[str, np.ndarray], notes: dict[str, int], digest: str
    ):
        self.path = path
        self.notes = notes
        self.digest = digest
        self._text = text
        self.index = index

    def __len__(self) -> int:
        return len(self.index["start"])

    def __getitem__(self, place: int) -> tuple[int, dict[str, Any]]:
        """Number and object of a line.

        Raises:
            IndexError: there is no such line.
            UserError: the file was changed since it was indexed.
        """
        start, length, number, crc = (int(self.index[name][place]) for name in ("start", "length", "number", "crc"))
        where = f"{self.path}:{number}"
        if isinstance(self._text, bytes):
            line = self._text[start : start + length]
        else:
            line = os.pread(self._text.fileno(), length, start)  # no position, so that threads and forks may share it
            if zlib.crc32(line) != crc:
                raise UserError(
                    f"{where}: the file was changed while the run was using it; put it back, or start again with "
                    "--ckpt_path last to go on with the new one"
                )
        return number, _object(line, where)

    def longest(self, count: int, among: int) -> list[int]:
        """Indices of the longest lines among the first so many, in order."""
        lengths = self.index["length"][:among]
        return sorted(np.argsort(-lengths, kind="stable")[:count].tolist())


def index_lines(path: str | Path, key: str, look: Look, notes: dict[str, int]) -> IndexedLines:
    """Read a whole file, or find in the cache that it was read before, and remember where each line is.

    Args:
        path: a .jsonl or .jsonl.gz file. Empty lines are skipped.
        key: all that ``look`` depends on.
        look: gets number and object of each line; returns an id that no other line may have, or None to leave the line
            out; raises `UserError` for a line that cannot be used.
        notes: where ``look`` puts what is to be kept with the index.

    Raises:
        UserError: the file cannot be read, a line is not a JSON object, two have the same id, or what ``look`` raised;
            names file and line.
    """
    path = Path(path)
    try:
        file = path.open("rb")
        before, digest = os.fstat(file.fileno()), _digest(file)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if before.st_size > SMALL:
        name = hashlib.sha256(f"{digest}{path.suffix}{key}".encode("utf-8", "surrogatepass")).hexdigest()
        lines = _kept(path, file, cache_dir() / "tasks" / name[:32], look, notes, digest)
    else:
        lines = _made(path, file, look, notes, digest)
    after = os.fstat(file.fileno())
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise UserError(f"{path} was changed while it was read; start again")
    return lines


def _digest(file: IO[bytes]) -> str:
    sha = hashlib.sha256()
    while part := file.read(_PART):
        sha.update(part)
    return sha.hexdigest()


def _kept(path: Path, file: IO[bytes], folder: Path, look: Look, notes: dict[str, int], digest: str) -> IndexedLines:
    """The lines of a large file by the index in the cache, which is made where it is not there."""

    def build(partial: Path) -> None:
        if os.fstat(file.fileno()).st_size > LARGE:
            rank_zero_info(f"{path}: reading and checking all lines, once")
        copy = (partial / "text.jsonl").open("w+b") if path.suffix == ".gz" else None
        found = _made(path, file, look, notes, digest, copy)
        with (partial / "index.npz").open("wb") as index:
            np.savez(index, allow_pickle=False, **found.index)
        (partial / "notes.json").write_text(json.dumps(notes))

    for attempt in range(2):
        try:
            build_once(folder, build)
        except OSError as error:
            rank_zero_warn(f"{path}: its index cannot be kept in {folder.parent} ({error}); every start makes it anew")
            return _made(path, file, look, notes, digest)
        try:
            with np.load(folder / "index.npz", allow_pickle=False) as stored:
                index = {name: stored[name] for name in KINDS}
            notes |= json.loads((folder / "notes.json").read_text())
            text = (folder / "text.jsonl").open("rb") if path.suffix == ".gz" else file
            return IndexedLines(path, text, index, notes, digest)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            if attempt:
                raise
            shutil.rmtree(folder, ignore_errors=True)  # damaged
    raise AssertionError


def _made(
    path: Path, file: IO[bytes], look: Look, notes: dict[str, int], digest: str, copy: IO[bytes] | None = None
) -> IndexedLines:
    """The lines of a file by an index that is made now.

    Args:
        path: for errors.
        file: the file.
        look: as in `index_lines`.
        notes: as in `index_lines`.
        digest: of the file.
        copy: where the text of a compressed file goes. None: a temporary file.
    """
    file.seek(0)
    text: bytes | IO[bytes] = file
    if path.suffix == ".gz":
        text = copy = copy or tempfile.TemporaryFile()  # noqa: SIM115 - as long as the lines are used
    elif os.fstat(file.fileno()).st_size <= SMALL:
        text = file.read()
    columns = {name: array(kind) for name, kind in KINDS.items()}
    ids = array("Q")
    stream: Any = gzip.GzipFile(fileobj=file) if copy else io.BytesIO(text) if isinstance(text, bytes) else file
    for number, start, line in _scan(path, stream):
        if copy is not None:
            copy.write(line)
        if line.strip() and (name := look(number, _object(line, f"{path}:{number}"))) is not None:
            found = {"start": start, "length": len(line), "number": number, "crc": zlib.crc32(line)}
            for column, value in found.items():
                columns[column].append(value)
            ids.append(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))
    if copy is not None:
        copy.flush()
    index = {name: np.frombuffer(column, dtype=column.typecode) for name, column in columns.items() if len(column)}
    lines = IndexedLines(path, text, index or {name: np.zeros(0, kind) for name, kind in KINDS.items()}, notes, digest)
    _check_ids(lines, np.frombuffer(ids, dtype="Q") if ids else np.zeros(0, "Q"), look)
    return lines


def _scan(path: Path, stream: IO[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Number (from 1), place and bytes of each line.

    Raises:
        UserError: the file cannot be read to its end.
    """
    number = start = 0
    try:
        for number, line in enumerate(stream, 1):
            yield number, start, line
            start += len(line)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read after line {number} ({error})") from None


def _check_ids(lines: IndexedLines, ids: np.ndarray, look: Look) -> None:
    """Look for an id that is there twice.

    Args:
        lines: the lines.
        ids: [lines] 64-bit hashes of their ids.
        look: gives a line's id.

    Raises:
        UserError: names the line where one is repeated, and the earlier one.
    """
    order = np.argsort(ids, kind="stable")
    same = ids[order][1:] == ids[order][:-1]
    seen: dict[str | None, int] = {}
    for place in np.unique(np.concatenate([order[1:][same], order[:-1][same]])).tolist():
        number, line = lines[place]
        name = look(number, line)
        if name in seen:
            raise UserError(f"{lines.path}:{number}: found id {name!r} again (line {seen[name]}), expected a new one")
        seen[name] = number


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = _DECODER.decode(line.removeprefix(_MARK).decode())
        if b"\\u" in line:  # an escape can be half a character, which no tokenizer takes
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise UserError(f"{where}: found bytes that are not UTF-8, expected JSON") from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise UserError(f"{where}: found {half}, half of a surrogate pair, expected whole characters") from None
    except RecursionError:
        raise UserError(f"{where}: found JSON that is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where}: found broken JSON ({error}), expected one JSON object") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: found {kind_of(found)}, expected one JSON object")
    # whoever copies or renders it later must not run out of stack
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and deeper_than(MAX_DEPTH, found):
        raise UserError(f"{where}: found JSON that is nested too deeply")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(number: str) -> float:
    if math.isinf(float(number)):
        raise ValueError(f"{number[:40]} is beyond all floating-point numbers")
    return float(number)


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)


def kind_of(value: Any) -> str:
    """A JSON value in words, short."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if value in ("", [], {}):
        return {"str": "empty text", "list": "an empty list", "dict": "an empty object"}[type(value).__name__]
    if isinstance(value, str):
        return json.dumps(value if len(value) <= 40 else value[:40] + "...", ensure_ascii=False)
    return "a list" if isinstance(value, list) else "an object"
