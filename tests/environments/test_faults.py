"""An environment or reward that misbehaves fails exactly its own rollout, and never the run."""

import contextlib
import json
import os
import random
import resource
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deadlines import seconds, until
from scripted_policy import CHAT, Scripted
from tiny_runs import trainer

from gear_lightning.advantage import GRPO
from gear_lightning.data import RolloutDataModule, RolloutGenerator
from gear_lightning.environments import deadline
from gear_lightning.environments.base import Environment, Step, Task, TaskSource, tool_result
from gear_lightning.errors import UserError
from gear_lightning.generation.agent_loop import AgentLoop
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.engine import Sampling
from gear_lightning.rewards import evaluate
from gear_lightning.rollout import Rollout

CALL = '<tool_call>[{"name": "look", "arguments": {}}]</tool_call>'
TASK = Task("t1", [{"role": "user", "content": "Go."}])


@pytest.fixture(params=[0, 3], ids=["one after another", "side by side"], autouse=True)
def workers(request, monkeypatch):
    """Everything here holds whether environments are called one after another or side by side."""
    monkeypatch.setitem(globals(), "WORKERS", request.param)
    return request.param


WORKERS = 0


def play(environment, *turns: str, jobs: int = 1, progress=lambda *_: None, **budgets) -> list[Rollout]:
    limits = Budgets(**{"tokens": 4000, "context": 8000, "step_seconds": seconds(30), **budgets})
    loop = AgentLoop(
        CHAT, Scripted(*(turns or ("hello",))), environment, limits, Sampling(), on_progress=progress, workers=WORKERS
    )
    rollouts, counts = loop.run(torch.nn.Linear(1, 1), [(TASK, (0, i)) for i in range(jobs)], policy_version=0)
    assert counts == Counter(r.status for r in rollouts)
    json.dumps([r.messages for r in rollouts] + [r.error for r in rollouts], allow_nan=False)
    return rollouts


def doing(step=lambda: Step(done=True, reward=1.0), reset=lambda: []) -> type[Environment]:
    class Does(Environment):
        def reset(self, task, *, seed):
            return reset()

        def step(self, message):
            return step()

    return Does


def children() -> list[int]:
    """Return this process's children, including exited ones that have not been waited for."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the thread has just ended
            found += map(int, (task / "children").read_text().split())
    return found


# -- many rollouts, all kinds of failures -----------------------------------------------------------------------------


def odd_reward(task, transcript):
    raise SystemExit("the judge has left")


class Failing(Environment):
    """Fails in the way that ``kinds`` assigns to its seed."""

    kinds: dict[int, str]
    release: threading.Event

    def reset(self, task, *, seed):
        self.task, self.seed, self.kind = task, seed, self.kinds.get(seed)
        return []

    def step(self, message):
        step = Step(done=True, reward=worth(self.seed))
        if self.kind == "hang":
            self.release.wait()
        elif self.kind == "raise":
            raise KeyError("lost")
        elif self.kind == "exit":
            raise SystemExit(3)
        elif self.kind == "interrupt":
            raise KeyboardInterrupt
        elif self.kind == "fork":
            os.fork()  # parent and child continue
        elif self.kind == "flood":
            step.messages = [tool_result("look", "x" * 2_000_000)]
        elif self.kind == "no text":
            step.messages = [{"role": "tool", "content": b"bytes"}]
        elif self.kind == "no step":
            return ["hello"]
        elif self.kind == "nan":
            step.reward = float("nan")
        elif self.kind == "reward raises":
            step.reward, _ = evaluate(odd_reward, self.task, [message])
        return step


STATUS = {
    "hang": "environment_timeout",
    "raise": "environment_error",
    "exit": "environment_error",
    "interrupt": "environment_error",
    "fork": "done",  # the trainer's process does not fail here
    "flood": "done",  # the episode was already over and scored, so the text is not needed
    "no text": "done",
    "no step": "invalid_reward",
    "nan": "invalid_reward",
    "reward raises": "invalid_reward",
}


def worth(seed: int) -> float:
    return seed % 7 / 7


class Endless(TaskSource):
    size = None

    def __getitem__(self, index):
        return Task(f"t{index}", [{"role": "user", "content": "Go."}])


class Generator(RolloutGenerator):
    temperature = 1.0

    def generate(self, jobs, stage):
        # long enough for a successful call on a busy machine
        budgets = Budgets(tokens=64, context=256, step_seconds=seconds(0.5 if len(jobs) <= 1000 else 1.0))
        loop = AgentLoop(CHAT, Scripted("hi"), Failing, budgets, Sampling(), workers=WORKERS)
        self.rollouts, self.counts = loop.run(torch.nn.Linear(1, 1), jobs, policy_version=0)
        return self.rollouts

    def teacher_prompt(self, rollout, peer):
        return [1], False

    def check_task(self, task):
        pass


@pytest.mark.parametrize("size", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_if_one_rollout_in_a_hundred_fails_in_each_way_the_others_are_unaffected(size, tmp_path, monkeypatch):
    tasks, group, share = size // 8, 8, size // 100
    seeds = [(0, 0, position, r) for position in range(tasks) for r in range(group)]
    order = random.Random(0).sample(range(size), size)
    kinds = {index: kind for k, kind in enumerate(STATUS) for index in order[k * share : (k + 1) * share]}
    hashed = [hash(s) & 0x7FFFFFFF for s in seeds]
    assert len(set(hashed)) == size
    monkeypatch.setattr(Failing, "kinds", {hashed[i]: kind for i, kind in kinds.items()}, raising=False)
    monkeypatch.setattr(Failing, "release", threading.Event(), raising=False)
    monkeypatch.setattr(deadline, "_warned", False)

    data = RolloutDataModule(Endless(), tasks_per_iteration=tasks, group_size=group, micro_batch_size=256)
    data.trainer, data.generator = trainer(tmp_path), Generator()
    threads, files, before = threading.active_count(), len(os.listdir("/proc/self/fd")), children()
    if share < deadline.MANY:
        batches = list(data._iterate())
    else:
        with pytest.warns(UserWarning, match=f"{deadline.MANY} calls of environments, .* have not returned"):
            batches = list(data._iterate())

    expected = Counter(STATUS[kind] for kind in kinds.values())
    expected["done"] += size - len(kinds)
    assert data.generator.counts == data.stats.statuses == expected
    assert data.stats.side_errors == 2 * share, "floods and invalid messages"
    assert sum(data.stats.left_out.values()) == size - expected["done"]
    assert [r.status for r in data.generator.rollouts] == [
        STATUS[kinds[i]] if i in kinds else "done" for i in range(size)
    ]

    found = {i: a for b in batches for i, a in zip(b.index.tolist(), b.advantages.tolist(), strict=True) if i >= 0}
    healthy = {i for i in range(size) if i not in kinds or STATUS[kinds[i]] == "done"}
    assert found.keys() == healthy
    for start in range(0, size, group):
        mine = [i for i in range(start, start + group) if i in healthy]
        wanted = GRPO()(torch.tensor([worth(hashed[i]) for i in mine]))
        assert [found[i] for i in mine] == wanted.tolist(), "failed rollouts must not affect the others"

    assert threading.active_count() - threads == share, "exactly one thread must remain per hanging call"
    Failing.release.set()
    until(lambda: threading.active_count() == threads, "the threads of calls that returned to end")
    assert len(os.listdir("/proc/self/fd")) <= files
    deadline.CallPool().close()  # as in the next iteration, if the last fork exited too late
    assert set(children()) <= set(before), "a process that a tool forked remains"


@pytest.mark.parametrize(("usable", "advantages"), [(0, []), (1, [0.0]), (2, [-0.7071, 0.7071])])
def test_a_group_has_a_signal_if_two_rollouts_remain(usable, advantages, tmp_path, monkeypatch):
    seeds = [hash((0, 0, 0, r)) & 0x7FFFFFFF for r in range(4)]
    rewards = {seed: float(i) for i, seed in enumerate(seeds)}
    monkeypatch.setitem(globals(), "worth", rewards.__getitem__)
    monkeypatch.setattr(Failing, "kinds", dict.fromkeys(seeds[usable:], "raise"), raising=False)
    data = RolloutDataModule(Endless(), tasks_per_iteration=1, group_size=4)
    data.trainer, data.generator = trainer(tmp_path), Generator()
    (batch,) = data._iterate()
    kept = batch.advantages[batch.index >= 0]
    assert kept.tolist() == pytest.approx(advantages, abs=1e-3)
    assert data.stats.zero_spread == (usable < 2), "it must count in train/zero_spread_groups"


# -- what a call may say ----------------------------------------------------------------------------------------------


def test_output_bytes_counts_the_whole_rollout_and_excess_text_is_dropped():
    said = doing(lambda: Step([tool_result("look", "x" * 1000)]), lambda: [{"role": "user", "content": "y" * 500}])
    (rollout,) = play(said, CALL, output_bytes=3000)
    assert (rollout.status, rollout.turns, rollout.learnable) == ("environment_flood", 3, True)
    assert sum(len(m["content"]) for m in rollout.messages if m["role"] == "tool") == 2000
    assert "bytes of text, the remaining limit" in rollout.error
    (rollout,) = play(said, CALL, output_bytes=500)
    assert (rollout.status, rollout.turns, len(rollout.messages)) == ("environment_flood", 0, 1)
    assert not rollout.learnable, "the policy did not cause it"
    (rollout,) = play(doing(), output_bytes=1)
    assert rollout.status == "done", "an environment without messages uses no budget"
    many = doing(lambda: Step([tool_result("look", "ü" * 600)]))
    assert play(many, CALL, output_bytes=1000)[0].turns == 1, "the budget counts bytes, not characters"


def test_excess_text_is_not_copied():
    text = "x" * (256 << 20)

    class Gives(Environment):
        def step(self, message):
            return Step(
                [tool_result("look", text), tool_result("look", "ü" * (1 << 20)), *[tool_result("n", text)] * 9]
            )

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (rollout,) = play(Gives)
    assert rollout.status == "environment_flood"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB"


def test_shared_text_that_expands_in_json_counts_as_a_flood():
    nested = ["x"]
    for _ in range(40):
        nested = [nested, nested]  # 2^40 letters
    (rollout,) = play(doing(lambda: Step([{"role": "tool", "content": "", "data": nested}])))
    assert rollout.status == "environment_flood"


class Slow(Exception):
    def __str__(self):
        time.sleep(1000)
        return ""


def raising(error):
    def step():
        raise error

    return step


def test_error_texts_are_shortened_and_created_within_the_deadline():
    (rollout,) = play(doing(raising(RuntimeError("x" * 5_000_000))))
    assert rollout.status == "environment_error"
    assert len(rollout.error) < 3000
    (rollout,) = play(doing(raising(Slow())), step_seconds=seconds(0.3))
    assert rollout.status == "environment_timeout"
    parts = {f"part {i}": 1.0 for i in range(100_000)}
    (rollout,) = play(doing(lambda: Step(done=True, info={"reward_parts": parts})))
    assert (rollout.status, len(rollout.error) < 1000) == ("invalid_reward", True)


@pytest.mark.parametrize(
    "error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit(), MemoryError(), RecursionError()]
)
def test_no_exception_ends_the_run(error):
    assert play(doing(raising(error)))[0].error.startswith(type(error).__name__)
    assert play(doing(reset=raising(error)))[0].status == "environment_error"


# -- what a call may do -----------------------------------------------------------------------------------------------


def test_the_working_directory_is_restored_after_each_call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gone = tmp_path / "gone"

    def leave():
        gone.mkdir(exist_ok=True)
        os.chdir(gone)
        gone.rmdir()
        return Step(done=True)

    play(doing(leave), jobs=2)
    assert Path.cwd() == tmp_path

    hanging, release = [], threading.Event()

    def hang():
        hanging.append(threading.current_thread())
        os.chdir("/")
        release.wait()
        os.chdir("/")
        return Step(done=True)

    play(doing(hang), step_seconds=seconds(0.2))
    assert Path.cwd() == tmp_path
    release.set()
    for thread in hanging:
        thread.join()
    assert Path.cwd() == tmp_path, "an abandoned call changed it"


def test_an_environment_cannot_modify_the_rollouts_messages():
    class Changes(Environment):
        def step(self, message):
            message["content"] = object()
            return Step(done=True)

    assert play(Changes)[0].messages[-1]["content"] == "hello"


def test_threads_that_a_call_starts_do_not_keep_the_process_alive():
    found = []
    play(doing(lambda: found.append(threading.Thread(target=time.sleep).daemon) or Step(done=True)))
    assert found == [True]


def test_slow_and_abandoned_calls_report_progress():
    reports, release = [], threading.Event()
    hang = doing(reset=lambda: release.wait() or [])
    play(hang, jobs=3, step_seconds=seconds(0.1), retries=0, progress=lambda *numbers: reports.append(numbers))
    release.set()
    assert len(reports) >= (1 if WORKERS else 3), (
        "without progress reports the watchdog would treat many such calls as a hang"
    )


@pytest.mark.parametrize(("taken", "reports"), [(2.0, 3), (0.1, 0)])
def test_slow_calls_report_progress_and_fast_ones_do_not(monkeypatch, taken, reports):
    """In addition, there is one report after each round of turns."""
    now, calls = [0.0], []
    monkeypatch.setattr("gear_lightning.generation.agent_loop.time", SimpleNamespace(monotonic=lambda: now[0]))

    def step():
        now[0] += taken
        return Step(done=True, reward=1.0)

    play(doing(step), jobs=3, progress=lambda *numbers: calls.append(numbers))
    assert len(calls) == reports + 1 or (WORKERS and reports and len(calls) > 1)


def test_a_rollout_ends_after_its_own_time_limit(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("gear_lightning.generation.episode.time", SimpleNamespace(monotonic=lambda: now[0]))

    def step():
        now[0] += 0.2
        return Step([tool_result("look", "x")])

    (rollout,) = play(doing(step), CALL, seconds=0.5, turns=50)  # not waited for: a fake clock
    assert (rollout.status, rollout.turns) == ("truncated", 3)


# -- another try ------------------------------------------------------------------------------------------------------


class Flaky(Environment):
    """Raises in the first ``failures`` resets of each seed."""

    def __init__(self, failures, error, log):
        self.failures, self.error, self.log = failures, error, log

    def reset(self, task, *, seed):
        self.seed = seed
        self.log.append(seed)
        if self.log.count(seed) <= self.failures:
            raise self.error
        return []

    def step(self, message):
        return Step(done=True, reward=1.0)

    def close(self):
        self.log.append("closed")


@pytest.mark.parametrize(
    ("failures", "retries", "error", "status", "tried"),
    [
        (1, 1, ConnectionError("refused"), "done", 1),
        (2, 2, TimeoutError("slow"), "done", 2),
        (2, 1, OSError("busy"), "environment_error", 1),
        (2, 1, TimeoutError("slow"), "environment_timeout", 1),
        (1, 0, ConnectionError("refused"), "environment_error", 0),
        (1, 3, ValueError("wrong"), "environment_error", 0),
    ],
)
def test_a_failed_reset_is_retried(failures, retries, error, status, tried):
    log = []
    first, second = play(lambda: Flaky(failures, error, log), jobs=2, retries=retries)
    assert (first.status, second.status) == (status, status)
    assert (first.retries, second.retries) == (tried, tried)
    assert log.count("closed") == 2 * (tried + 1), "every environment must be closed"
    seeds = [entry for entry in log if entry != "closed"]
    assert seeds == seeds[:2] * (tried + 1), "retries come after the other rollouts"


def test_nothing_is_retried_after_the_first_token():
    resets = []
    broken = doing(raising(ConnectionError("gone")), lambda: resets.append(1) or [])
    (rollout,) = play(broken, retries=3)
    assert (rollout.status, rollout.retries, len(resets)) == ("environment_error", 0, 1)
    assert rollout.error == "ConnectionError: gone"


def test_budgets_are_checked():
    with pytest.raises(UserError, match=r"budgets\.retries=-1: must be at least 0"):
        Budgets(retries=-1)
    with pytest.raises(UserError, match=r"budgets\.output_bytes=0: must be above 0"):
        Budgets(output_bytes=0)
