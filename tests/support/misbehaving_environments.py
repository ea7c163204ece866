"""Environments that misbehave in the way that the task names. Fast to import for separate processes."""

import asyncio
import ctypes
import os
import random
import re
import socket
import time
from pathlib import Path

from gear_lightning.environments.base import Environment, Step


def fork_and_come_back(environment):
    if child := os.fork():
        os.waitpid(child, os.WNOHANG)


def fork_and_stay(environment):
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
    time.sleep(1000)


def bomb(environment):
    while True:
        os.fork()


def hold_the_interpreter(environment):
    re.match(r"(a+)+$", "a" * 64 + "b")


def take_memory(environment):
    environment.held = bytearray(4 << 30)


def write_much(environment):
    with open(Path(os.environ.get("TMPDIR", "/tmp"), f"much-{os.getpid()}-{random.random()}"), "wb") as file:
        os.unlink(file.name)
        file.write(bytes(100 << 20))


def call_the_network(environment):
    socket.create_connection(("1.1.1.1", 53), timeout=5)  # not waited for: there is no network


def crash(environment):
    ctypes.string_at(0)


def burn(environment):
    while True:
        pass


DEEDS = {
    "raise": lambda _: 1 / 0,
    "exit": lambda _: exit(3),
    "leave": lambda _: os._exit(5),
    "hang": lambda _: time.sleep(1000),
    "spin": hold_the_interpreter,
    "burn": burn,
    "crash": crash,
    "fork": fork_and_come_back,
    "fork and stay": fork_and_stay,
    "bomb": bomb,
    "memory": take_memory,
    "file": write_much,
    "network": call_the_network,
    "refused": lambda _: (_ for _ in ()).throw(ConnectionError("refused")),
    "flood": lambda _: Step([{"role": "tool", "content": "x" * (80 << 20)}]),
    "long": lambda _: Step([{"role": "tool", "content": "x" * (2 << 20)}]),
    "last flood": lambda _: Step([{"role": "tool", "content": "x" * (80 << 20)}], 1.0, True),
    "last long": lambda _: Step([{"role": "tool", "content": "x" * (2 << 20)}], 1.0, True),
    "last bytes": lambda _: Step([{"role": "tool", "content": b"x"}], 1.0, True, info={"state": 5}),
    "no step": lambda _: 5,
    "bytes": lambda _: Step([{"role": "tool", "content": b"x"}]),
    "nan": lambda _: Step(done=True, reward=float("nan")),
    "look": lambda _: Step(done=True, info={"reward_parts": dict.fromkeys(os.environ, 1) | {"pid": os.getpid()}}),
}


class Unruly(Environment):
    """Executes the action in ``task.meta["deed"]`` in its step, if there is one, and then returns the task's reward."""

    played = 0

    def __init__(self, place: str = "step"):
        self.place = place

    def reset(self, task, *, seed):
        super().reset(task, seed=seed)
        Unruly.played += 1
        self.pid = os.getpid()
        return self.misbehave("reset") or []

    def step(self, message):
        return self.misbehave("step") or Step(
            done=True, reward=self.task.meta.get("reward", 1.0), info={"reward_parts": {"played": Unruly.played}}
        )

    def misbehave(self, place):
        deed = self.task.meta.get("deed")
        return DEEDS[deed](self) if deed in DEEDS and place == self.place else None

    def close(self):
        if self.task.meta.get("deed") == "hang at close":
            time.sleep(1000)


class Awaits(Environment):
    """Every method is async. Returns the reward in its step if the reset's task has run."""

    async def reset(self, task, *, seed):  # pyright: ignore[reportIncompatibleMethodOverride]
        self.task, self.told = task, asyncio.create_task(asyncio.sleep(0, 1.0))
        return []

    async def step(self, message):  # pyright: ignore[reportIncompatibleMethodOverride]
        return Step(done=True, reward=await self.told)

    async def close(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        await asyncio.sleep(0)
