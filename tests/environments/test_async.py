"""Async functions are rejected before training. If one is not detected, only its rollouts fail."""

import functools

import pytest
from scripted_policy import answered
from tiny_runs import data, generation, module

from gear_lightning.environments.base import Environment, Step, Task
from gear_lightning.environments.checks import refuse_async
from gear_lightning.environments.functions import FunctionTools, tool_schemas
from gear_lightning.environments.sandbox import Isolated
from gear_lightning.environments.single_turn import SingleTurn
from gear_lightning.environments.tools import ToolEnvironment
from gear_lightning.errors import UserError
from gear_lightning.rewards import resolve_reward

TASK = Task("t1", [{"role": "user", "content": "Go."}], meta={"answer": "3"})
CALL = '<tool_call>[{"name": "%s", "arguments": {"item": "pen"}}]</tool_call>'


async def slow_price(item: str) -> str:
    """Price of an item.

    Args:
        item: its name
    """
    return "3"


def prices(item: str):
    """Prices of an item.

    Args:
        item: its name
    """
    yield "3"


def wrapped_price(item: str) -> str:
    """Price of an item.

    Args:
        item: its name
    """
    return slow_price(item)  # pyright: ignore[reportReturnType]


def mapped_price(item: str):
    """Price of an item.

    Args:
        item: its name
    """
    return map(str, [3])


async def judge(task, transcript):
    return 1.0


class Judge:
    async def __call__(self, task, transcript):
        return 1.0


@pytest.mark.parametrize(("name", "what"), [("slow_price", "is async"), ("prices", "is a generator function")])
def test_an_async_tool_or_a_generator_tool_is_rejected(name, what):
    path = f"{__name__}.{name}"
    for make in (lambda: tool_schemas([path]), lambda: FunctionTools([path])):
        with pytest.raises(
            UserError, match=rf"tool '{path}' {what}, which is not supported; make it .*(plain function|return)"
        ):
            make()


@pytest.mark.parametrize("name", ["wrapped_price", "mapped_price"])
def test_a_tool_that_returns_an_awaitable_or_an_iterator_fails_the_rollout(name):
    path = f"{__name__}.{name}"
    task = Task("t1", TASK.messages, tool_schemas([path]))
    rollout = answered(task, functools.partial(FunctionTools, [path], lambda *_: 1.0), CALL % name)
    assert rollout.status == "environment_error"
    assert f"TypeError: the tool '{name}' returned a " in rollout.error
    assert [m["role"] for m in rollout.messages] == ["user", "assistant"]


@pytest.mark.parametrize("reward", [f"{__name__}.judge", judge, Judge(), functools.partial(judge, transcript=[])])
def test_an_async_reward_is_rejected(reward):
    with pytest.raises(UserError, match=r"reward .*is async, which is not supported"):
        resolve_reward(reward)
    with pytest.raises(UserError, match=r"task t1: .*reward .*is async"):
        SingleTurn(reward).check(TASK)


class AsyncStep(Environment):
    async def step(self, message):  # pyright: ignore[reportIncompatibleMethodOverride]
        return Step(done=True)


class AsyncReset(AsyncStep):
    async def reset(self, task, *, seed):  # pyright: ignore[reportIncompatibleMethodOverride]
        return []

    def step(self, message):
        return Step(done=True)


class AsyncClose(AsyncReset):
    def reset(self, task, *, seed):
        return []

    async def close(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        pass


class AsyncCheck(AsyncClose):
    def close(self):
        pass

    async def check(self, task):  # pyright: ignore[reportIncompatibleMethodOverride]
        raise UserError("this must never run")


class AsyncCall(ToolEnvironment):
    async def call(self, name, arguments):  # pyright: ignore[reportIncompatibleMethodOverride]
        return "3"


class YieldingStep(AsyncCheck):
    def check(self, task):
        pass

    def step(self, message):
        yield Step(done=True)


async def maker():
    return AsyncStep()


METHODS = [(kind, method) for kind in (AsyncStep, AsyncReset, AsyncClose, AsyncCheck, AsyncCall, YieldingStep)
           for method in ("step", "reset", "close", "check", "call") if method in kind.__name__.lower()]  # fmt: skip


@pytest.mark.parametrize(("kind", "method"), METHODS)
def test_an_environment_with_an_async_method_is_rejected_before_training(kind, method):
    with pytest.raises(UserError, match=rf"{kind.__name__}\.{method} is (async|a generator function), which"):
        generation(environment=kind).attach(module(), data())
    with pytest.raises(UserError, match=rf"{kind.__name__}\.{method} is (async|a generator function)"):
        Isolated(kind, network="allow").check(TASK)


def test_an_async_environment_factory_is_rejected():
    with pytest.raises(UserError, match=r"generation\.environment is an async function"):
        generation(environment=maker).attach(module(), data())


def test_an_undetected_async_step_fails_only_its_rollout_with_an_error():
    class Late(Environment):
        def step(self, message):
            return AsyncStep().step(message)

    rollout = answered(TASK, Late, "3")
    assert (rollout.status, rollout.learnable) == ("invalid_reward", False)
    assert "step returned a coroutine: it is async, which is not supported" in rollout.error


def test_plain_functions_are_accepted():
    for function in (
        resolve_reward("exact"),
        Judge,
        str,
        functools.partial(int, base=2),
        Environment.step,
        wrapped_price,
    ):
        refuse_async(function, "this")
