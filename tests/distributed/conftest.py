"""Processes that the tests of one file share."""

from collections.abc import Iterator

import pytest
from distributed.group import Group


@pytest.fixture(scope="module")
def pair() -> Iterator[Group]:
    """Two processes that stay."""
    group = Group(2)
    yield group
    group.stop()
