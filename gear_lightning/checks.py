"""Checks of values: numeric options and untrusted JSON.

Comparisons with NaN are false, so each check tests for valid values, not for invalid ones.
"""

import math
from typing import Any

from .errors import UserError


def check_range(options: object, low: float, high: float, *names: str) -> None:
    """Check that options are between two bounds (inclusive). None is accepted.

    Args:
        options: object with the options as attributes.
        low: minimum.
        high: maximum; infinity accepts any finite value.
        names: names of the attributes.

    Raises:
        UserError: a value is out of range, NaN, or not finite.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not (low <= value <= high and value < math.inf):
            wanted = f"is outside [{low:g}, {high:g}]" if high < math.inf else f"must be at least {low:g}, and finite"
            raise UserError(f"{type(options).__name__}: {name}={value} {wanted}")


def check_positive(options: object, *names: str) -> None:
    """Check that options are positive and finite, for example divisors and limits. None is accepted.

    Args:
        options: object with the options as attributes.
        names: names of the attributes.

    Raises:
        UserError: a value is not above 0, NaN, or not finite.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{type(options).__name__}: {name}={value} must be above 0, and finite")


def deeper_than(depth: int, value: Any) -> bool:
    """Return whether lists and objects in a JSON value are nested more than ``depth`` levels deep."""
    level = [value]
    for _ in range(depth + 1):
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
        if not level:
            return False
    return True
