"""Shared fixtures: a tiny policy over the lookup chain's words, and a cache that no test shares with the user."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import deadlines
import pytest
from checkout import ROOT
from command_line import command  # noqa: F401  # a fixture
from quick_start import QuickStart
from small_disks import small_disk

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.collectonly:
        deadlines.measure()


def pytest_report_header(config: pytest.Config) -> str:
    return f"deadlines are {deadlines.factor():.1f} times those of a machine of the usual speed"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Scale what pytest-timeout goes by: a test's own mark, or the option."""
    for item in items:
        mark = item.get_closest_marker("timeout")
        limit = mark.args[0] if mark else config.getoption("timeout")
        if limit:
            item.add_marker(pytest.mark.timeout(deadlines.seconds(limit)), append=False)


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
    return ROOT


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 600 KiB."""
    with small_disk(tmp_path / "disk", "600k") as folder:
        yield folder
