"""Atomic file writes, writes that may fail on a full disk, locks, and the cache."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ..errors import UserError


def replace_file(path: Path, write: Callable[[IO[bytes]], Any], *, durable: bool = False) -> None:
    """Write a file atomically: readers, also after a kill, see either the old or the new content.

    Args:
        path: path of the file; its folder is created.
        write: writes the content into an open binary file.
        durable: wait until the content is on the disk, so that it survives a crash of the machine.

    Raises:
        OSError: it cannot be written; no partial file remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Sync a folder's entries to the disk, if its file system supports it."""
    place = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(place)
    finally:
        os.close(place)


def replace_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write text atomically in UTF-8, see `replace_file`. Characters that UTF-8 cannot encode become question marks."""
    replace_file(path, lambda file: file.write(text.encode("utf-8", "replace")), durable=durable)


def check_place(path: Path) -> None:
    """Check that a command can write its output file, before the command does its work.

    Raises:
        UserError: the folder of the file does not exist, or the path is a folder.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file in it, such as {path / 'NAME'}")


def write_asked(path: Path, text: str) -> None:
    """Write the output file of a command, see `replace_text`.

    Raises:
        UserError: it cannot be written.
    """
    try:
        replace_text(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from None


_failing: set[str] = set()  # kinds of files whose last write failed


def try_to_write(kind: str, write: Callable[[], Any]) -> bool:
    """Write a file that training does not need. If the disk is full or unavailable, warn once and continue training.

    The next file of the same kind is tried again.

    Args:
        kind: what is written, for the warning, for example "rollout records".
        write: writes the file.

    Returns:
        Whether it was written.
    """
    try:
        write()
    except OSError as error:
        if kind not in _failing:
            _failing.add(kind)
            where = f" ({error.filename})" if error.filename else ""
            _warn(f"The {kind} cannot be written{where}: {error.strerror or error}. Training continues.")
        return False
    if kind in _failing:
        _failing.discard(kind)
        _warn(f"The {kind} are written again.")
    return True


def hold(path: Path, busy: str) -> IO[str]:
    """Lock a file for as long as it is open, if the file system supports locks.

    Args:
        path: path of the file.
        busy: error message if another process holds the lock.

    Raises:
        UserError: another process holds the lock.
    """
    import fcntl

    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(busy) from None
    except OSError:
        return file
    return file


def cache_dir() -> Path:
    """Return the cache folder for converted weights, warm starts, indices and checks of task files.

    It is ``GEAR_LIGHTNING_CACHE`` if set, else ``~/.cache/gear_lightning``.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gear_lightning"
    return Path(os.environ.get("GEAR_LIGHTNING_CACHE", default))


def build_once(folder: Path, build: Callable[[Path], Any]) -> Path:
    """Create ``folder`` by calling ``build(partial_folder)`` unless it exists; a kill leaves no incomplete folder."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name + ".partial-"))
        try:
            build(partial)
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # if it exists, another process has built it first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _warn(text: str) -> None:
    from lightning.pytorch.utilities import rank_zero_warn  # not above: commands that only read files start without it

    rank_zero_warn(text)
