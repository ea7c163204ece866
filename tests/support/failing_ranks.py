"""Environments that misbehave on one process, for tests of the behavior of the others."""

import os
import re
import time

from tiny_runs import AnyCall


def rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


class Slow(AnyCall):
    """Rank 1 takes ``PAUSE`` seconds per step: slow, but never stuck. Appends a character to ``SLEPT`` per step."""

    def step(self, message):
        if rank() == 1:
            time.sleep(float(os.environ["PAUSE"]))
            with open(os.environ["SLEPT"], "a") as file:
                file.write(".")
        return super().step(message)


class Endless(AnyCall):
    """Rank 1 never releases the interpreter lock."""

    def step(self, message):
        if rank() == 1 or os.environ.get("WORLD_SIZE_ONE"):
            re.match(r"(a+)+$", "a" * 64 + "b")
        return super().step(message)


class Fatal(AnyCall):
    """Ends the process of rank 1, some time after the start-up checks and the first evaluation."""

    made = 0

    def __init__(self):
        Fatal.made += 1
        if rank() == 1 and Fatal.made > 60:
            os._exit(9)
        super().__init__()
