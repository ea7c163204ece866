"""Environments side by side: the rollouts are those of one after another, and no conversation waits for another."""

import threading
import time
from collections import Counter

import pytest
import torch
from deadlines import seconds
from scripted_policy import CHAT, Scripted
from tiny_runs import source

from gear_lightning.environments.base import Environment, Step, Task, TransientError, tool_result
from gear_lightning.environments.lookup_chain import LookupChain, LookupChainTasks
from gear_lightning.errors import UserError
from gear_lightning.generation import CachedEngine, GenerateEngine
from gear_lightning.generation.agent_loop import AgentLoop
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.chat import Chat, ChatOptions
from gear_lightning.generation.engine import Sampling

CALL = '<tool_call>[{"name": "look", "arguments": {}}]</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
TASK = Task("t1", [{"role": "user", "content": "Go."}], TOOLS)


def play(engine, environment, jobs=8, workers=4, stop=lambda: False, **budgets):
    limits = Budgets(**{"tokens": 4000, "context": 8000, "step_seconds": seconds(30), **budgets})
    loop = AgentLoop(CHAT, engine, environment, limits, Sampling(), stop=stop, workers=workers)
    found, counts = loop.run(torch.nn.Linear(1, 1), [(TASK, (0, 0, 0, i)) for i in range(jobs)], policy_version=0)
    assert counts == Counter(r.status for r in found)
    return found


class Together(Environment):
    """Every call waits until ``parties`` calls run at the same time."""

    barrier: threading.Barrier

    def step(self, message):
        self.barrier.wait(seconds(20))
        return Step([tool_result("look", "x")], reward=0.5, done=not message.get("tool_calls"))


def test_calls_run_side_by_side_up_to_the_number_of_workers(monkeypatch):
    monkeypatch.setattr(Together, "barrier", threading.Barrier(4), raising=False)
    found = play(Scripted(CALL, "hello"), Together)
    assert [(r.status, r.turns, r.reward) for r in found] == [("done", 2, 1.0)] * 8


def test_no_more_calls_than_workers_run_at_once():
    running, most = [], []

    class Counts(Environment):
        def step(self, message):
            running.append(1)
            most.append(len(running))
            time.sleep(0.002)
            running.pop()
            return Step(done=True)

    play(Scripted("hello"), Counts, jobs=40, workers=3)
    assert max(most) <= 3


class Waits(Environment):
    """The first conversation's tool answers only when all others have ended."""

    ended: threading.Semaphore

    def reset(self, task, *, seed):
        self.first = not Waits.count
        Waits.count += 1
        return []

    def step(self, message):
        if self.first and message.get("tool_calls"):
            for _ in range(3):
                assert self.ended.acquire(timeout=seconds(20))
        return Step([tool_result("look", "x")], reward=1.0, done=not message.get("tool_calls"))

    def close(self):
        if not self.first:
            self.ended.release()


def test_no_conversation_waits_for_the_tool_of_another(monkeypatch):
    """Environments are closed as soon as their rollout is over, while others go on."""
    monkeypatch.setattr(Waits, "ended", threading.Semaphore(0), raising=False)
    monkeypatch.setattr(Waits, "count", 0, raising=False)
    found = play(Scripted(CALL, "hello"), Waits, jobs=4, workers=2)
    assert [r.status for r in found] == ["done"] * 4


@pytest.mark.parametrize("engine", [CachedEngine, GenerateEngine])
def test_the_order_of_answers_changes_no_sampled_id(engine, monkeypatch):
    def sampled(workers):
        torch.manual_seed(0)
        policy, chat = source().model(), Chat(source().tokenizer(), ChatOptions("words"))
        tasks = LookupChainTasks(2)
        jobs = [(tasks[i], (0, 0, i, r)) for i in range(4) for r in range(4)]
        limits = Budgets(tokens=40, turn_tokens=12, context=120, turns=3)
        loop = AgentLoop(chat, engine(), Late, limits, Sampling(), workers=workers)
        return loop.run(policy, jobs, policy_version=0)[0]

    class Late(LookupChain):
        def step(self, message):
            if workers:
                time.sleep(hash(str(message)) % 4 / 500)
            return super().step(message)

    workers = 0
    one = sampled(0)
    workers = 5
    other = sampled(5)
    for a, b in zip(one, other, strict=True):
        mine, theirs = a.state_dict(), b.state_dict()
        gaps = [abs(x - y) for x, y in zip(mine.pop("sampler_logprobs"), theirs.pop("sampler_logprobs"), strict=True)]
        assert max(gaps) < 1e-5
        assert mine == theirs


def test_failed_openings_are_retried_when_their_environment_is_closed():
    log, lock = [], threading.Lock()

    class Flaky(Environment):
        def reset(self, task, *, seed):
            self.seed = seed
            with lock:
                log.append(("reset", seed))
                if sum(entry == ("reset", seed) for entry in log) == 1:
                    raise TransientError("no connection")
            return []

        def step(self, message):
            return Step(done=True, reward=1.0)

        def close(self):
            with lock:
                log.append(("close", self.seed))

    found = play(Scripted("hello"), Flaky, jobs=6, workers=3, retries=1)
    assert [(r.status, r.retries) for r in found] == [("done", 1)] * 6
    for seed in {seed for _, seed in log}:
        assert [what for what, mine in log if mine == seed] == ["reset", "close", "reset", "close"]


def test_a_stop_leaves_out_what_has_not_begun_and_closes_the_rest():
    opened, closed, stopped = [], [], []

    class Slow(Environment):
        def reset(self, task, *, seed):
            opened.append(seed)
            stopped.append(len(opened) >= 5)
            time.sleep(0.01)
            return []

        def step(self, message):
            return Step([tool_result("look", "x")])

        def close(self):
            closed.append(1)

    found = play(Scripted(CALL), Slow, jobs=200, workers=2, stop=lambda: any(stopped))
    assert 5 <= len(found) < 200
    assert len(opened) == len(found) == len(closed)


def test_an_engine_that_loses_a_turn_is_reported():
    class Loses(Scripted):
        def poll(self):
            return super().poll()[1:]

    with pytest.raises(RuntimeError, match="Loses returned no turn, and 1 are requested"):
        play(Loses("hello"), Together, jobs=1, workers=0)


def test_a_negative_number_of_workers_is_refused():
    from tiny_runs import generation

    with pytest.raises(UserError, match=r"generation\.workers=-1: must be at least 0"):
        generation(workers=-1)
