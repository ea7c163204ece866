"""Browser fixture for the credit page."""

from collections.abc import Iterator

import pytest
from headless_browser import Page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()
