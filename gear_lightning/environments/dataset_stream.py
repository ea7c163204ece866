"""Tasks from a data set that is too large to be checked and indexed: its rows are read in order, again and again."""

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields

from lightning.pytorch.utilities import rank_zero_warn

from ..errors import UserError
from .base import Task, TaskSource
from .dataset_files import SplitFiles, check_split, find_files, is_whole
from .dataset_rows import Place, RowConverter, file_rows
from .jsonl import SharedSettings, parse_task
from .lines import parsed

Placed = tuple[Task, str]  # a task, and the place of its row

RECENT = 1024  # number of the newest tasks that are kept for another access
_HOPELESS = 100  # number of rows without a valid one at which a pass ends with an error


class Passes:
    """Access by index to the tasks of endless passes over rows, each with the place of its row.

    Args:
        name: of the data set, for errors.
        read: returns the tasks of a pass and their places. All passes must have the same number of tasks.
    """

    def __init__(self, name: str, read: Callable[[int], Iterator[Placed]]):
        self.name = name
        self.read = read
        self.length: int | None = None  # tasks of a pass; None until a pass has ended
        self.recent: deque[Placed] = deque(maxlen=RECENT)  # the last ones are before `next`
        self._begin(0)

    def _begin(self, number: int) -> None:
        self.number = number
        self.next = number * (self.length or 0)  # index of the next task
        self.recent.clear()
        self.tasks = self.read(number)

    def __getitem__(self, index: int) -> Placed:
        if index < self.next - len(self.recent) or (self.length and index // self.length > self.number):
            self._begin(index // self.length if self.length else 0)
        while index >= self.next:
            task = next(self.tasks, None)
            if task is not None:
                self.recent.append(task)
                self.next += 1
                continue
            if self.length is None:
                self.length = self.next
            if not self.length:
                raise UserError(f"{self.name}: found no tasks")
            self._begin(index // self.length)
        return self.recent[index - self.next]


@dataclass(frozen=True)
class StreamedTasks(TaskSource):
    """Tasks from a large data set, without a check of all rows before training and without a copy.

    Rows become tasks as in `DatasetTasks`. Training reads them in passes that do not end. Each pass has another order,
    which ``seed`` determines: the files are shuffled, and each task is drawn from the next ``buffer`` tasks. All ranks
    read the same rows in the same order, and each uses its share. A resume reads the rows of the pass again up to its
    place, so it continues with the same tasks. Files of the Hub are downloaded when they are reached, and stay in its
    cache. A row that is not a valid task is left out, with a warning; ids need not be unique.

    Args:
        path: as in `DatasetTasks`.
        split: split, or splits such as ``train+test``; slices require `DatasetTasks`.
        name: configuration of a directory, or of a data set on the Hub. Null: the default one.
        revision: branch, tag or commit of a data set on the Hub. Null: its newest version.
        columns: as in `DatasetTasks`.
        build: as in `DatasetTasks`.
        buffer: number of tasks in memory from which the next one is drawn. 1: the order of the files and rows.
        seed: seed of the order.
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
    buffer: int = 1000
    seed: int = 0
    reward: str | None = None
    tools: list[str] = field(default_factory=list)
    rewards: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.buffer < 1:
            raise UserError(f"buffer={self.buffer}: must be at least 1")
        shared = SharedSettings(None, self.reward, self.tools, self.rewards)
        RowConverter(self.columns, self.build)
        found = find_files(self.path, self.name, self.revision)
        if not is_whole(self.split):
            raise UserError(f"split={self.split}: a stream has no slices; use DatasetTasks, or name whole splits")
        files = [(name, place) for name in check_split(found, self.split) for place in range(found.count(name))]
        reader = _Reader(self, shared, found, files)
        for key, value in {"_reader": reader, "_passes": Passes(self.path, reader.read)}.items():
            object.__setattr__(self, key, value)

    def __reduce__(self):
        return type(self), tuple(getattr(self, f.name) for f in fields(self))

    @property
    def size(self) -> None:
        return None

    def __getitem__(self, index: int) -> Task:
        return self._passes[index][0]  # type: ignore[attr-defined]

    def place_of(self, index: int) -> str:
        return self._passes[index][1]  # type: ignore[attr-defined]

    @property
    def digest(self) -> str:
        return self._reader.digest  # type: ignore[attr-defined]


class _Reader:
    """Reads the tasks of a pass."""

    def __init__(self, options: StreamedTasks, shared: SharedSettings, found: SplitFiles, files: list[tuple[str, int]]):
        self.options, self.shared, self.found, self.files = options, shared, found, files
        self.reported = False  # whether the rows that were left out have been reported

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr([self.found.identity(*file) for file in self.files]).encode()).hexdigest()

    def read(self, number: int) -> Iterator[Placed]:
        draw = random.Random(f"stream-{self.options.seed}-{number}")
        files, size = list(self.files), self.options.buffer
        if size > 1:
            draw.shuffle(files)
        waiting: list[Placed] = []
        for task in self._valid(files):
            waiting.append(task)
            if len(waiting) == size:
                place = draw.randrange(size)
                waiting[place], waiting[-1] = waiting[-1], waiting[place]
                yield waiting.pop()
        if size > 1:
            draw.shuffle(waiting)
        yield from waiting

    def _valid(self, files: list[tuple[str, int]]) -> Iterator[Placed]:
        converter = RowConverter(self.options.columns, self.options.build)
        valid, left_out, first = 0, 0, None
        for name, place in files:
            for at, row in file_rows(self.found, name, place):
                try:
                    task = self._task(converter, at, row)
                except UserError as error:
                    if first is None and not self.reported:
                        rank_zero_warn(f"{error}. This row is left out, like others that are not valid tasks")
                    first, left_out = first or error, left_out + 1
                    if not valid and left_out == _HOPELESS:
                        raise UserError(f"none of {left_out} rows is a valid task; the last: {error}") from None
                    continue
                if task is not None:
                    valid += 1
                    yield task, at.where
        converter.check_unseen(self.options.path)
        if first is not None and not valid:
            raise first
        if first is not None and not self.reported:
            self.reported = True
            rank_zero_warn(f"{self.options.path}: {left_out} of {left_out + valid} rows were left out")

    def _task(self, converter: RowConverter, at: Place, row: object) -> Task | None:
        if isinstance(row, UserError):
            raise row
        assert isinstance(row, dict)
        line = converter.line(row, at)
        if line is None:
            return None
        return self.shared.complete(parse_task(parsed(line, at.where), at.where, "", self.options.rewards))
