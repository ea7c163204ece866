"""Loggers of a run: the metrics file, and TensorBoard events that survive a full disk."""

import csv
import io
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from .files import replace_text, try_to_write


class MetricsFile(Logger):
    """Writes ``metrics.csv`` into the run directory: one row per step and one column per metric.

    Each write replaces the file atomically. A resumed run continues the file from the row of its first step and
    replaces later rows. (Lightning's CSVLogger deletes the file of an earlier start.)

    Args:
        save_dir: the run directory.
        filename: name of the file in it.
    """

    def __init__(self, save_dir: str, filename: str = "metrics.csv"):
        super().__init__()
        self._path = Path(save_dir) / filename
        self._rows: list[dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def log_dir(self) -> str:
        """Folder for other files of the run."""
        return str(self._path.parent)

    @property
    def save_dir(self) -> str:
        return str(self._path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        return None

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        metrics, step = dict(metrics), step or 0
        if self._rows is None:
            self._rows = [row for row in self._read() if int(row["step"]) <= step]
        if not self._rows or int(self._rows[-1]["step"]) != step:
            self._rows.append({"step": step})
        self._rows[-1].update(metrics)
        try_to_write("metrics", self._write)

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open(newline="") as file:
            return [{k: v for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(file)]

    def _write(self) -> None:
        assert self._rows is not None
        columns = sorted({key for row in self._rows for key in row} - {"step", "epoch"})
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["step", "epoch", *columns], restval="")
        writer.writeheader()
        writer.writerows(self._rows)
        replace_text(self._path, text.getvalue())


class Board(TensorBoardLogger):
    """Lightning's TensorBoardLogger, but on a full disk it warns and stops logging instead of ending the run."""

    _failed: tuple[int, str] | None = None  # errno and text: why there is no event file

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """TensorBoard's writer.

        Raises:
            AttributeError: the event file could not be created, so that ``hasattr`` returns False. It is not retried,
                because each attempt would leave a thread behind.
        """
        if self._failed is None:
            try:
                return super().experiment
            except OSError as error:
                self._failed = error.errno or 0, error.strerror or str(error)
        raise AttributeError("there is no event file")

    def _try(self, write: Callable[[], None]) -> None:
        def unwrapped() -> None:
            try:
                if self._failed is None:
                    write()
            except AttributeError:
                if self._failed is None:
                    raise
            except ValueError as error:  # Lightning wraps any error in a ValueError
                raise (error.__cause__ if isinstance(error.__cause__, OSError) else error) from None
            if self._failed is not None:
                raise OSError(*self._failed)

        try_to_write("TensorBoard events", unwrapped)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._try(lambda: TensorBoardLogger.log_metrics(self, metrics, step))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self._try(lambda: TensorBoardLogger.log_hyperparams(self, params, *args, **kwargs))

    def log_text(self, name: str, text: str, step: int) -> None:
        """Log a text under a name."""
        self._try(lambda: self.experiment.add_text(name, text, step))

    @rank_zero_only
    def save(self) -> None:
        self._try(lambda: TensorBoardLogger.save(self))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._try(lambda: TensorBoardLogger.finalize(self, status))
