"""Checks of values: numeric options, and JSON from outside.

A comparison with NaN is false, so that each check asks for what is right and not for what is wrong.
"""

import math
from typing import Any

from .errors import UserError


def check_range(options: object, low: float, high: float, *names: str) -> None:
    """Check options that lie between two bounds, which are allowed themselves. None is not looked at.

    Args:
        options: what has them as attributes.
        low: least value.
        high: greatest value; infinity: any finite one.
        names: of the attributes.

    Raises:
        UserError: one is outside, not a number, or not finite.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not (low <= value <= high and value < math.inf):
            wanted = f"is outside [{low:g}, {high:g}]" if high < math.inf else f"must be at least {low:g}, and finite"
            raise UserError(f"{type(options).__name__}: {name}={value} {wanted}")


def check_positive(options: object, *names: str) -> None:
    """Check options that divide or bound something. None is not looked at.

    Args:
        options: what has them as attributes.
        names: of the attributes.

    Raises:
        UserError: one is not above 0, not a number, or not finite.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{type(options).__name__}: {name}={value} must be above 0, and finite")


def deeper_than(depth: int, value: Any) -> bool:
    """Whether lists and objects in a JSON value lie more than ``depth`` deep in each other."""
    level = [value]
    for _ in range(depth + 1):
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
        if not level:
            return False
    return True
