"""Process groups that are shared by the tests of a file, and quick starts for other processes."""

import sys
from collections.abc import Iterator

import pytest
from rank_group import Group

SLOW_STARTS = ("test_kill", "test_watchdog")  # these send signals to process groups


@pytest.fixture(scope="module", autouse=True)
def _start_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__.rpartition(".")[2] not in SLOW_STARTS:
            patch.setattr(sys, "executable", request.getfixturevalue("quick").executable)
        yield


@pytest.fixture(scope="module")
def pair(_start_quickly: None) -> Iterator[Group]:
    """A group of two processes that run for all tests of a file."""
    group = Group(2)
    yield group
    group.stop()
