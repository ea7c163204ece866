"""Shared fixtures: a tiny policy over the lookup chain's words, and a cache that no test shares with the user."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import small_disk
from quick_start import QuickStart

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("GEAR_LIGHTNING_CACHE", str(base))


@pytest.fixture(scope="session")
def quick() -> Iterator[QuickStart]:
    """The server of quick starts."""
    server = QuickStart()
    yield server
    server.stop()


@pytest.fixture
def starts_quickly(quick: QuickStart, monkeypatch: pytest.MonkeyPatch) -> None:
    """``sys.executable`` starts quickly."""
    monkeypatch.setattr(sys, "executable", quick.executable)


@pytest.fixture
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 600 KiB."""
    with small_disk(tmp_path / "disk", "600k") as folder:
        yield folder
