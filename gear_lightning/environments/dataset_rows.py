"""Rows of a data set as tasks: which columns become which keys of a task, or a function that builds the task."""

import copy
import json
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any, NamedTuple

from ..errors import UserError
from ..hints import did_you_mean, some
from ..rewards import import_function
from .base import Task
from .dataset_files import SplitFiles, parts
from .row_files import DataFile, Row, plain

KEYS = ("prompt", "messages", "id", "tools", "reference", "answer", "reward")  # keys of a task; others are its meta
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_LISTED = 100  # number of columns up to which keys of objects are noted for errors
_TWICE = 16  # number of rows for which `build` is called twice, to see whether it returns the same
_MISSING = object()


class Place(NamedTuple):
    """Where a row is.

    Attributes:
        file: its file.
        number: of the row in the file, see `DataFile.rows`.
        label: file and split without the suffix and the folders that all files share, for ids.
    """

    file: DataFile
    number: int
    label: str

    @property
    def where(self) -> str:
        return self.file.where(self.number)

    @property
    def default_id(self) -> str:
        return f"{self.label}-{self.number}"


class RowConverter:
    """Makes the line of a task, see `parse_task`, from a row.

    Args:
        columns: key of the task -> column of the row, or ``column.key`` for a key of an object in a column. Empty: the
            columns are the keys.
        build: import path of a function that gets the row and returns the line or a `Task`, or None to skip the row.

    Raises:
        UserError: both are given, a key is a misspelled one of `KEYS`, or the function cannot be imported.
    """

    def __init__(self, columns: Mapping[str, str], build: str | None):
        if columns and build is not None:
            raise UserError("columns do nothing with build, whose function gets the whole row; remove one of them")
        for key in columns:
            if key not in KEYS and (near := did_you_mean(key, KEYS)):
                raise UserError(f"columns.{key}{near} (other keys of the task's meta must differ more)")
        if columns and ("prompt" in columns) == ("messages" in columns):
            raise UserError("columns: give the column of either prompt or messages")
        self.columns = dict(columns)
        self.build = None if build is None else import_function(build, "function of build")
        self.name = build
        self.unseen = dict(columns)  # columns that no row had so far
        self._keys: list[str] = []  # columns of the first row, and keys of objects in rows without one of `unseen`
        self._twice = _TWICE

    def line(self, row: Row, place: Place) -> bytes | None:
        """Return the task of a row as a line of JSON, with the id of the task; None if ``build`` skips the row.

        Args:
            row: the values of the columns.
            place: where the row is, for errors and for the id of a task without one.

        Raises:
            UserError: a column is missing, ``build`` failed, or a value is not text, a number, a list or an object.
        """
        if self.build is None:
            return self._encoded(self._renamed(row, place), place)
        again = copy.deepcopy(row) if self._twice else None
        line = self._encoded(self._built(row, place.where), place)
        if again is not None:
            self._twice -= 1
            if self._encoded(self._built(again, place.where), place) != line:
                raise UserError(
                    f"{place.where}: {self.name} returned another task when it was called again; it must return the "
                    "same for the same row: draw random numbers from random.Random(text of the row), and sort sets"
                )
        return line

    def _encoded(self, line: Row | None, place: Place) -> bytes | None:
        if line is None:
            return None
        if isinstance(line.get("prompt"), list) and "messages" not in line:  # a conversational prompt, as TRL calls it
            line["messages"] = line.pop("prompt")
        for key in ("messages", "tools", "reference"):
            if key in line:
                line[key] = _opened(line[key], key, place)
        line.setdefault("id", place.default_id)
        try:
            return _ENCODER.encode(line).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{place.where}: {_unusable(line, error)}") from None

    def check_unseen(self, name: str) -> None:
        """Raise `UserError` if there were rows, and none had one of the columns."""
        for key, column in self.unseen.items() if self._keys else ():
            empty = " with a value" * ("." in column)  # a table does not say which keys an empty object could have
            raise UserError(f"{name}: columns.{key}: {_no_column(column, self._keys, empty)}")

    def _note_keys(self, row: Row) -> None:
        nested = any("." in column for column in self.unseen.values())
        if not self._keys or (nested and len(self._keys) < _LISTED):
            self._keys = [*dict.fromkeys([*self._keys, *(_flat(row) if nested else row)])]

    def _renamed(self, row: Row, place: Place) -> Row:
        self._note_keys(row)
        if not self.columns:
            if self._keys and not ("prompt" in row or "messages" in row):
                raise UserError(
                    f"{place.where}: found the columns {', '.join(row) or 'none'}, expected prompt or messages; "
                    "name the columns to use, for example columns: {prompt: question, answer: answer}"
                )
            return {key: value for key, value in row.items() if value is not None}
        line: Row = {}
        for key, column in self.columns.items():
            value = _value(row, column)
            if value is _MISSING:
                if key in ("prompt", "messages") or (place.file.typed and "." not in column):
                    text = _no_column(column, [*_flat(row)] if "." in column else list(row))
                    header = " (the first line of a CSV file is its header)" if place.file.kind == "csv" else ""
                    raise UserError(f"{place.where}: columns.{key}: {text}{header}")
                continue
            if value is not None or column in row:  # an empty object can lack the key of ``column.key``
                self.unseen.pop(key, None)
            if value is not None or key in ("prompt", "messages"):
                line[key] = value
        return line

    def _built(self, row: Row, where: str) -> Row | None:
        assert self.build is not None
        try:
            made = self.build(row)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            columns = f"; columns are {', '.join(row)}" if isinstance(error, KeyError) else ""
            raise UserError(f"{where}: {self.name} failed ({text[:300]}){columns}") from error
        if isinstance(made, Task):
            clash = [key for key in made.meta if key in ("prompt", "messages", "id", "tools", "reference")]
            if clash:
                raise UserError(f"{where}: {self.name} returned a task with {clash[0]!r} in its meta")
            given = {"id": made.id, "messages": made.messages, "tools": made.tools, "reference": made.reference}
            made = {**given, **made.meta}
            if made["reference"] is None:
                del made["reference"]
        if made is None:
            return None
        if not isinstance(made, dict):
            kind = type(made).__name__
            raise UserError(
                f"{where}: {self.name} returned a {kind}, expected a dict with the keys of a task, or a Task"
            )
        return {str(key): _as_json(value) for key, value in made.items()}


def _no_column(column: str, keys: list[str], more: str = "") -> str:
    return f"no column {column!r}{more}; columns are {some(keys) or 'none'}{did_you_mean(column, keys)}"


def _flat(row: Row, above: str = "") -> Iterator[str]:
    """Yield the columns of a row, as ``column.key`` for the keys of objects."""
    for key, value in row.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


def _value(row: Row, column: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            return None if value is None else _MISSING
        value = value[part]
    return value


def _as_json(value: Any) -> Any:
    """Return a value of a user's function as one of JSON. Unlike `plain`, it keeps keys without a value."""
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return plain(value)


def _opened(value: Any, key: str, place: Place) -> Any:
    """Return messages or tools that a table stores as JSON text. A reference can be any text, so it stays as it is."""
    if isinstance(value, str) and key != "reference":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            text = f"{key}: found text that is not JSON, expected a list, or one as JSON"
            raise UserError(f"{place.where}: {text}") from None
    if isinstance(value, list):
        return [_opened_item(item) for item in value]
    return value


def _opened_item(item: Any) -> Any:
    if isinstance(item, str) and item.lstrip().startswith("{"):
        try:
            return json.loads(item)
        except (ValueError, RecursionError):
            return item
    return item


def _unusable(line: Row, error: Exception) -> str:
    """Return which value of a line cannot be written as JSON."""
    for key, value in line.items():
        try:
            _ENCODER.encode(value).encode()
        except UnicodeEncodeError:
            return f"{key}: found half of a surrogate pair, expected whole characters"
        except TypeError as of_key:
            kind = str(of_key).removeprefix("Object of type ").partition(" ")[0]
            more = " (an image or audio?)" if kind in ("bytes", "Image") else ""
            return f"{key}: found a value of type {kind}{more}, expected text, numbers, lists or objects"
        except (ValueError, RecursionError):
            return f"{key}: found a number that is not finite, or values that are nested too deeply"
    return str(error)


def file_rows(found: SplitFiles, split: str, place: int) -> Iterator[tuple[Place, Row | UserError]]:
    """Yield all rows of a file of a split; for an invalid row, the error.

    Raises:
        UserError: the file cannot be read to its end.
    """
    file, label = found.file(split, place), found.label(split, place)
    for number, row in file.rows():
        yield Place(file, number, label), row


def rows_of(found: SplitFiles, split: str) -> Iterator[tuple[Place, Row | UserError]]:
    """Yield the rows of an expression of splits, see `parts`, as `file_rows` does.

    Raises:
        UserError: a file cannot be read to its end, or the expression cannot be read.
    """
    for name, first, end in parts(found, split):
        files = range(found.count(name))
        yield from islice(chain.from_iterable(file_rows(found, name, place) for place in files), first, end)
