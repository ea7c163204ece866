"""Environments and task sources: the results of their episodes, and the effect of mistakes."""

import importlib.util
import json
import re

import pytest
from deadlines import seconds
from scripted_policy import answered

from gear_lightning.environments.base import Task, calls
from gear_lightning.environments.calculator import CALCULATOR, Calculator
from gear_lightning.environments.functions import FunctionTools, tool_schemas
from gear_lightning.environments.gsm8k import GSM8KDemonstrations, GSM8KTasks
from gear_lightning.environments.reasoning_gym import ReasoningGymTasks
from gear_lightning.environments.single_turn import SingleTurn
from gear_lightning.environments.tools import ToolError
from gear_lightning.errors import UserError
from gear_lightning.generation.budgets import Budgets
from gear_lightning.rewards import evaluate, resolve_reward


def call(name: str, times: int = 1, **arguments) -> str:
    return f"<tool_call>{json.dumps([{'name': name, 'arguments': arguments}] * times)}</tool_call>"


def sum_task(**meta) -> Task:
    return Task("t1", [{"role": "user", "content": "6 * 7?"}], (CALCULATOR,), meta={"answer": "42", **meta})


def results(rollout) -> list[str]:
    return [m["content"] for m in rollout.messages if m["role"] == "tool"]


def test_a_single_turn_is_scored_and_ends_the_episode():
    rollout = answered(sum_task(), lambda: SingleTurn("number"), "It is 42.", "never said")
    assert (rollout.status, rollout.reward, rollout.success, rollout.turns) == ("done", 1.0, True, 1)
    environment = SingleTurn("number")
    environment.reset(sum_task(), seed=0)
    assert environment.step({"role": "assistant", "content": "It is 41."}).done


def test_the_calculator_answers_until_a_message_has_no_call():
    turns = ("I multiply. " + call("calculator", expression="6 * 7"), "It is 42.")
    rollout = answered(sum_task(), lambda: Calculator("number"), *turns)
    assert (rollout.status, rollout.reward, rollout.success, rollout.turns) == ("done", 1.0, True, 2)
    assert results(rollout) == ["42"]
    assert [m["role"] for m in rollout.messages] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    ("said", "result"),
    [
        (call("calculator", expression=12.5), "12.5"),
        (call("calculator", expression="1/0"), "error: division by zero"),
        (call("calculator", expression="9**9**9**9"), "error: an exponent must be a whole number from -256 to 256"),
        (call("calculator", expression=["1"]), "error: the expression must be text"),
        (call("calculator", expression=None), "error: the expression must be text"),
        (call("calculator"), "error: calculator takes one argument, expression"),
        (call("calculator", formula="1"), "error: calculator takes one argument, expression"),
        (call("python", code="1"), "error: there is no tool 'python'; the tools are: calculator"),
        (call("p" * 99, code="1"), f"error: there is no tool '{'p' * 40}'; the tools are: calculator"),
    ],
)
def test_invalid_calls_get_an_error_message_and_the_episode_continues(said, result):
    rollout = answered(sum_task(), lambda: Calculator("number"), said, "It is 42.")
    assert (rollout.status, rollout.reward) == ("done", 1.0)
    assert results(rollout) == [result]
    rollout.messages[2]["name"].encode()


@pytest.mark.parametrize(("max_calls", "status"), [(4, "done"), (3, "truncated")])
def test_exceeding_max_calls_ends_the_episode_without_a_score(max_calls, status):
    two = call("calculator", 2, expression="6 * 7")
    rollout = answered(sum_task(), lambda: Calculator("number", max_calls), two, two, "42")
    assert (rollout.status, rollout.learnable, rollout.success) == (status, True, status == "done")
    assert rollout.reward == (status == "done")
    assert len(results(rollout)) == (4 if status == "done" else 2)


def test_max_calls_must_be_positive():
    with pytest.raises(UserError, match="max_calls=0: must be at least 1"):
        Calculator(max_calls=0)


def add(a: int, b: int = 1) -> int:
    """Add numbers.

    Args:
        a: one.
        b: another.
    """
    return a + b


def say(text: str) -> str:
    """Say a text.

    Args:
        text: it.
    """
    return "half \ud83d" if text == "half" else text  # half of a surrogate pair, as in a wrongly cut string


def refuse() -> str:
    """Refuse."""
    raise ToolError("not today")


def broken() -> str:
    """Break."""
    raise KeyError("lost")


HERE = __name__
TOOLS = [f"{HERE}.{f.__name__}" for f in (add, say, refuse, broken)]


def tools_task() -> Task:
    return Task("t1", [{"role": "user", "content": "?"}], tool_schemas(TOOLS), meta={"answer": "ok"})


@pytest.mark.parametrize(
    ("said", "result"),
    [
        (call("add", a=2, b=3), "5"),
        (call("add", a=2), "3"),
        (call("add"), "error: add: missing a required argument: 'a'"),
        (call("add", a=1, c=1), "error: add: got an unexpected keyword argument 'c'"),
        (call("refuse"), "error: not today"),
        (call("broken"), """{"error": "KeyError: 'lost'"}"""),
        (call("sub", a=1), "error: there is no tool 'sub'; the tools are: add, say, refuse, broken"),
        (call("say", text="x" * 20_000), "x" * 10_000),
        (call("say", text="half"), "half ?"),
    ],
)
def test_python_functions_answer_calls(said, result):
    budgets = Budgets(tokens=30_000, context=60_000, step_seconds=seconds(30))
    rollout = answered(tools_task(), lambda: FunctionTools(TOOLS, "exact"), said, "ok", budgets=budgets)
    assert (rollout.status, rollout.reward) == ("done", 1.0)
    assert results(rollout) == [result]


def test_function_tools_are_checked_before_training():
    FunctionTools(TOOLS, "exact").check(tools_task())
    with pytest.raises(UserError, match="task t1 lists the tool 'say', but FunctionTools provides only: add"):
        FunctionTools(TOOLS[:1], "exact").check(tools_task())
    with pytest.raises(UserError, match="task t1: no reward is set"):
        FunctionTools(TOOLS).check(tools_task())
    with pytest.raises(UserError, match=rf"tool '{HERE}\.nothing' cannot be imported"):
        FunctionTools([f"{HERE}.nothing"])
    with pytest.raises(UserError, match=r"another tool is called 'add' already; rename one"):
        FunctionTools([f"{HERE}.add", "operator.add"])


def test_the_gsm8k_samples_have_answers_and_clean_references():
    for split, size in (("train", 64), ("test", 16)):
        tasks = GSM8KTasks(split=split)
        found = [tasks[i] for i in range(tasks.size)]
        assert tasks.size == size
        assert len({t.id for t in found}) == size
        for task in found:
            assert task.id.startswith(f"gsm8k-{split}-")
            assert re.fullmatch(r"-?[0-9,]+", task.meta["answer"])
            assert not set("<>") & set(task.reference)
            assert list(task.tools) == [CALCULATOR]
            assert [m["role"] for m in task.messages] == ["system", "user"]
            assert evaluate(resolve_reward("number"), task, [{"role": "assistant", "content": task.reference}])[0] == 1
            Calculator().check(task)
    first = GSM8KTasks(calculator=False, instruction="Think.")[0]
    assert (first.id, first.meta["answer"], first.tools) == ("gsm8k-train-1", "72", ())
    assert first.messages[0]["content"] == "Think."


def test_every_demonstration_gets_reward_1_and_matches_the_calculator():
    demonstrations, size = GSM8KDemonstrations(), 64
    shown = [demonstrations[i] for i in range(size)]
    assert len({d.task.id for d in shown}) == size
    for demonstration in shown:
        environment = Calculator()
        environment.reset(demonstration.task, seed=0)
        messages = list(demonstration.messages)
        while messages:
            said = messages.pop(0)
            step = environment.step(said)
            assert step.messages == messages[: len(calls(said))]
            assert step.done == (not messages), "calls must come first, the answer last"
            del messages[: len(step.messages)]
        assert step.reward == 1
        text = " ".join(m["content"] for m in demonstration.messages if m["role"] == "assistant")
        assert not set("<>") & set(text)


def test_demonstrations_are_reshuffled_each_epoch_and_reproducible():
    def order(seed, epoch):
        demonstrations = GSM8KDemonstrations(seed=seed)
        return [demonstrations[i].task.id for i in range(64 * epoch, 64 * (epoch + 1))]

    assert order(0, 0) == order(0, 0)
    assert sorted(order(0, 0)) == sorted(order(0, 1)) == sorted(order(1, 0))
    assert len({tuple(o) for o in (order(0, 0), order(0, 1), order(1, 0))}) == 3
    for fraction, few, many in ((0.0, 0, 0), (0.5, 50, 110), (1.0, 160, 160)):
        demonstrations = GSM8KDemonstrations(privileged_fraction=fraction)
        assert few <= sum(demonstrations[i].privileged for i in range(160)) <= many
    with pytest.raises(UserError, match=r"privileged_fraction=1\.5: must be in \[0, 1\]"):
        GSM8KDemonstrations(privileged_fraction=1.5)


def test_custom_gsm8k_files_are_read_and_checked(tmp_path):
    path = tmp_path / "mine.jsonl"

    def write(*answers):
        path.write_text("".join(json.dumps({"question": "?", "answer": a}) + "\n" for a in answers))
        return str(path)

    three = ("none\n#### 3", "<<1+1=2>>2\n#### 2", "<<1+1=2>>2, <<2*2=4>>4\n#### 1,004", "<<1/3=.33>>.33\n#### 1")
    tasks = GSM8KTasks(write(*three), min_marks=1, max_marks=1)
    assert [tasks[i].id for i in range(tasks.size)] == ["gsm8k-train-2", "gsm8k-train-4"]
    assert GSM8KTasks(str(path), max_marks=0)[0].reference == "none\n#### 3"
    assert GSM8KTasks(str(path), min_marks=2)[0].meta["answer"] == "1,004"
    shown = GSM8KDemonstrations(str(path))
    assert {shown[i].task.id for i in range(8)} == {"gsm8k-train-2", "gsm8k-train-3"}, "1/3 is not 0.33"
    with pytest.raises(UserError, match=r"mine\.jsonl: no problem has between 3 and None calculator marks"):
        GSM8KTasks(str(path), min_marks=3)
    with pytest.raises(UserError, match="no problem has calculator marks whose values the calculator reproduces"):
        GSM8KDemonstrations(write(three[3]))
    for broken in ("no mark 3", "####", "so\n#### none", 3, None):
        with pytest.raises(UserError, match=r"mine\.jsonl:2: expected the keys question and answer, with #### before"):
            GSM8KTasks(write(three[0], broken))
    with pytest.raises(UserError, match=r"missing\.jsonl does not exist"):
        GSM8KTasks(str(tmp_path / "missing.jsonl"))


def test_a_missing_extra_gives_a_one_line_error_with_the_install_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(UserError) as caught:
        ReasoningGymTasks("chain_sum")
    assert str(caught.value) == "'reasoning_gym' is not installed: pip install 'gear_lightning[reasoning-gym]'"
