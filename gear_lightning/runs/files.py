"""Files that are there whole or not at all, what a full disk costs, and the cache."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.utilities import rank_zero_warn

from ..errors import UserError


def replace_file(path: Path, write: Callable[[IO[bytes]], Any], *, durable: bool = False) -> None:
    """Put a file in place of the one there, in one go: readers and kills see the old one or the new one.

    Args:
        path: of the file; its folder is made.
        write: writes the content into an open binary file.
        durable: wait until the content is on the disk, so that it outlives a crash of the machine.

    Raises:
        OSError: it cannot be written; nothing of it is left behind.
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
    """Have the names in a folder on the disk, where its file system can tell."""
    place = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(place)
    finally:
        os.close(place)


def replace_text(path: Path, text: str, *, durable: bool = False) -> None:
    """`replace_file` with text, in UTF-8; what UTF-8 has no word for becomes a question mark."""
    replace_file(path, lambda file: file.write(text.encode("utf-8", "replace")), durable=durable)


def check_place(path: Path) -> None:
    """Look at whether a file that a command is to write has a place, before the work that it tells of.

    Raises:
        UserError: its folder is not there, or it is a folder itself.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it, as {path / 'NAME'}")


def write_asked(path: Path, text: str) -> None:
    """`replace_text` with what a command was asked for.

    Raises:
        UserError: it cannot be written.
    """
    try:
        replace_text(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from None


_failing: set[str] = set()  # kinds of files that could not be written the last time


def try_to_write(kind: str, write: Callable[[], Any]) -> bool:
    """Write something that training can do without. Where the disk is full, or gone, training goes on: one warning
    tells, and the next file of the kind is tried again.

    Args:
        kind: what it is, for the warning: "rollout records".
        write: does it.

    Returns:
        Whether it was written.
    """
    try:
        write()
    except OSError as error:
        if kind not in _failing:
            _failing.add(kind)
            where = f" ({error.filename})" if error.filename else ""
            rank_zero_warn(f"The {kind} cannot be written{where}: {error.strerror or error}. Training goes on without.")
        return False
    if kind in _failing:
        _failing.discard(kind)
        rank_zero_warn(f"The {kind} are written again.")
    return True


def hold(path: Path, busy: str) -> IO[str]:
    """Lock a file for as long as it is open, on file systems that have locks.

    Raises:
        UserError: another process holds it; says ``busy``.
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
    """Folder for what is made once: converted weights, warm starts, indices and checks of task files.

    ``GEAR_LIGHTNING_CACHE``, else ``~/.cache/gear_lightning``.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gear_lightning"
    return Path(os.environ.get("GEAR_LIGHTNING_CACHE", default))


def build_once(folder: Path, build: Callable[[Path], Any]) -> Path:
    """Fill ``folder`` by calling ``build(partial_folder)`` unless it exists; a kill leaves no half of it."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name + ".partial-"))
        try:
            build(partial)
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder
