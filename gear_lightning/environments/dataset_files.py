"""Finds the files of a data set: one file, files of a pattern, a directory, or a name on the Hugging Face Hub.

``datasets`` finds the splits of directories and of the Hub's data sets, and downloads files. It runs no code of a data
set: its versions from 4 on refuse those that need code.
"""

import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from os.path import commonpath
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ..errors import UserError, require_extra
from ..hints import did_you_mean
from ..runs.files import cache_dir, replace_text, try_to_write
from .lines import COMPRESSED
from .row_files import KINDS, DataFile

HUB_SECONDS = 20.0  # how long an answer of the Hub may take
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_WHOLE = re.compile(r"[\w.-]+( *\+ *[\w.-]+)*")


class SplitFiles:
    """The files of each split of a data set.

    Args:
        name: of the data set, for messages.
        files: split -> its files: paths, or addresses on the Hub.
        fetch: returns one of the files; downloads it if it is on the Hub and not in its cache.
    """

    def __init__(self, name: str, files: Mapping[str, Sequence[Path | str]], fetch: Callable[[Any], DataFile]):
        self.name = name
        self.splits = list(files)
        self._files = files
        self._fetch = fetch
        folders = [Path(str(file)).parent for found in files.values() for file in found]
        self._shared = commonpath(folders) if folders else ""

    def count(self, split: str) -> int:
        """Return the number of files of a split."""
        return len(self._files[split])

    def file(self, split: str, place: int) -> DataFile:
        """Return a file of a split.

        Raises:
            UserError: it cannot be downloaded.
        """
        return self._fetch(self._files[split][place])

    def identity(self, split: str, place: int) -> tuple[str, int | None]:
        """Return the label of a file and its bytes, or its address on the Hub, which contains the commit, and None."""
        file = self._files[split][place]
        return (file, None) if isinstance(file, str) else (self.label(split, place), file.stat().st_size)

    def label(self, split: str, place: int) -> str:
        """Return the name of a file without its suffixes and the folders that all files share."""
        path = Path(str(self._files[split][place]))
        path = path.relative_to(self._shared) if self._shared else path
        while path.suffix in {*KINDS, *COMPRESSED}:
            path = path.with_suffix("")
        return path.as_posix()


def find_files(path: str, name: str | None, revision: str | None) -> SplitFiles:
    """Return the files of a data set by split.

    Args:
        path: a file (its split is ``train``), a pattern such as ``data/*.parquet`` (``train``), a directory, or a name
            on the Hub.
        name: of the configuration.
        revision: branch, tag or commit of a data set on the Hub.

    Raises:
        UserError: there is no such data set; an option does nothing for this kind of path.
    """
    place = Path(path).expanduser()
    hub = not place.exists() and not glob.has_magic(path)
    if name is not None and not (hub or place.is_dir()):
        raise UserError(f"name={name} does nothing for {path}; it is the configuration of a directory or of the Hub")
    if revision is not None and not hub:
        raise UserError(f"revision={revision} does nothing for {path}; it is a version of a data set on the Hub")
    if place.is_dir():
        return _saved(place, name) or _directory(path, place, name)
    if hub:
        if not _HUB_NAME.fullmatch(path) or Path(path).suffix in {*KINDS, ".gz", ".zst"}:
            raise UserError(f"{path} does not exist")
        return _hub(path, name, revision)
    files = [place] if place.is_file() else [Path(file) for file in sorted(glob.glob(str(place), recursive=True))]
    if not files:
        raise UserError(f"{path}: no file has such a name")
    return SplitFiles(path, {"train": files}, DataFile)


def _saved(folder: Path, name: str | None) -> SplitFiles | None:
    """Return the files of a directory that ``save_to_disk`` wrote; None for any other directory."""
    listed = folder / "dataset_dict.json"
    if not listed.is_file() and not (folder / "state.json").is_file():
        return None
    if name is not None:
        raise UserError(f"name={name} does nothing for {folder}, which save_to_disk wrote")
    try:
        splits = json.loads(listed.read_text())["splits"] if listed.is_file() else ["train"]
        files: dict[str, list[Path]] = {}
        for split in splits:
            inner = folder / split if listed.is_file() else folder
            state = json.loads((inner / "state.json").read_text())
            files[split] = [inner / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: not a whole directory of save_to_disk ({type(error).__name__}: {error})") from None
    return SplitFiles(str(folder), files, DataFile)


def _builder(path: str, **options: Any) -> Any:
    """Return the builder of `datasets` for a directory or a name on the Hub."""
    require_extra("datasets")
    import datasets
    import huggingface_hub

    loggers = [datasets.logging, huggingface_hub.logging]  # they report that a directory has no README
    before = [logger.get_verbosity() for logger in loggers]
    try:
        for logger in loggers:
            logger.set_verbosity_error()
        return datasets.load_dataset_builder(path, **options)
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.set_verbosity(level)


def _directory(shown: str, folder: Path, name: str | None) -> SplitFiles:
    try:
        builder = _builder(str(folder.resolve()), name=name)
    except Exception as error:
        raise UserError(f"{shown}: {_short(error)}") from None
    delimiter = _delimiter(shown, builder)
    files = {str(split): [Path(file) for file in found] for split, found in builder.config.data_files.items()}
    return SplitFiles(shown, files, lambda file: DataFile(file, delimiter))


def _hub(path: str, name: str | None, revision: str | None) -> SplitFiles:
    """Return the files of a data set on the Hub. Without access to the Hub, those that are in its cache."""
    require_extra("datasets")
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    identity = repr([path, name, revision, constants.ENDPOINT]).encode()
    kept = cache_dir() / "hub" / f"{hashlib.sha256(identity).hexdigest()[:32]}.json"
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        HfApi().dataset_info(path, revision=revision, timeout=HUB_SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        text = "neither a file or directory here nor a data set that the Hub shows"
        raise UserError(f"{path}: {text} ({_short(error)})") from None
    except Exception as error:
        with suppress(OSError, ValueError):
            listed = json.loads(kept.read_text())
            return SplitFiles(path, listed["files"], lambda url: DataFile(_downloaded(path, url), listed["delimiter"]))
        try:
            # the pattern, because the cache of the other files need not be complete
            folder = snapshot_download(
                path, repo_type="dataset", revision=revision, allow_patterns="README.md", local_files_only=True
            )
        except Exception:
            raise UserError(
                f"{path}: not a file or directory here, not in the cache of the Hub, and the Hub cannot be reached "
                f"({_short(error)}); where it can be reached, run: hf download --repo-type dataset {path}"
            ) from None
        return _directory(path, Path(folder), name)
    try:
        builder = _builder(path, name=name, revision=revision)
    except Exception as error:
        raise UserError(f"{path}: {_short(error)}") from None
    delimiter = _delimiter(path, builder)
    files = {str(split): list(urls) for split, urls in builder.config.data_files.items()}
    listing = json.dumps({"files": files, "delimiter": delimiter})
    try_to_write("lists of the files of data sets", lambda: replace_text(kept, listing))
    return SplitFiles(path, files, lambda url: DataFile(_downloaded(path, url), delimiter))


def _downloaded(path: str, url: str) -> Path:
    """Return the copy of a file in the Hub's cache; downloads it if there is none."""
    from huggingface_hub import hf_hub_download

    repo, _, rest = url.removeprefix("hf://datasets/").partition("@")
    commit, _, file = rest.partition("/")
    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset", revision=unquote(commit)))
    except Exception as error:
        raise UserError(f"{path}: {file} cannot be downloaded ({_short(error)})") from None


def _delimiter(shown: str, builder: Any) -> str | None:
    """Return the delimiter of a data set's CSV files; None for the usual one."""
    if getattr(builder.config, "field", None) is not None:
        raise UserError(f"{shown}: rows below the key {builder.config.field!r} of a JSON file are not supported")
    delimiter = getattr(builder.config, "sep", ",")
    return None if delimiter == "," else delimiter


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def check_split(found: SplitFiles, split: str) -> list[str]:
    """Return the names of the splits in an expression such as ``train[:90%]+test``.

    Raises:
        UserError: there is no such split; lists those that exist.
    """
    names = [part.split("[")[0].strip() for part in split.split("+")]
    for name in names:
        if name not in found.splits:
            known = ", ".join(found.splits) or "none"
            raise UserError(f"{found.name}: no split {name!r}; splits are {known}{did_you_mean(name, found.splits)}")
    return names


def is_whole(split: str) -> bool:
    """Return whether an expression names splits without slices, such as ``train`` or ``train+test``."""
    return _WHOLE.fullmatch(split) is not None


def parts(found: SplitFiles, split: str) -> Iterator[tuple[str, int, int | None]]:
    """Yield the splits of an expression with the first row and the end of the rows to use; None is the split's end.

    Raises:
        UserError: the expression cannot be read.
    """
    if is_whole(split):
        yield from ((name, 0, None) for name in check_split(found, split))
        return
    require_extra("datasets")
    from datasets import ReadInstruction

    names = check_split(found, split)
    try:
        sizes = dict.fromkeys(names, 1 << 60)
        ReadInstruction.from_spec(split).to_absolute(sizes)  # reading the rows to count them may take long
        for name in sizes:
            sizes[name] = sum(found.file(name, place).count() for place in range(found.count(name)))
        wanted = ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"split={split}: {_short(error)}") from None
    yield from ((part.splitname, part.from_, part.to) for part in wanted)
