"""Processes that the tests of one file share, and quick starts of others."""

import sys
from collections.abc import Iterator

import pytest
from rank_group import Group

SLOW_STARTS = ("test_kill", "test_watchdog")  # they signal groups of processes


@pytest.fixture(scope="module", autouse=True)
def _start_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__.rpartition(".")[2] not in SLOW_STARTS:
            patch.setattr(sys, "executable", request.getfixturevalue("quick").executable)
        yield


@pytest.fixture(scope="module")
def pair(_start_quickly: None) -> Iterator[Group]:
    """Two processes that stay."""
    group = Group(2)
    yield group
    group.stop()
