"""The agent loop: ids are final, masks are correct, budgets are enforced, and a failure affects only one rollout."""

import json
import math
import threading
import time

import pytest
import torch
from deadlines import seconds
from scripted_policy import CHAT, Scripted
from tiny_runs import source

from gear_lightning.environments.base import Environment, Step, Task, tool_call, tool_result
from gear_lightning.environments.lookup_chain import TOOLS, LookupChain, LookupChainTasks
from gear_lightning.errors import UserError
from gear_lightning.generation.agent_loop import AgentLoop
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.chat import Chat
from gear_lightning.generation.engine import Sampling
from gear_lightning.rollout import Rollout

CALL = '<tool_call>[{"name": "look", "arguments": {"relation": "r1", "entity": "e1"}}]</tool_call>'


class Echo(Environment):
    """Answers calls with text. A message without calls ends the episode with reward 1."""

    def step(self, message):
        if message.get("tool_calls"):
            return Step([tool_result("look", "e2")], reward=0.25)
        return Step(done=True, reward=1.0, info={"reward_parts": {"answer": 1.0}})


def play(engine, environment=Echo, budgets=Budgets(tokens=2000, step_seconds=seconds(30)), tools=TOOLS) -> Rollout:
    loop = AgentLoop(CHAT, engine, environment, budgets, Sampling())
    task = Task("t1", [{"role": "user", "content": "Go."}], tools)
    (rollout,), counts = loop.run(torch.nn.Linear(1, 1), [(task, (0, 0, 0, 0))], policy_version=3)
    assert counts[rollout.status] == 1
    for column in (rollout.action_mask, rollout.turn_ids, rollout.stop_mask, rollout.sampler_logprobs):
        assert len(column) == len(rollout.tokens)
    return rollout


def test_sampled_ids_are_final_and_masks_cover_only_them():
    engine = Scripted(CALL, "the answer is twelve")
    rollout = play(engine)
    assert (rollout.status, rollout.turns, rollout.reward, rollout.success) == ("done", 2, 1.25, True)
    first, second = (engine.say(r).ids for r in engine.requests)
    prompt, between = CHAT.prompt(rollout.messages[:1], TOOLS), CHAT.continuation([tool_result("look", "e2")])
    assert rollout.tokens == prompt + first + between + second
    assert CHAT.encode(CHAT.tokenizer.decode(first)) != first, "this test needs ids that re-encoding changes"
    spans = [(len(prompt), False), (len(first), True), (len(between), False), (len(second), True)]
    assert rollout.action_mask == [sampled for n, sampled in spans for _ in range(n)]
    assert rollout.turn_ids == [-1] * len(prompt) + [0] * len(first) + [-1] * len(between) + [1] * len(second)
    assert [i for i, stop in enumerate(rollout.stop_mask) if stop] == [
        len(prompt + first) - 1, len(rollout.tokens) - 1
    ]  # fmt: skip
    assert {rollout.tokens[i] for i, stop in enumerate(rollout.stop_mask) if stop} == {CHAT.turn.end}
    assert engine.requests[1].ids == rollout.tokens[: len(prompt + first + between)], "the context was encoded again"
    assert [m["role"] for m in rollout.messages] == ["user", "assistant", "tool", "assistant"]
    assert rollout.reward_parts == {"answer": 1.0}
    assert rollout.policy_version == 3


def test_rollouts_can_be_restored_from_plain_data():
    rollout = play(Scripted(CALL, "done"))
    again = Rollout.from_state_dict(rollout.state_dict(), rollout.task)
    assert vars(again).keys() == vars(rollout).keys()
    assert again.tokens == rollout.tokens
    assert again.task.messages == rollout.task.messages


class Raises(Environment):
    def step(self, message):
        raise RuntimeError("tool broke")


class Exits(Environment):
    def step(self, message):
        raise SystemExit(3)


class RaisesOnReset(Echo):
    def reset(self, task, *, seed):
        raise OSError("no room")


class Hangs(Environment):
    def step(self, message):
        time.sleep(1000)
        return Step()


def giving(value):
    class Gives(Environment):
        def step(self, message):
            return value if value is None else Step(done=True, reward=value)

    return Gives


@pytest.mark.parametrize(
    ("environment", "status", "error"),
    [
        (Raises, "environment_error", "RuntimeError: tool broke"),
        (Exits, "environment_error", "SystemExit: 3"),
        (RaisesOnReset, "environment_error", "OSError: no room"),
        (Hangs, "environment_timeout", f"no result within {seconds(0.5):g} s"),
        (giving(float("nan")), "invalid_reward", "reward nan"),
        (giving("high"), "invalid_reward", "reward 'high'"),
        (giving(None), "invalid_reward", "NoneType, expected a Step"),
    ],
)
def test_a_misbehaving_environment_fails_only_one_rollout(environment, status, error):
    rollout = play(Scripted("hello"), environment, Budgets(tokens=500, step_seconds=seconds(0.5)))
    assert rollout.status == status
    assert error in str(rollout.error)
    assert not rollout.learnable


def test_a_hanging_tool_does_not_block_other_rollouts():
    calls = []

    class Sometimes(Echo):
        def reset(self, task, *, seed):
            calls.append(seed)
            self.hang = len(calls) == 2
            return []

        def step(self, message):
            return Hangs.step(self, message) if self.hang else super().step(message)

    loop = AgentLoop(CHAT, Scripted("x"), Sometimes, Budgets(step_seconds=seconds(0.5)), Sampling())
    task = Task("t", [{"role": "user", "content": "Go."}])
    rollouts, counts = loop.run(torch.nn.Linear(1, 1), [(task, (0, i)) for i in range(5)], policy_version=0)
    assert counts == {"done": 4, "environment_timeout": 1}
    assert [r.status for r in rollouts].index("environment_timeout") == 1


@pytest.mark.parametrize(
    ("turns", "budgets", "status"),
    [
        (["<tool_call>oops</tool_call>"], Budgets(tokens=500), "invalid_tool_call"),
        ([""], Budgets(), "empty_response"),
        (["hello"], Budgets(context=10), "prompt_too_long"),
        ([CALL], Budgets(turns=3, tokens=5000, context=5000), "truncated"),
        ([CALL], Budgets(tokens=30), "truncated"),
    ],
)
def test_each_kind_of_end_has_its_status(turns, budgets, status):
    rollout = play(Scripted(*turns), budgets=budgets)
    assert rollout.status == status
    assert rollout.learnable == (status != "prompt_too_long")


def test_budgets_are_enforced():
    rollout = play(Scripted(CALL), budgets=Budgets(turns=3, tokens=5000, context=5000))
    assert rollout.turns == 3
    rollout = play(Scripted("abcdefghijklmnop", stop=False), budgets=Budgets(tokens=7))
    assert sum(rollout.action_mask) == 7
    assert not any(rollout.stop_mask)


def test_environments_are_closed_even_after_failures():
    closed = []

    class Watch(Raises):
        def close(self):
            closed.append(threading.current_thread().name)
            raise ValueError("close broke too")

    rollout = play(Scripted("hello"), Watch)
    assert closed == ["environment"]
    assert rollout.error == "RuntimeError: tool broke", "the first failure must be reported"


def test_the_reference_never_reaches_the_policy():
    tasks = LookupChainTasks(2)
    task = tasks[0]
    chat = Chat(source().tokenizer())
    words = chat.tokenizer.convert_ids_to_tokens(chat.prompt(task.messages, task.tools))
    assert "<ref>" not in words
    assert not set(task.reference.split()) & set(words) - {task.meta["start"]}


def test_the_lookup_chain_rewards_only_the_right_entity():
    task = LookupChainTasks(3)[5]
    steps = task.reference.split("look ")[1:]
    last = steps[-1].split()
    moves = [s.split()[:2] for s in steps]

    def score(final):
        environment = LookupChain()
        environment.reset(task, seed=0)
        for relation, entity in moves:
            step = environment.step(tool_call("look", {"relation": relation, "entity": entity}))
            assert not step.done
        return environment.step(tool_call("submit", {"entity": final})).reward

    right = last[last.index("submit") + 1]
    assert score(right) == 1.0
    assert score("e0" if right != "e0" else "e1") == 0.0


@pytest.mark.parametrize("reward", [torch.tensor([1.0, 2.0]), 10**400, "1", None, float("nan"), [1.0]])
def test_an_invalid_reward_fails_only_its_rollout(reward):
    class Odd(Environment):
        def step(self, message):
            return Step(done=True, reward=reward)

    rollout = play(Scripted("done"), Odd)
    assert rollout.status == "invalid_reward"
    assert not rollout.learnable


@pytest.mark.parametrize("place", ["reset", "step"])
def test_messages_that_cannot_be_rendered_fail_only_their_rollout(place):
    class Odd(Environment):
        def reset(self, task, *, seed):
            return [{"role": "user", "content": "\ud800"}] if place == "reset" else []

        def step(self, said):
            return Step([tool_result("look", "half a pair: \ud800")])

    rollout = play(Scripted(CALL, "done"), Odd)
    assert rollout.status == "environment_error"
    assert "surrogates" in rollout.error


class Opens(Environment):
    """Returns the test's values from reset or step."""

    def __init__(self, place, gives):
        self.place, self.gives = place, gives

    def reset(self, task, *, seed):
        return self.gives if self.place == "reset" else []

    def step(self, message):
        return self.gives


class Unsayable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


CYCLE: list = [{"role": "tool", "content": "x"}]
CYCLE[0]["again"] = CYCLE


@pytest.mark.parametrize(
    "environment",
    [
        *(Opens("reset", gives) for gives in (None, 5, "hello", [{"content": "x"}], [{"role": "user", "content": 3}])),
        *(Opens("step", Step(messages)) for messages in (None, "abc", [1, 2])),
        Opens("step", Step([{"role": "tool", "content": "x", "n": float("nan")}])),
        Opens("step", Step([{"role": "tool", "content": "x", (1, 2): 3}])),
        Opens("step", Step(CYCLE)),
        Opens("step", Step(done=torch.tensor([True, False]))),
        Opens("step", Step(done=True, info={"success": "False"})),
        Opens("step", Step(done=True, info={"success": torch.tensor([1, 0])})),
    ],
)  # fmt: skip
def test_invalid_return_values_fail_only_their_rollout(environment):
    rollout = play(Scripted("done"), lambda: environment)
    assert rollout.status == "environment_error"
    assert rollout.error
    json.dumps(rollout.messages, allow_nan=False)


def test_an_exception_whose_text_cannot_be_read_fails_only_its_rollout():
    class Bad(Environment):
        def step(self, message):
            raise Unsayable

    rollout = play(Scripted("done"), Bad)
    assert (rollout.status, rollout.error) == ("environment_error", "Unsayable: (its text cannot be read)")


def test_an_environment_cannot_modify_the_task():
    class Changes(Environment):
        def reset(self, task, *, seed):
            task.messages.append({"role": "user", "content": "more"})
            task.meta["answer"] = "changed"
            return []

        def step(self, message):
            return Step(done=True)

    rollout = play(Scripted("done"), Changes)
    assert [m["content"] for m in rollout.task.messages] == ["Go."]
    assert rollout.task.meta == {}
    assert CHAT.prompt(rollout.task.messages, TOOLS) == rollout.tokens[: rollout.prompt_length]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_log_probs_that_are_not_finite_end_the_run_and_not_the_rollout(wrong):
    """Finite weights can give them; rollouts of such a policy say nothing."""

    class Lost(Scripted):
        def say(self, request):
            turn = super().say(request)
            turn.logprobs[1] = wrong
            return turn

    loop = AgentLoop(CHAT, Lost("hello"), LookupChain, Budgets(tokens=99, context=999), Sampling())
    with pytest.raises(UserError, match=r"log-probs are not finite while it samples.*earlier checkpoint"):
        loop.run(torch.nn.Linear(1, 1), [(LookupChainTasks()[0], (0, 0, 0, 0))], policy_version=0)
