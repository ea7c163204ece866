"""Checkpoint files, and manifests that show whether a file is complete.

Next to ``NAME.ckpt`` is its manifest ``NAME.ckpt.json``, written after it: size and SHA-256 of the file, and its
position in the run. A file without a manifest, or one that differs from it, is not complete.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn

from ..distributed.collective import run_on_all_ranks
from ..errors import UserError
from .background import WRITER, free_memory, nbytes, snapshot
from .files import replace_file
from .finite import non_finite

FORMAT = 1
MEMORY = 0.8  # largest share of the free memory that a copy may use


class _Hashing:
    """A file wrapper that hashes everything written to it."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        written = self._file.write(data)
        self.size += memoryview(data).nbytes
        WRITER.progress += memoryview(data).nbytes
        return written

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> str:
        return self._hash.hexdigest()


def manifest_path(path: Path) -> Path:
    """Return the path of a checkpoint's manifest."""
    return path.with_name(path.name + ".json")


class UnwrittenCheckpoint(UserError):
    """A checkpoint could not be written. Raised only on rank 0, which writes: see `fail_on_all_ranks`."""


def save_checkpoint(checkpoint: dict[str, Any], path: Path, owned: tuple[str, ...] = ()) -> None:
    """Write a checkpoint on rank 0.

    Write it from a copy in the background if `WRITER.beside` is set and the copy fits in memory, otherwise at once.

    Args:
        checkpoint: the content.
        path: path of the file.
        owned: keys of the checkpoint whose CPU tensors are referenced nowhere else; they are not copied.

    Raises:
        UnwrittenCheckpoint: it cannot be written. In the background, `WRITER` keeps the error.
    """
    WRITER.size = nbytes(checkpoint)
    if WRITER.beside:
        mine = {key: value for key, value in checkpoint.items() if key in owned}
        others = {key: value for key, value in checkpoint.items() if key not in owned}
        needed, free = nbytes(others), free_memory()
        if needed < MEMORY * free:
            WRITER.add(partial(write_checkpoint, {**mine, **snapshot(others)}, path, processes()))
            return
        if not WRITER.complained:
            WRITER.complained = True
            rank_zero_warn(
                f"Training waits while checkpoints are written: a copy of {path.name} needs {in_words(needed)}, and "
                f"{in_words(free)} of memory are free."
            )
    WRITER.wait()  # one file at a time
    write_checkpoint(checkpoint, path)


def processes() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def write_checkpoint(checkpoint: dict[str, Any], path: Path, world_size: int | None = None) -> None:
    """Write a checkpoint, then its manifest.

    Args:
        checkpoint: the content.
        path: path of the file.
        world_size: number of processes of the run. None: that of the current process group.

    Raises:
        UnwrittenCheckpoint: it cannot be written, or holds non-finite numbers. No partial file remains, and other
            checkpoints are unchanged, including one of the same name.
    """
    from .. import __version__

    if (name := non_finite(checkpoint)) is not None:
        raise UnwrittenCheckpoint(
            f"the checkpoint {path} is not written: {name} holds numbers that are not finite after "
            f"{checkpoint.get('global_step', 0)} optimizer steps{_resumable(path.parent)}. Lower the learning "
            "rate, clip gradients (trainer.gradient_clip_val) or use a higher trainer.precision"
        )

    hashing: list[_Hashing] = []

    def save(file: IO[bytes], manifest: IO[bytes]) -> None:
        hashing.append(_Hashing(file))
        torch.save(checkpoint, cast(Any, hashing[0]))  # calls only write and flush
        content = {
            "format": FORMAT,
            "size": hashing[0].size,
            "sha256": hashing[0].digest(),
            "optimizer_steps": checkpoint.get("global_step", 0),
            "iteration": checkpoint.get("epoch", 0),
            "time": time.time(),
            "gear_lightning": __version__,
            "finite": True,
            "world_size": world_size or processes(),
        }
        manifest.write(json.dumps(content, indent=1).encode() + b"\n")
        manifest.flush()
        os.fsync(manifest.fileno())  # allocates its disk space before any file is replaced

    def save_both(manifest: IO[bytes]) -> None:  # the manifest is renamed into place after the file
        replace_file(path, lambda file: save(file, manifest), durable=True)

    try:
        _check_space(path)
        replace_file(manifest_path(path), save_both, durable=True)
    except (OSError, RuntimeError) as error:  # torch's writer wraps an OSError in a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or str(cause)
        after = f" after {in_words(hashing[0].size)}" if hashing else ""
        kept = _resumable(path.parent)
        raise UnwrittenCheckpoint(f"the checkpoint {path} cannot be written: {reason}{after}{kept}") from error


def _resumable(folder: Path) -> str:
    """Return the end of an error message: the newest checkpoint of a folder from which a run can resume."""
    whole = next((known.name for known, _ in known_checkpoints(folder) if unusable(known) is None), None)
    return f"; the run can resume from {whole}" if whole else ""


def _check_space(path: Path) -> None:
    """Check the free disk space before writing, because writing may take long.

    Raises:
        OSError: the largest checkpoint in the folder needs more space than is free.
    """
    sizes = [known.stat().st_size for known, _ in known_checkpoints(path.parent)]
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if sizes and free < max(sizes):
        raise OSError(errno.ENOSPC, f"{in_words(max(sizes))} are needed and {in_words(free)} are free")


def in_words(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"


@contextmanager
def fail_on_all_ranks(strategy: Strategy) -> Iterator[None]:
    """Context for saving a checkpoint on all ranks: if rank 0 cannot write it, all ranks raise.

    The other ranks wait for rank 0 in the barrier at the end of Lightning's ``save_checkpoint``. Without this context
    they would wait there until the collective times out.

    Raises:
        UserError: on all ranks.
    """
    failed: UnwrittenCheckpoint | None = None
    try:
        yield
    except UnwrittenCheckpoint as error:
        failed = error
        strategy.barrier("Trainer.save_checkpoint")

    def raise_failed() -> None:
        if failed is not None:
            raise failed

    run_on_all_ranks(raise_failed)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint and its manifest."""
    manifest_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove partial files of a process that was killed while writing. No process may write there meanwhile."""
    for path in [*folder.glob("*.ckpt.partial"), *folder.glob("*.ckpt.json.partial")]:
        path.unlink()


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint file; None if it is intact. Reads the whole file."""
    path = path.resolve()
    manifest = _manifest(path)
    if isinstance(manifest, str):
        return manifest
    size = path.stat().st_size
    if size != manifest["size"]:
        return f"it has {size:,} bytes of {manifest['size']:,}"
    content = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            content.update(block)
    return None if content.hexdigest() == manifest["sha256"] else "its content has changed since it was written"


def non_finite_values(path: Path) -> str | None:
    """Return which tensor of a checkpoint holds non-finite numbers; None if all are finite.

    Read the file only if its manifest was written by an earlier version that did not record this.
    """
    manifest = _manifest(path.resolve())
    if isinstance(manifest, dict) and manifest.get("finite"):
        return None
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # the code that loads the checkpoint reports this
        return None
    name = non_finite(found) if isinstance(found, dict) else None
    return None if name is None else f"{name} holds numbers that are not finite"


def unusable(path: Path) -> str | None:
    """Return why a run cannot resume from a checkpoint (`damage`, then `non_finite_values`); None if it can."""
    return damage(path) or non_finite_values(path)


def _manifest(path: Path) -> dict[str, Any] | str:
    """Return the manifest of a checkpoint, or a text that says what is wrong with it."""
    place = manifest_path(path)
    if not place.exists():
        return f"{place.name} is missing: the checkpoint was not written completely, or was copied without it"
    try:
        found = json.loads(place.read_text())
        order = [float(found[key]) for key in ("optimizer_steps", "iteration", "time", "size")]
        return {**found, "order": order[:3]} if found["format"] == FORMAT else f"{place.name} is of another version"
    except (ValueError, KeyError, TypeError, OSError):
        return f"{place.name} cannot be read"


def known_checkpoints(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the checkpoints of a folder that have a manifest, with it, latest in training first.

    The files are not hashed.
    """
    found = []
    for path in folder.glob("*.ckpt"):
        if path.is_file() and not path.is_symlink() and isinstance(manifest := _manifest(path), dict):
            found.append((path, manifest))
    return sorted(found, key=lambda pair: (pair[1]["order"], pair[0].name), reverse=True)


def newest_complete(folder: Path) -> Path | None:
    """Return the latest checkpoint in training that is complete and finite; None if there is none.

    Invalid checkpoints that would come before it are reported on stderr with the reason, and not removed.
    """
    known = known_checkpoints(folder)
    chosen, bad = None, {}
    for path, _ in known:
        if (wrong := unusable(path)) is None:
            chosen = path
            break
        bad[path] = wrong
    since = 0 if chosen is None else chosen.stat().st_mtime_ns
    for path in folder.glob("*.ckpt"):
        if path.is_file() and not path.is_symlink() and path not in dict(known) and path.stat().st_mtime_ns >= since:
            bad[path] = str(_manifest(path))
    for path, wrong in bad.items():
        print(f"checkpoint {path} is skipped: {wrong}", file=sys.stderr)
    return chosen


def resolve(path: Path) -> Path:
    """Return the file to resume from, the same on all ranks. All ranks must call it; only rank 0 reads the file.

    Args:
        path: a checkpoint, or a folder, which stands for the newest complete checkpoint in it.

    Raises:
        UserError: on all ranks: there is no checkpoint, or it is not complete.
    """
    several = dist.is_available() and dist.is_initialized()
    mine = not several or dist.get_rank() == 0
    found: list[Path | None] = [run_on_all_ranks(lambda: _resolve(path) if mine else None)]
    if several:
        dist.broadcast_object_list(found, src=0)
    assert found[0] is not None
    return found[0]


def _resolve(path: Path) -> Path:
    if path.is_dir():
        newest = newest_complete(path)
        if newest is None:
            raise UserError(f"there is no complete checkpoint in {path}; move its .ckpt files away to start a new run")
        return newest
    check_whole(path)
    return path


def check_whole(path: Path) -> None:
    """Check a checkpoint that the user named. Accept one without a manifest, with a message.

    Raises:
        UserError: the file does not exist, differs from its manifest, or holds non-finite numbers.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    if not manifest_path(path.resolve()).exists():
        print(f"{path} has no manifest ({path.name}.json), so it is not known whether it is complete", file=sys.stderr)
    elif (wrong := damage(path)) is not None:
        raise UserError(f"{path} is damaged: {wrong}")
    if (wrong := non_finite_values(path)) is not None:
        raise UserError(f"{path} is not used: {wrong}; give an earlier checkpoint")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint as plain data and tensors, memory-mapped from the file.

    Raises:
        UserError: the file is not a checkpoint, or holds objects other than data.
    """
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise UserError(f"{path} cannot be read as a checkpoint ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict) or not {"state_dict", "policy_files", "pytorch-lightning_version"} <= found.keys():
        raise UserError(f"{path}: not a checkpoint of gear_lightning")
    return found


class CompleteCheckpoints(TorchCheckpointIO):
    """Writes, reads and removes Lightning's checkpoints of one device and of DDP with the functions above."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        save_checkpoint(checkpoint, Path(path), owned=("teacher_shadow",))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, True)
        return read_checkpoint(resolve(Path(path)))

    def remove_checkpoint(self, path: Any) -> None:
        if "://" in str(path):
            return super().remove_checkpoint(path)
        remove_checkpoint(Path(path))
