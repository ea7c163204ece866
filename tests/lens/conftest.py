"""Fixtures of the tests of the credit page."""

from credit_pages import run  # noqa: F401
from lens_browser import browser  # noqa: F401
