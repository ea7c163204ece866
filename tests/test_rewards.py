"""Rewards: scores, rejected answers, and the effect of an invalid reward."""

import importlib.util
from decimal import Decimal

import pytest
import torch
from scripted_policy import answered

from gear_lightning.environments.base import Message, RewardError, Task, tool_call, tool_result
from gear_lightning.environments.calculator import Calculator
from gear_lightning.environments.single_turn import SingleTurn
from gear_lightning.errors import UserError
from gear_lightning.rewards import check_reward, evaluate, last_number, resolve_reward, reward_of


def task(**meta) -> Task:
    return Task("t1", [{"role": "user", "content": "?"}], meta=meta)


def score(reward: str, answer: object, text: str) -> float:
    said: list[Message] = [tool_call("calculator", {"expression": "1"}, "99"), tool_result("calculator", "98")]
    return evaluate(resolve_reward(reward), task(answer=answer), [*said, {"role": "assistant", "content": text}])[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no number", None),
        ("", None),
        ("It is 12.", "12"),
        ("12 of 30", "30"),
        ("1,234,567.89 in all", "1234567.89"),
        ("1,2,3", "3"),
        ("$ 5 or $1,000.", "1000"),
        ("-$5", "-5"),
        ("= −5", "-5"),
        ("x = - 5", "-5"),
        ("$\\boxed{-5}$", "-5"),
        ("(-5)", "-5"),
        ("3-5", "5"),
        ("f(2)-5", "5"),
        ("That is 12 - 5", "5"),
        ("Either:\n- 5", "5"),
        ("-.5", "-0.5"),
        ("**12**", "12"),
        ("3. \n", "3"),
        ("50%", "50"),
        ("1/2", "2"),
        ("so 5\n#### 12 of 30", "12"),
        ("#### 1\n#### 2", "2"),
        ("so 5\n####", "5"),
        ("#### none", None),
        ("9" * 400, "9" * 400),
    ],
)
def test_the_last_number_of_a_text(text, value):
    assert last_number(text) == (None if value is None else Decimal(value))


@pytest.mark.parametrize(
    ("reward", "answer", "text", "expected"),
    [
        ("exact", "Paris", " paris\n", 1),
        ("exact", " Paris", "Paris", 1),
        ("exact", "Paris", "Paris.", 0),
        ("exact", "STRASSE", "straße", 1),
        ("exact", 12, "12", 1),
        ("contains", "Paris", "It is PARIS.", 1),
        ("contains", "Paris", "It is Rome.", 0),
        ("contains", 12, "It is 12.", 1),
        ("number", "12", "It is 12.0.", 1),
        ("number", 12.5, "12.50 dollars", 1),
        ("number", "1,450,000", "$1450000", 1),
        ("number", "12", "12, or 13", 0),
        ("number", "12", "twelve", 0),
        ("number", "12", "", 0),
        ("number", "12", "-12", 0),
        ("number", "12", "12.00001", 0),
        ("number", "12", "11.9999999", 1),
        ("number", "1000000", "1000001", 0),
        ("number", "12345678901234567890", "12345678901234567891", 0),
        ("number", "9" * 400, "9" * 400, 1),
        ("number", "0.333333", "0.33333333333", 1),
        ("number", "0.333333", "0.3333", 0),
        ("number", "0.000000333333", "0", 0),
        ("number", "0.000000333333", "0.000000333333", 1),
    ],
)
def test_built_in_rewards(reward, answer, text, expected):
    assert score(reward, answer, text) == expected


def test_only_the_final_answer_counts():
    assert score("number", "98", "no number here") == 0
    assert score("contains", "99", "nothing") == 0
    with_calls = [{"role": "assistant", "content": "12", "tool_calls": []}, tool_result("calculator", "13")]
    assert evaluate(resolve_reward("number"), task(answer=12), with_calls)[0] == 1, "not the last assistant message"


@pytest.mark.parametrize(
    ("reward", "meta", "message"),
    [
        ("exact", {}, "task t1 has no answer"),
        ("contains", {}, "task t1 has no answer"),
        ("number", {}, "task t1 has no answer"),
        ("contains", {"answer": " "}, "task t1: its answer is empty"),
        ("number", {"answer": "twelve"}, "task t1: its answer 'twelve' contains no number"),
    ],
)
def test_answers_that_cannot_be_scored_are_rejected_before_training(reward, meta, message):
    for environment in (SingleTurn(reward), Calculator(reward)):
        with pytest.raises(UserError) as caught:
            environment.check(task(**meta))
        assert message in str(caught.value)
    rollout = answered(task(**meta), lambda: SingleTurn(reward), "12")
    assert (rollout.status, rollout.learnable) == ("invalid_reward", False)
    assert message in str(rollout.error)


def by_length(task, transcript):
    return float(len(transcript[-1]["content"]))


NOT_A_REWARD = 3
HERE = f"{__name__}.by_length"


def test_the_tasks_reward_takes_precedence_over_the_environments():
    rollout = answered(task(reward=HERE, answer="abc"), lambda: SingleTurn("exact"), "abcd")
    assert (rollout.status, rollout.reward) == ("done", 4)
    assert reward_of(task(), by_length) is by_length
    assert reward_of(task(reward=None), HERE) is by_length
    with pytest.raises(UserError, match="task t1: no reward is set; set one"):
        SingleTurn().check(task(answer="1"))
    check_reward(task(), by_length)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("numbr", "neither built in (exact, contains, number, math, format) nor an import path"),
        ("no_such_module.f", "'no_such_module.f' cannot be imported (ModuleNotFoundError: No module named"),
        (f"{__name__}.nothing", "has no attribute 'nothing'"),
        (f"{__name__}.NOT_A_REWARD", "is a int, not a function"),
        ("..x", "cannot be imported"),
        (".", "cannot be imported"),
        ("broken_rewards.f", "cannot be imported (SyntaxError: "),
        ("failing_rewards.f", "cannot be imported (ZeroDivisionError: division by zero)"),
        (3, "reward 3 is not a name, an import path or a function"),
    ],
)
def test_invalid_reward_names_give_a_one_line_error_with_the_task(reward, message, tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("def f(:")
    (tmp_path / "failing_rewards.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as caught:
        SingleTurn().check(task(reward=reward, answer="1"))
    assert message in str(caught.value)
    assert str(caught.value).startswith("task t1: reward ")


@pytest.mark.parametrize(
    ("reward", "answer", "text", "value"),
    [
        ("exact", ["Paris", "paris, France"], "Paris, France", 1),
        ("exact", ["Paris", "paris, France"], "France", 0),
        ("exact", True, "true", 1),
        ("exact", False, "true", 0),
        ("contains", ["five", 5], "It is 5.", 1),
        ("contains", ["five", "6"], "It is 5.", 0),
        ("number", [5, "7"], "It is 7.", 1),
        ("number", [5, "7"], "It is 6.", 0),
        ("number", [5], "none", 0),
    ],
)
def test_an_answer_may_be_a_list_of_accepted_ones_or_a_truth_value(reward, answer, text, value):
    SingleTurn().check(task(reward=reward, answer=answer))
    assert score(reward, answer, text) == value


@pytest.mark.parametrize(
    ("reward", "answer", "reason"),
    [
        ("number", [5, "five"], "its answer 'five' contains no number"),
        ("number", True, "its answer 'true' contains no number"),
        ("contains", ["a", " "], "its answer is empty"),
        ("exact", [], "has no answer"),
    ],
)
def test_each_of_several_answers_is_checked_before_training(reward, answer, reason):
    with pytest.raises(UserError, match=f"task t1: {reason}|task t1 {reason}"):
        SingleTurn().check(task(reward=reward, answer=answer))


class Unprintable:
    def __str__(self):
        raise ValueError("no")

    __repr__ = __str__


def raising(task, transcript):
    raise KeyError("lost")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raising, "task t1: the reward raised KeyError: 'lost'"),
        (lambda task: 1.0, "the reward raised TypeError"),
        (lambda *_: None, "task t1: the reward returned None, expected a finite number"),
        (lambda *_: float("nan"), "the reward returned nan"),
        (lambda *_: float("-inf"), "the reward returned -inf"),
        (lambda *_: "1", "the reward returned '1'"),
        (lambda *_: [1.0, 2.0], "the reward returned a list"),
        (lambda *_: torch.tensor([1.0, 2.0]), "the reward returned a Tensor"),
        (lambda *_: 10**5000, "the reward returned a int"),
        (lambda *_: Unprintable(), "the reward returned a Unprintable"),
        (lambda *_: {"a": 1.0, "b": None}, "the reward returned b = None"),
        (lambda *_: {"a": float("inf"), "b": 1.0}, "the reward returned a = inf"),
        (lambda *_: {"a": 1e308, "b": 1e308}, "the reward returned the sum inf"),
    ],
)
def test_an_invalid_reward_fails_the_rollout_and_is_reported(reward, message):
    for environment in (SingleTurn, Calculator):
        rollout = answered(task(), lambda e=environment: e(reward), "hello")
        assert (rollout.status, rollout.learnable, rollout.reward) == ("invalid_reward", False, 0)
        assert message in str(rollout.error)


@pytest.mark.parametrize("value", [1, True, 0.75, torch.tensor(0.5), -2.0])
def test_all_numeric_types_are_valid_rewards(value):
    rollout = answered(task(), lambda: SingleTurn(lambda *_: value), "hello")
    assert (rollout.status, rollout.reward, type(rollout.reward)) == ("done", float(value), float)


def test_parts_are_summed_and_recorded():
    rollout = answered(task(), lambda: SingleTurn(lambda *_: {"right": 1, "short": -0.25}), "hello")
    assert (rollout.status, rollout.reward, rollout.success) == ("done", 0.75, False)
    assert rollout.reward_parts == {"right": 1.0, "short": -0.25}


def test_a_missing_extra_gives_a_one_line_error_with_the_install_command(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "math_verify" else find(name, *a))
    with pytest.raises(UserError) as caught:
        SingleTurn("math").check(task(answer="1"))
    assert "pip install 'gear_lightning[math-verify]'" in str(caught.value)
    assert "\n" not in str(caught.value)


class TestMath:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("math_verify")

    @pytest.mark.parametrize(
        ("answer", "text", "expected"),
        [
            ("1/2", "So it is $\\frac{1}{2}$.", 1),
            ("\\frac{1}{2}", "\\boxed{0.5}", 1),
            ("x^2 - 1", "$(x-1)(x+1)$", 1),
            ("12", "The answer is 12.", 1),
            (12, "The answer is 13.", 0),
            ("1/2", "", 0),
            ("12", "half a character \ud800 then $12$", 1),
        ],
    )
    def test_answers_are_compared_mathematically(self, answer, text, expected):
        assert score("math", answer, text) == expected

    def test_a_gold_answer_that_is_not_mathematics_raises(self):
        with pytest.raises(RewardError, match="task t1: math-verify cannot read its answer ''"):
            score("math", "", "$1$")

    def test_a_malicious_answer_hits_the_deadline_and_the_next_is_scored(self):
        from gear_lightning.environments import math_judge

        assert math_judge.judge("1", "$1$") == "right"
        verdict = math_judge.judge("1", "$9^{9^{9^9}}$", seconds=1)  # not waited for: it would never finish
        assert verdict == "too long"
        assert math_judge.judge("1", "$1$") == "right"

    def test_a_killed_worker_is_restarted_without_a_wrong_verdict(self):
        from gear_lightning.environments import math_judge

        assert math_judge.judge("1", "$1$") == "right"
        assert math_judge._worker is not None
        math_judge._worker.process.kill()
        math_judge._worker.process.wait()
        assert math_judge.judge("1", "$1$") == "right"

    def test_malicious_answers_score_0_in_a_rollout(self):
        rollout = answered(task(answer="1", reward="math"), SingleTurn, "$9^{9^{9^9}}$")
        assert (rollout.status, rollout.reward, rollout.learnable) == ("done", 0, True)


# -- form, and several rewards -----------------------------------------------------------------------------------------

CALL = tool_call("calculator", {"expression": "1"})
RESULT = tool_result("calculator", "1")


def said(content: str, **keys) -> Message:
    return {"role": "assistant", "content": content, **keys}


@pytest.mark.parametrize(
    ("transcript", "value"),
    [
        ([said("It is 1.")], 1),
        ([said("It is 1.", reasoning="Hm.")], 1),
        ([CALL, RESULT, said("It is 1.")], 1),
        ([said("Wait."), {"role": "user", "content": "?"}, said("It is 1.")], 1),
        ([], 0),
        ([said("")], 0),
        ([said(" \n", reasoning="Hm.")], 0),
        ([said("", reasoning="Hm.", unfinished=True)], 0),
        ([said("I say", reasoning="Hm.", unfinished=True)], 0),
        ([{**CALL, "reasoning": "Hm.", "unfinished": True}, RESULT, said("It is 1.")], 0),
        ([said(""), {"role": "user", "content": "?"}, said("It is 1.")], 0),
        ([CALL, RESULT], 0),
    ],
)
def test_the_form_of_a_transcript(transcript, value):
    assert evaluate(resolve_reward("format"), task(), transcript) == (value, {})
    check_reward(task(), "format")


def test_rewards_are_summed_with_their_weights():
    both = {"number": 1.0, "format": 0.25, HERE: -2}
    right = [said("It is 12.", reasoning="Hm.")]
    total, parts = evaluate(resolve_reward(both), task(answer=12), right)
    own = evaluate(resolve_reward(HERE), task(answer=12), right)[0]
    assert parts == {"number": 1.0, "format": 0.25, HERE: -2 * own}
    assert total == pytest.approx(1.25 - 2 * own)
    rollout = answered(task(answer=12), lambda: SingleTurn({"number": 1.0, "format": 0.25}), "It is 13.")
    assert (rollout.reward, rollout.success, rollout.reward_parts) == (0.25, False, {"number": 0.0, "format": 0.25})
    assert reward_of(task(reward=both), "exact")(task(answer=12), right)["format"] == 0.25


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "names no reward"),
        ({"number": 0.0}, "reward 'number' has the weight 0.0; weights must be finite numbers, and not 0"),
        ({"number": float("nan")}, "has the weight nan"),
        ({"number": True}, "has the weight True"),
        ({"nmber": 1.0}, "reward 'nmber' is neither built in"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        check_reward(task(answer=1), weights)


def test_every_term_of_a_sum_needs_the_task_s_answer():
    with pytest.raises(UserError, match="task t1 has no answer"):
        check_reward(task(), {"format": 0.2, "number": 1.0})
