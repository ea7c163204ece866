"""Tasks of reasoning-gym: its scorers compute the reward, and the policy's text is never executed."""

import re
from pathlib import Path

import pytest
from scripted_policy import answered

from gear_lightning.environments.base import Task
from gear_lightning.environments.reasoning_gym import _SHAPES, _UNSAFE, ReasoningGym, ReasoningGymTasks
from gear_lightning.environments.single_turn import SingleTurn
from gear_lightning.errors import UserError

reasoning_gym = pytest.importorskip("reasoning_gym")
JUNK = ["junk", "-", "<answer></answer>", "NaN", "\ud800", "9" * 5000, "<answer>" * 500, "(" * 3000, "None", "\x00"]


def score(task: Task, text: str, **options) -> float:
    environment = ReasoningGym(**options)
    environment.reset(task, seed=0)
    step = environment.step({"role": "assistant", "content": text})
    assert step.done
    assert step.info["success"] == (step.info["reward_parts"]["score"] >= 1)
    return step.reward


def test_the_same_index_and_seed_give_the_same_task():
    tasks = ReasoningGymTasks("chain_sum", size=30, instruction="Be brief.")
    assert tasks.size == 30
    again = [tasks[i] for i in (7, 0, 7)]
    assert again[0] == again[2] == ReasoningGymTasks("chain_sum", size=30, instruction="Be brief.")[7]
    assert again[0].id == "chain_sum-0-7"
    assert [m["role"] for m in again[0].messages] == ["system", "user"]
    assert [m["role"] for m in ReasoningGymTasks("chain_sum", size=1)[0].messages] == ["user"]
    assert ReasoningGymTasks("chain_sum", size=30, seed=1)[7].messages != again[0].messages[1:]


def test_the_reference_is_the_worked_solution_if_the_generator_provides_one():
    task = ReasoningGymTasks("chain_sum", size=1)[0]
    assert re.fullmatch(r"[-+ 0-9]+ = " + re.escape(task.meta["answer"]), task.reference)
    for name in ("gsm_symbolic", "letter_counting"):
        task = ReasoningGymTasks(name, size=1)[0]
        assert isinstance(task.reference, str)
        assert task.reference.rstrip(".").endswith(task.meta["answer"])


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({}, "{}", 1),
        ({}, "  {}\n", 1),
        ({}, "It is {}.", 0),
        ({"answer": "last_number"}, "1 and 2 make {}.00.", 1),
        ({"answer": "last_number"}, "{}, and then 5", 0),
        ({"answer": "last_number"}, "nothing", 0),
        ({"answer": "tag"}, "<answer>1</answer> or <answer>\n{} </answer>", 1),
        ({"answer": "tag"}, "{}", 0),
        ({"answer": "tag"}, "<answer>{}", 0),
        ({"partial_credit": True}, "{}", 1),
    ],
)
def test_the_answer_option_selects_a_part_of_the_reply(options, text, expected):
    tasks = ReasoningGymTasks("chain_sum", size=10)
    for task in (tasks[i] for i in range(10)):
        rollout = answered(task, lambda: ReasoningGym(**options), text.format(task.meta["answer"]))
        assert (rollout.status, rollout.reward, rollout.success) == ("done", expected, expected == 1)


def test_long_numbers_keep_all_their_digits():
    options = {"min_digits": 18, "max_digits": 18, "min_terms": 2, "max_terms": 2}
    task = ReasoningGymTasks("chain_sum", options, size=1)[0]
    assert score(task, f"It is {task.meta['answer']}.", answer="last_number") == 1
    assert score(task, f"It is {int(task.meta['answer']) + 1}.", answer="last_number") == 0


def test_a_whole_number_needs_no_decimals():
    task = ReasoningGymTasks("gcd", size=1)[0]
    assert score(task, f"It is {task.meta['answer']}.00.", answer="last_number") == 1


def test_partial_credit_is_used_only_if_requested():
    task = ReasoningGymTasks("countdown", size=1)[0]
    assert score(task, "1 + 1") == 0
    assert 0 < score(task, "1 + 1", partial_credit=True) < 1
    rollout = answered(task, lambda: ReasoningGym(partial_credit=True), "1 + 1")
    assert rollout.reward_parts == {"score": rollout.reward}
    assert not rollout.success


@pytest.mark.parametrize("name", ["chain_sum", "gsm_symbolic", "countdown", "coin_flip", "sudoku", "word_ladder"])
@pytest.mark.parametrize("answer", ["all", "last_number", "tag"])
def test_invalid_answers_score_0(name, answer):
    task = ReasoningGymTasks(name, size=1)[0]
    assert [score(task, text, answer=answer) for text in JUNK] == [0] * len(JUNK)


def test_an_answer_on_which_the_scorer_raises_scores_0(monkeypatch):
    def raises(self, answer, entry):
        raise ZeroDivisionError

    task = ReasoningGymTasks("chain_sum", size=1)[0]
    assert score(task, task.meta["answer"]) == 1
    monkeypatch.setattr(type(reasoning_gym.create_dataset("chain_sum")), "score_answer", raises)
    assert score(task, task.meta["answer"]) == 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chain_summ", {}, "no data set 'chain_summ'; use one of chain_sum"),
        ("nothing", {}, "no data set 'nothing'; use one of "),
        ("chain_sum", {"terms": 3}, "chain_sum does not accept {'terms': 3}"),
        ("chain_sum", {"min_terms": 5, "max_terms": 2}, "chain_sum does not accept {'min_terms': 5, 'max_terms': 2}"),
        ("chain_sum", {"min_terms": "two"}, "chain_sum does not accept {'min_terms': 'two'}"),
        ("chain_sum", {"seed": 3}, "chain_sum does not accept {'seed': 3}"),
        (
            "composite",
            {"datasets": [{"name": "chain_sum"}]},
            "composite needs objects that a config file cannot",
        ),
        ("rubiks_cube", {}, "rubiks_cube provides no answers, so there is no reference for the teacher"),
    ],
)
def test_the_error_names_invalid_data_sets_and_options(name, options, message):
    with pytest.raises(UserError) as caught:
        ReasoningGymTasks(name, options)
    assert message in str(caught.value)


def test_tasks_of_other_sources_and_empty_sources_are_rejected():
    with pytest.raises(UserError, match="task t1 does not come from ReasoningGymTasks"):
        ReasoningGym().check(Task("t1", []))
    with pytest.raises(UserError, match="size=0: must be at least 1"):
        ReasoningGymTasks("chain_sum", size=0)


@pytest.mark.parametrize("name", sorted(_SHAPES))
def test_answers_that_python_would_execute_score_0_without_reaching_the_scorer(name, tmp_path):
    tasks = ReasoningGymTasks(name, size=5)
    assert [score(tasks[i], tasks[i].meta["answer"]) for i in range(5)] == [1] * 5, "right answers must be scored"
    ran = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(ran)!r}).touch()"
    hostile = [code, f"[{code}]", f"[{code} or 'a']", "9**9**9**9", "1 + 9* *9**9**9", "1e999999999", "[0]*9**9"]
    for text in hostile:
        assert score(tasks[0], text, partial_credit=True) == 0
        assert not ran.exists()


@pytest.mark.parametrize("name", sorted(_UNSAFE))
def test_data_sets_whose_answers_look_like_code_are_rejected(name):
    task = ReasoningGymTasks(name, size=1)[0]
    with pytest.raises(UserError, match=f"scorer of {name} runs the policy's text as Python code; use the environment"):
        ReasoningGym().check(task)
    assert answered(task, ReasoningGym, "1").status == "environment_error"
    rollout = answered(task, lambda: SingleTurn("exact"), task.meta["answer"])
    assert (rollout.status, rollout.reward) == ("done", 1.0), "the alternative in the error message must work"


def test_every_scorer_that_evaluates_answers_is_handled():
    evaluates = re.compile(r"\b(?:eval|exec|parse_expr|Fraction|sympify)\((?:\w+_)?answer\b")
    root = Path(reasoning_gym.__file__).parent
    found = {path.stem for path in root.rglob("*.py") if evaluates.search(path.read_text(encoding="utf-8"))}
    assert found == set(_SHAPES) | _UNSAFE
