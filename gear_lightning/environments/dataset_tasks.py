"""Tasks from a data set: files of many kinds, a directory, or a name on the Hugging Face Hub."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from ..runs.identity import file_digest
from . import dataset_files, dataset_rows, row_files
from .base import Task
from .dataset_files import SplitFiles, check_split, find_files
from .dataset_rows import RowConverter, rows_of
from .jsonl import SharedSettings, check_named, code_digests, noted, parse_task
from .lines import IndexedLines, LineSource, LineTasks, digest_of, index_source
from .row_files import DataFile


class TaskLines(LineSource):
    """The tasks of a split, as lines of JSON.

    Args:
        found: the files.
        split: split, or an expression such as ``train[:90%]``.
        converter: makes tasks of rows.
        limit: number of tasks. None: all.
    """

    def __init__(self, found: SplitFiles, split: str, converter: RowConverter, limit: int | None):
        self.name = found.name
        self.found, self.split, self.converter, self.limit = found, split, converter, limit
        self.starts: list[int] = []  # number of the first line of each file
        self.places: list[str] = []  # the places of these rows, up to their numbers
        files = [
            (found.file(name, place), found.label(name, place))
            for name in dict.fromkeys(check_split(found, split))
            for place in range(found.count(name))
        ]
        sha = hashlib.sha256()
        self.size = 0
        for file, label in files:
            sha.update(f"{label}\n".encode("utf-8", "surrogatepass"))
            try:
                with file.path.open("rb") as opened:
                    self.size += opened.seek(0, 2)
                    opened.seek(0)
                    sha.update(digest_of(opened).encode())
            except OSError as error:
                raise UserError(f"{file.path}: cannot be read ({error.strerror})") from None
        self.digest = sha.hexdigest()

    def lines(self) -> Iterator[tuple[int, bytes]]:
        tasks, number, start = 0, -1, 0
        file: DataFile | None = None
        self.starts.clear()
        self.places.clear()
        for place, row in rows_of(self.found, self.split):
            if place.file is not file:
                start = number + 1
                self.starts.append(start)
                self.places.append(place.file.prefix)
            file, number = place.file, start + place.number
            if isinstance(row, UserError):
                raise row
            line = self.converter.line(row, place)
            if line is not None:
                yield number, line
                tasks += 1
                if tasks == self.limit:
                    break
        self.converter.check_unseen(self.name)

    def where(self, number: int) -> str:
        place = bisect_right(self.starts, number) - 1
        return row_files.where(self.places[place], number - self.starts[place])


@dataclass(frozen=True)
class DatasetTasks(LineTasks):
    """Tasks from a data set: parquet, Arrow, CSV, JSON or JSON Lines files, or a name on the Hugging Face Hub.

    A row becomes a task by its columns, which have the meaning of the keys of `JsonlTasks`: without ``columns`` and
    ``build``, all columns are used under their names. Empty cells count as missing, and so do empty keys of objects.
    All cells of a CSV file are text. Messages and tools may be JSON text. Times become ISO 8601 text. Images and other
    binary values are refused. No code of a data set is run; a row can only name the rewards in ``rewards``.
    All rows are read and checked before training. The tasks of data of more than 4 MiB are then stored in the cache,
    so this happens once, except with ``build``, whose code can depend on anything. A process holds the positions of the
    tasks in memory, and reads single tasks. For data that is too large for this, see `StreamedTasks`.

    Args:
        path: a .parquet, .arrow, .csv, .tsv, .json or .jsonl file (text also as .gz or .zst); a pattern of files, such
            as ``data/*.parquet``; a directory of such files, or of ``save_to_disk``; or a name on the Hub. Parquet,
            Arrow, .zst, directories and the Hub require the extra ``datasets``.
        split: split, or an expression of splits and slices, such as ``train[:90%]`` or ``train+test``. The split of a
            file, or of the files of a pattern, is ``train``.
        name: configuration of a directory, or of a data set on the Hub. Null: the default one.
        revision: branch, tag or commit of a data set on the Hub. Null: its newest version.
        columns: column of each key, for example ``{prompt: question, answer: answer, reference: solution}``. Other
            columns are not used. A column can be ``column.key`` for a key of an object. Other keys than those of
            `JsonlTasks` go to the task's ``meta``.
        build: import path of a function that gets a row (a dict) and returns a dict with the keys of `JsonlTasks`, a
            `Task`, or None to leave the row out. It must return the same for the same row.
        limit: number of tasks to use, from the start of the split; further rows are not read. Null: all.
        reward: reward of the tasks that name none; a built-in reward or an import path. Null: the environment's.
        tools: import paths of functions whose schemas are added to every task, for `FunctionTools`.
        rewards: import paths of rewards that rows may name.
    """

    path: str
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    build: str | None = None
    limit: int | None = None
    reward: str | None = None
    tools: list[str] = field(default_factory=list)
    rewards: list[str] = field(default_factory=list)

    def __post_init__(self):
        shared = SharedSettings(self.limit, self.reward, self.tools, self.rewards)
        converter = RowConverter(self.columns, self.build)
        source = TaskLines(find_files(self.path, self.name, self.revision), self.split, converter, self.limit)
        named: dict[str, int] = {}  # reward -> number of the first row that names it

        def parse(number: int, line: dict[str, Any]) -> Task:
            return parse_task(line, source.where(number), "", self.rewards)

        notes = {"rewards": named, "starts": source.starts, "places": source.places}
        modules = (dataset_files, dataset_rows, row_files)
        code = [file_digest(str(module.__file__)) for module in modules] + [file_digest(__file__), *code_digests()]
        rules = [self.path, self.split, self.name, sorted(self.columns.items()), self.limit, sorted(self.rewards), code]
        lines = index_source(source, None if self.build else repr(rules), noted(parse, named), notes)
        source.starts, source.places = notes["starts"], notes["places"]
        if not len(lines):
            rows = "build skipped all rows" if self.build else "there are no rows"
            raise UserError(f"{self.path}: {rows} in the split {self.split!r}")
        check_named(notes["rewards"], source.where)
        for key, value in {"_lines": lines, "_shared": shared}.items():
            object.__setattr__(self, key, value)

    def __getitem__(self, index: int) -> Task:
        lines: IndexedLines = self._lines  # type: ignore[attr-defined]
        number, line = lines[range(self.size)[index]]
        return self._shared.complete(parse_task(line, lines.source.where(number), "", self.rewards))  # type: ignore[attr-defined]

    @property
    def digest(self) -> str:
        index = self._lines.index  # type: ignore[attr-defined]
        return hashlib.sha256(index["crc"].tobytes() + index["length"].tobytes()).hexdigest()  # also of what build made

    @property
    def fingerprint(self) -> str | None:
        shared = self._shared.identity(self._lines.notes["rewards"])  # type: ignore[attr-defined]
        return None if shared is None else repr([self.digest, self, shared])
