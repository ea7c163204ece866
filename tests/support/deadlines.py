"""How fast this machine is now, and deadlines that follow: upper bounds, which only something that hangs reaches.

`measure` times a start-up once for each run of pytest, and leaves the factor in the environment for xdist's workers and
for the processes that tests start. Tests read no clock: they wait for events with `until`, and hand every time-out that
something else takes through `seconds`. ``tests/test_deadlines.py`` holds that.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

FACTOR = "GEAR_TEST_PACE"  # environment variable; set it to do without the measurement
USUAL = 2.0  # seconds of importing torch on the machine that the limits are written for, which has two cores free
T = TypeVar("T")


def measure() -> float:
    """Time the start-up of torch, once; the processors that this process may use count, too.

    Returns:
        The factor, at least 1: how much longer than usual things take here.
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
    """What `measure` has found; 1 where nobody has measured."""
    return float(os.environ.get(FACTOR, "1"))


def seconds(limit: float) -> float:
    """A deadline or time-out for this machine.

    Args:
        limit: seconds on a machine of the usual speed. Give many times what is needed: a run on a machine that grows
            busier after the measurement must not reach it.
    """
    return limit * factor()


def until(condition: Callable[[], T], why: str, limit: float = 120, pause: float = 0.02) -> T:
    """Wait for something, and return what the condition gave.

    Args:
        condition: asked again and again, until it gives something true.
        why: what did not happen; told where the test fails.
        limit: see `seconds`.
        pause: seconds between two looks.

    Raises:
        AssertionError: it did not happen.
    """
    end = time.monotonic() + seconds(limit)
    while not (found := condition()):
        if time.monotonic() > end:
            found = condition()  # after the last look, too: this process may have stood still
            assert found, f"not within {seconds(limit):.0f} s: {why}"
            return found
        time.sleep(pause)
    return found


def never(condition: Callable[[], object], looks: int = 20, pause: float = 0.05) -> bool:
    """Whether something stays untrue for some looks: for what may only happen by mistake."""
    for _ in range(looks):
        if condition():
            return False
        time.sleep(pause)
    return True


@contextmanager
def cheap(units: float) -> Iterator[None]:
    """Fails where the code within takes more processor time than so many units of a fixed piece of work in this
    process: whatever the processor, and whatever else it does. A unit is some 10 ms of a usual processor.

    Raises:
        AssertionError: it took more.
    """
    unit = _unit()
    started = time.thread_time()
    yield
    took = (time.thread_time() - started) / unit
    assert took < units, f"it took {took:.0f} units of work, and {units:g} are allowed"


@cache
def _unit() -> float:
    """Processor seconds of the fixed piece of work; the second best of five, so that no hiccup makes it long."""
    found = []
    for _ in range(5):
        started = time.thread_time()
        words: dict[str, int] = {}
        for i in range(50_000):
            words[f"{i % 997}"] = i
        found.append(time.thread_time() - started)
    return sorted(found)[1]
