"""Async tools, rewards and environments are awaited, under the deadlines of plain ones, and leave nothing behind."""

import asyncio
import contextlib
import functools
import gc
import os
import threading
import warnings

import pytest
from deadlines import seconds, until
from misbehaving_environments import Awaits
from scripted_policy import CHAT, Scripted, answered
from tiny_runs import data, generation, module
from torch.nn import Linear

from gear_lightning.environments import awaiting
from gear_lightning.environments.base import Environment, Step, Task
from gear_lightning.environments.checks import refuse_generator
from gear_lightning.environments.functions import FunctionTools, tool_schemas
from gear_lightning.environments.sandbox import Isolated
from gear_lightning.environments.single_turn import SingleTurn
from gear_lightning.environments.tools import ToolEnvironment
from gear_lightning.errors import UserError
from gear_lightning.generation.agent_loop import AgentLoop
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.engine import Sampling
from gear_lightning.rewards import resolve_reward

TASK = Task("t1", [{"role": "user", "content": "Go."}], meta={"answer": "3"})
CALL = '<tool_call>[{"name": "%s", "arguments": {"item": "pen"}}]</tool_call>'
BUDGETS = Budgets(tokens=8000, context=16000, step_seconds=seconds(30))
SHORT = Budgets(tokens=8000, context=16000, step_seconds=seconds(0.2))


async def slow_price(item: str) -> str:
    """Price of an item.

    Args:
        item: its name
    """
    await asyncio.sleep(0)
    return "3"


def wrapped_price(item: str):
    """Price of an item.

    Args:
        item: its name
    """
    return slow_price(item)


def prices(item: str):
    """Prices of an item.

    Args:
        item: its name
    """
    yield "3"


async def many_prices(item: str):
    """Prices of an item.

    Args:
        item: its name
    """
    yield "3"


def mapped_price(item: str):
    """Price of an item.

    Args:
        item: its name
    """
    return map(str, [3])


async def judge(task, transcript):
    await asyncio.sleep(0)
    return {"right": 1.0}


class Judge:
    async def __call__(self, task, transcript):
        return 1.0


def result_of(name: str, budgets: Budgets = BUDGETS, reward=judge):
    path = f"{__name__}.{name}"
    task = Task("t1", TASK.messages, tool_schemas([path]), meta=TASK.meta)
    return answered(task, functools.partial(FunctionTools, [path], reward), CALL % name, "3", budgets=budgets)


@pytest.mark.parametrize("name", ["slow_price", "wrapped_price"])
def test_an_async_tool_is_awaited(name):
    rollout = result_of(name)
    assert (rollout.status, rollout.reward, rollout.reward_parts) == ("done", 1.0, {"right": 1.0})
    assert rollout.messages[2]["content"] == "3"


@pytest.mark.parametrize("name", ["prices", "many_prices"])
def test_a_generator_tool_is_rejected(name):
    path = f"{__name__}.{name}"
    for make in (lambda: tool_schemas([path]), lambda: FunctionTools([path])):
        with pytest.raises(UserError, match=rf"tool '{path}' is a generator function, which is not supported; make it"):
            make()


def test_a_tool_that_returns_an_iterator_fails_the_rollout():
    rollout = result_of("mapped_price")
    assert rollout.status == "environment_error"
    assert "a tool returned a map, which is not supported" in rollout.error
    assert [m["role"] for m in rollout.messages] == ["user", "assistant"]


@pytest.mark.parametrize("reward", [f"{__name__}.judge", judge, Judge(), functools.partial(judge)])
def test_an_async_reward_is_awaited(reward):
    resolve_reward(reward)
    SingleTurn(reward).check(TASK)
    rollout = answered(TASK, lambda: SingleTurn(reward), "3")
    assert (rollout.status, rollout.reward) == ("done", 1.0)


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (ValueError("no"), "invalid_reward"),
        (SystemExit(1), "invalid_reward"),
        (KeyboardInterrupt(), "environment_error"),
    ],
)
def test_an_async_reward_that_raises_costs_one_rollout(raised, status):
    async def broken(task, transcript):
        raise raised

    rollout = answered(TASK, lambda: SingleTurn(broken), "3")
    assert (rollout.status, rollout.learnable) == (status, False)
    assert type(raised).__name__ in rollout.error
    assert answered(TASK, lambda: SingleTurn(judge), "3").reward == 1, "the event loop still serves others"


events: list[str] = []


class Async(Environment):
    """Every method is async, and uses what an earlier one started."""

    async def check(self, task):  # pyright: ignore[reportIncompatibleMethodOverride]
        await asyncio.sleep(0)
        if "refuse" in task.meta:
            raise UserError(f"task {task.id}: refused")

    async def reset(self, task, *, seed):  # pyright: ignore[reportIncompatibleMethodOverride]
        self.loop, self.told = asyncio.get_running_loop(), asyncio.Event()
        self.background = asyncio.create_task(self.tell())
        return [{"role": "user", "content": "Ready."}]

    async def tell(self):
        try:
            self.told.set()
            await asyncio.Event().wait()
        finally:
            events.append("background ended")

    async def step(self, message):  # pyright: ignore[reportIncompatibleMethodOverride]
        assert asyncio.get_running_loop() is self.loop
        await self.told.wait()
        return Step(done=True, reward=1.0)

    async def close(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        await asyncio.sleep(0)
        events.append("closed")


async def make():
    return Async()


@pytest.mark.parametrize("kind", [Async, make])
def test_an_async_environment_is_awaited_and_its_tasks_end_with_its_episode(kind):
    events.clear()
    rollout = answered(TASK, kind, "3")
    assert (rollout.status, rollout.reward, rollout.side_error) == ("done", 1.0, None)
    assert [m["content"] for m in rollout.messages] == ["Go.", "Ready.", "3"]
    assert events == ["closed", "background ended"]


@pytest.mark.parametrize("kind", [Async, make])
def test_an_async_check_is_awaited_before_training(kind):
    generation(environment=kind).attach(module(), data())
    with pytest.raises(UserError, match="task t1: refused"):
        Isolated(kind, network="allow").check(Task("t1", TASK.messages, meta={"refuse": True}))


def test_an_async_environment_runs_in_a_separate_process():
    rollout = answered(TASK, lambda: Isolated(Awaits, network="allow"), "3", budgets=BUDGETS)
    assert (rollout.status, rollout.reward, rollout.error) == ("done", 1.0, None)


class AsyncCall(ToolEnvironment):
    async def call(self, name, arguments):
        return {"name": name}


def test_an_async_call_of_a_tool_environment_is_awaited():
    task = Task("t1", TASK.messages, [{"name": "look"}], meta=TASK.meta)
    rollout = answered(task, lambda: AsyncCall(judge), CALL % "look", "3")
    assert (rollout.status, rollout.messages[2]["content"]) == ("done", '{"name": "look"}')


def test_rewards_and_tools_are_awaited_within_an_async_step_too():
    class Outer(FunctionTools):
        async def step(self, message):  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().step(message)

    path = f"{__name__}.slow_price"
    task = Task("t1", TASK.messages, tool_schemas([path]), meta=TASK.meta)
    rollout = answered(task, lambda: Outer([path], judge), CALL % "slow_price", "3")
    assert (rollout.status, rollout.reward) == ("done", 1.0)


class YieldingStep(Environment):
    def step(self, message):
        yield Step(done=True)


class AsyncYieldingReset(Environment):
    async def reset(self, task, *, seed):  # pyright: ignore[reportIncompatibleMethodOverride]
        yield []

    def step(self, message):
        return Step(done=True)


@pytest.mark.parametrize(("kind", "method"), [(YieldingStep, "step"), (AsyncYieldingReset, "reset")])
def test_an_environment_with_a_method_that_yields_is_rejected_before_training(kind, method):
    with pytest.raises(UserError, match=rf"{kind.__name__}\.{method} is a generator function, which"):
        generation(environment=kind).attach(module(), data())
    with pytest.raises(UserError, match=rf"{kind.__name__}\.{method} is a generator function"):
        Isolated(kind, network="allow").check(TASK)


def test_plain_and_async_functions_are_accepted():
    plain = (
        resolve_reward("exact"),
        Judge,
        str,
        functools.partial(int, base=2),
        Environment.step,
        wrapped_price,
        judge,
    )
    for function in plain:
        refuse_generator(function, "this")


# -- what hangs -------------------------------------------------------------------------------------------------------


async def waits(item: str) -> str:
    """Wait forever.

    Args:
        item: its name
    """
    try:
        await asyncio.Event().wait()
    finally:
        events.append("wait ended")
    return ""


async def blocks(item: str) -> str:
    """Block the event loop until the test ends.

    Args:
        item: its name
    """
    released.wait()
    return ""


async def blocks_a_thread(item: str) -> str:
    """Block a thread until the test ends.

    Args:
        item: its name
    """
    await asyncio.to_thread(released.wait)
    return ""


async def forks(item: str) -> str:
    """Fork, and return in both processes.

    Args:
        item: its name
    """
    os.fork()
    return "3"


released = threading.Event()


@pytest.fixture(autouse=True)
def release():
    released.clear()
    yield
    released.set()


def test_a_coroutine_that_hangs_costs_one_rollout_and_is_canceled():
    events.clear()
    rollout = result_of("waits", SHORT)
    assert (rollout.status, rollout.learnable) == ("environment_timeout", False)
    until(lambda: "wait ended" in events, "the coroutine is canceled")
    assert result_of("slow_price").status == "done"


def test_a_coroutine_that_blocks_the_event_loop_costs_one_rollout_and_a_new_loop_serves_the_next_ones(monkeypatch):
    monkeypatch.setattr(awaiting, "GRACE", 0.01)
    with pytest.warns(UserWarning, match="blocked the event loop"):
        assert result_of("blocks", SHORT).status == "environment_timeout"
    assert result_of("slow_price").status == "done"
    blocked = [thread for thread in threading.enumerate() if thread.name == "event loop"]
    released.set()
    until(lambda: sum(thread.is_alive() for thread in blocked) <= 1, "the blocked loop ends when the call returns")


def test_threads_that_hang_do_not_keep_later_ones_from_running():
    for _ in range(8):  # more than asyncio's own pool has on two processors
        assert result_of("blocks_a_thread", SHORT).status == "environment_timeout"
    released.set()
    assert result_of("blocks_a_thread").status == "done"


def test_a_tool_that_forks_leaves_no_second_trainer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert result_of("forks").messages[2]["content"] == "3"


def test_a_task_that_ignores_its_end_is_reported_and_costs_nothing_else():
    class Stays(Async):
        async def tell(self):
            self.told.set()
            while not released.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.01)

    rollout = answered(TASK, Stays, "3", budgets=SHORT)
    assert (rollout.status, rollout.reward) == ("done", 1.0)
    assert rollout.side_error.startswith("close: no result within")


def test_an_async_generator_that_is_dropped_is_closed():
    class Reads(Environment):
        async def lines(self):
            try:
                yield "a"
                yield "b"
            finally:
                events.append("generator closed")

        async def step(self, message):  # pyright: ignore[reportIncompatibleMethodOverride]
            async for _ in self.lines():
                break
            return Step(done=True, reward=1.0)

    events.clear()
    assert answered(TASK, Reads, "3").status == "done"
    gc.collect()
    until(lambda: "generator closed" in events, "the generator is closed")


def test_all_rollouts_share_one_event_loop():
    loops = set()

    class Notes(Environment):
        async def step(self, message):  # pyright: ignore[reportIncompatibleMethodOverride]
            loops.add(asyncio.get_running_loop())
            return Step(done=True, reward=1.0)

    loop = AgentLoop(CHAT, Scripted("3"), Notes, BUDGETS, Sampling())
    for _ in range(2):
        rollouts, _ = loop.run(Linear(1, 1), [(TASK, (0, i)) for i in range(3)], policy_version=0)
        assert {rollout.status for rollout in rollouts} == {"done"}
    assert len(loops) == 1
