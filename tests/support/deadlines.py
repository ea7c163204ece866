"""Deadlines scaled to the speed of this machine: upper bounds that only a hanging test reaches.

`measure` times a start-up once per run of pytest, and stores the factor in the environment for xdist's workers and for
the processes that tests start. Tests read no clock: they wait for events with `until`, and scale every timeout that
they pass on with `seconds`. ``tests/test_deadlines.py`` checks this.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

FACTOR = "GEAR_TEST_PACE"  # environment variable; set it to skip the measurement
USUAL = 2.0  # seconds of importing torch on the reference machine of the limits, with two free cores
T = TypeVar("T")


def measure() -> float:
    """Time the import of torch once, and count the processors that this process may use.

    Returns:
        The factor, at least 1, by which this machine is slower than the reference machine.
    """
    if FACTOR not in os.environ:
        started = time.perf_counter()
        if "torch" in sys.modules:
            subprocess.run([sys.executable, "-c", "import torch"], check=True)
        else:
            import torch  # noqa: F401
        slower = (time.perf_counter() - started) / USUAL
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ[FACTOR] = f"{max(1.0, slower * max(1.0, 2 / processors)):.2f}"
    return factor()


def factor() -> float:
    """Return the result of `measure`; 1 before the measurement."""
    return float(os.environ.get(FACTOR, "1"))


def seconds(limit: float) -> float:
    """Return a deadline or timeout for this machine.

    Args:
        limit: seconds on the reference machine. Give many times the expected time: the machine may become busier after
            the measurement.
    """
    return limit * factor()


def until(condition: Callable[[], T], why: str, limit: float = 120, pause: float = 0.02) -> T:
    """Wait until a condition is true, and return its value.

    Args:
        condition: called repeatedly until it returns a true value.
        why: what the test waits for, for the message of a failure.
        limit: see `seconds`.
        pause: seconds between two calls.

    Raises:
        AssertionError: the condition was not true in time.
    """
    end = time.monotonic() + seconds(limit)
    while not (found := condition()):
        if time.monotonic() > end:
            found = condition()  # check once more, because this process may have been suspended
            assert found, f"not within {seconds(limit):.0f} s: {why}"
            return found
        time.sleep(pause)
    return found


def never(condition: Callable[[], object], looks: int = 20, pause: float = 0.05) -> bool:
    """Return whether a condition stays false for a number of checks: for events that only an error causes."""
    for _ in range(looks):
        if condition():
            return False
        time.sleep(pause)
    return True


@contextmanager
def cheap(units: float) -> Iterator[None]:
    """Context that fails if its code takes more processor time than ``units`` of a fixed piece of work.

    The result does not depend on the speed or the load of the processor. A unit is about 10 ms on a typical processor.

    Raises:
        AssertionError: the code took more time.
    """
    unit = _unit()
    started = time.thread_time()
    yield
    took = (time.thread_time() - started) / unit
    assert took < units, f"the code took {took:.0f} units of work, and {units:g} are allowed"


@cache
def _unit() -> float:
    """Return the processor seconds of the fixed piece of work: the second best of five, to exclude outliers."""
    found = []
    for _ in range(5):
        started = time.thread_time()
        words: dict[str, int] = {}
        for i in range(50_000):
            words[f"{i % 997}"] = i
        found.append(time.thread_time() - started)
    return sorted(found)[1]
