"""Ends of rollouts: those that the policy causes are learnable; failures besides the outcome do not change it."""

import random
import time
from functools import partial

import pytest
import torch
from deadlines import seconds
from scripted_policy import CHAT, Scripted, answered
from tiny_runs import AnyCall, data, generation, module, trainer

from gear_lightning.advantage import GiGPO
from gear_lightning.callbacks.health import Health
from gear_lightning.data import RolloutDataModule, RolloutGenerator
from gear_lightning.environments.base import Environment, Step, Task, TaskSource, tool_result
from gear_lightning.environments.calculator import CALCULATOR, Calculator
from gear_lightning.environments.functions import FunctionTools
from gear_lightning.environments.lookup_chain import TOOLS
from gear_lightning.environments.single_turn import SingleTurn
from gear_lightning.generation.agent_loop import AgentLoop
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.engine import SampledTurn, Sampling
from gear_lightning.rollout import LEARNABLE, STATUSES, Rollout
from gear_lightning.runs.records import read_records

CALL = '<tool_call>[{"name": "look", "arguments": {"relation": "r1", "entity": "e1"}}]</tool_call>'
TASK = Task("t1", [{"role": "user", "content": "Go."}], TOOLS, meta={"answer": "12"})
WIDE = Budgets(tokens=4000, context=8000, step_seconds=seconds(5))


def play(environment, *turns: str, stop: bool = True, budgets: Budgets = WIDE, task: Task = TASK) -> Rollout:
    loop = AgentLoop(CHAT, Scripted(*turns, stop=stop), environment, budgets, Sampling())
    (rollout,), _ = loop.run(torch.nn.Linear(1, 1), [(task, (0, 0, 0, 0))], policy_version=0)
    assert len(rollout.states) == len(rollout.turn_rewards) == rollout.turns
    assert sum(rollout.turn_rewards) == pytest.approx(rollout.reward)
    for column in (rollout.action_mask, rollout.turn_ids, rollout.stop_mask, rollout.decisions):
        assert len(column) == len(rollout.tokens)
    return rollout


class Pays(Environment):
    """Rewards each call, and the answer with the value of ``answers`` for its text."""

    answers: dict[str, float] = {}  # noqa: RUF012

    def step(self, message):
        if message.get("tool_calls"):
            return Step([tool_result("look", "e2")], reward=0.25)
        return Step(done=True, reward=self.answers.get(message["content"], 1.0))


def doing(step=None, reset=lambda: [], close=lambda: None) -> type[Environment]:
    class Does(Pays):
        def reset(self, task, *, seed):
            return reset()

        def step(self, message):
            return super().step(message) if step is None else step()

        def close(self):
            close()

    return Does


def raising(error: Exception):
    def act():
        raise error

    return act


# -- a law of all statuses --------------------------------------------------------------------------------------------


def stopped() -> Rollout:
    """Return the rollout that is not finished when another one is enough."""
    loop = AgentLoop(CHAT, Scripted("12"), Pays, WIDE, Sampling(), enough=lambda job, rollout: True)
    (first, second), counts = loop.run(torch.nn.Linear(1, 1), [(TASK, (0, 0)), (TASK, (0, 1))], policy_version=0)
    assert first.status == "done"
    assert counts == {"done": 1, "stopped": 1}
    return second


FLOOD = "x" * 2_000_000
# status -> (cause, how the test produces it)
WAYS = {
    "done": ("policy", partial(play, Pays, "12")),
    "truncated": ("policy", partial(play, Pays, CALL, budgets=Budgets(turns=2, tokens=4000, context=8000))),
    "invalid_tool_call": ("policy", partial(play, Pays, "<tool_call>oops</tool_call>")),
    "empty_response": ("policy", partial(play, Pays, "")),
    "stopped": ("iteration", stopped),
    "environment_flood": ("policy", partial(play, doing(lambda: Step([tool_result("look", FLOOD)])), CALL)),
    "prompt_too_long": ("task", partial(play, Pays, "12", budgets=Budgets(context=10))),
    "environment_error": ("environment", partial(play, doing(raising(KeyError("lost"))), "12")),
    "environment_timeout": ("environment", partial(play, doing(raising(TimeoutError("slow"))), "12")),
    "invalid_reward": ("environment", partial(play, doing(lambda: Step(done=True, reward=float("nan"))), "12")),
}


def test_every_status_that_the_policy_can_cause_is_learnable():
    assert WAYS.keys() == set(STATUSES), "there is a new status: add its cause to this test"
    assert {status for status, (who, _) in WAYS.items() if who == "policy"} == LEARNABLE
    for status, (who, way) in WAYS.items():
        rollout = way()
        assert (rollout.status, rollout.learnable) == (status, who == "policy")


def test_a_flood_before_the_first_turn_is_not_learnable():
    rollout = play(doing(reset=lambda: [{"role": "user", "content": FLOOD}]), "12")
    assert (rollout.status, rollout.turns, rollout.learnable) == ("environment_flood", 0, False)


def test_a_flood_keeps_the_reward_so_far_including_its_own_step():
    steps = iter([Step([tool_result("look", "e2")], reward=0.5), Step([tool_result("look", FLOOD)], reward=-1.0)])
    rollout = play(doing(lambda: next(steps)), CALL)
    assert (rollout.status, rollout.reward, rollout.turn_rewards) == ("environment_flood", -0.5, [0.5, -1.0])
    assert "bytes of text, the remaining limit" in rollout.error
    assert [m["role"] for m in rollout.messages] == ["user", "assistant", "tool", "assistant"]


# -- empty answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " ", "\n \t\n"])
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_an_empty_answer_is_scored_and_learnable_in_any_turn(text, calls):
    class Judges(Pays):
        answers = {"": -1.0}  # noqa: RUF012

    rollout = play(Judges, *[CALL] * calls, text)
    assert (rollout.status, rollout.learnable, rollout.success) == ("empty_response", True, False)
    assert rollout.turn_rewards == [0.25] * calls + [-1.0], "the environment must receive it"
    assert rollout.messages[-1] == {"role": "assistant", "content": ""}
    assert rollout.action_mask[-1]
    assert rollout.stop_mask[-1]


def test_an_empty_answer_can_be_right():
    assert play(partial(SingleTurn, "exact"), "", task=Task("t", TASK.messages, meta={"answer": ""})).success
    wrong = play(partial(SingleTurn, "exact"), "", task=Task("t", TASK.messages, meta={"answer": "12"}))
    assert (wrong.status, wrong.reward, wrong.success) == ("empty_response", 0.0, False)
    final = play(partial(Calculator, "number"), "", task=Task("t", TASK.messages, (CALCULATOR,), meta={"answer": "12"}))
    assert (final.status, final.reward) == ("empty_response", 0.0)


@pytest.mark.parametrize(
    "step",
    [
        raising(IndexError("list index out of range")),  # text.split()[-1]
        raising(TimeoutError("slow")),
        lambda: Step(done=True, reward=float("nan")),
        lambda: None,
        lambda: Step([{"role": "tool", "content": b"x"}]),
        lambda: Step([tool_result("look", FLOOD)]),
        lambda: Step([tool_result("look", "half a pair: \ud800")]),
    ],
)
def test_an_environment_that_fails_on_an_empty_answer_leaves_it_learnable(step):
    said = []

    class Sometimes(Pays):
        def step(self, message):
            said.append(message)
            return super().step(message) if message.get("tool_calls") else step()

    rollout = play(Sometimes, CALL, "")
    assert (rollout.status, rollout.reward, rollout.learnable) == ("empty_response", 0.25, True)
    assert rollout.error is None
    assert rollout.side_error


def test_an_environment_can_answer_an_empty_turn():
    class Asks(Environment):
        def step(self, message):
            if message["content"]:
                return Step(done=True, reward=1.0)
            return Step([{"role": "user", "content": "Say something."}])

    rollout = play(Asks, "", "12")
    assert (rollout.status, rollout.turns, rollout.reward) == ("done", 2, 1.0)
    assert play(Asks, "", budgets=Budgets(turns=3, tokens=99, context=999)).status == "truncated"


def test_a_turn_without_tokens_keeps_the_columns_equally_long():
    class Mute(Scripted):
        def say(self, request):
            return SampledTurn(request.key, [], [], True)

    loop = AgentLoop(CHAT, Mute("x"), Pays, WIDE, Sampling())
    (rollout,), _ = loop.run(torch.nn.Linear(1, 1), [(TASK, (0,))], policy_version=0)
    assert len(rollout.stop_mask) == len(rollout.tokens) == rollout.prompt_length


class Bandit(Scripted):
    """A policy that answers with no text, a wrong answer or the right answer."""

    ARMS = ("", "wrong", "right")

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = logits

    def say(self, request):
        (arm,) = random.Random(repr(request.seed)).choices(self.ARMS, self.logits.softmax(0).tolist())
        ids = [*CHAT.encode(arm), CHAT.turn.end]
        return SampledTurn(request.key, ids, [0.0] * len(ids), True)


class Guesses(TaskSource):
    size = None

    def __getitem__(self, index):
        return Task(f"t{index}", [{"role": "user", "content": "Go."}], meta={"answer": "right"})


class Plays(RolloutGenerator):
    temperature = 1.0

    def __init__(self, logits: torch.Tensor):
        self.engine = Bandit(logits)

    def generate(self, jobs, stage):
        loop = AgentLoop(CHAT, self.engine, partial(SingleTurn, "exact"), Budgets(), Sampling())
        return loop.run(torch.nn.Linear(1, 1), jobs, policy_version=0)[0]

    def teacher_prompt(self, rollout, peer):
        return [1], False

    def check_task(self, task):
        pass


def test_a_policy_that_gives_empty_answers_learns_to_answer(tmp_path):
    logits = torch.tensor([0.90, 0.07, 0.03]).log()
    source = RolloutDataModule(Guesses(), tasks_per_iteration=8, group_size=8, micro_batch_size=64)
    source.trainer, source.generator = trainer(tmp_path), Plays(logits)
    stop = CHAT.turn.end
    for _ in range(30):
        (batch,) = source._iterate()
        for row, advantage in enumerate(batch.advantages.tolist()):
            said = batch.tokens[row][batch.action_mask[row]].tolist()
            if said:
                arm = Bandit.ARMS.index(CHAT.text([i for i in said if i != stop]))
                chosen = torch.nn.functional.one_hot(torch.tensor(arm), 3)
                logits += 0.1 * advantage * (chosen - logits.softmax(0))
    empty, _, right = logits.softmax(0).tolist()
    assert empty < 0.05, "it is 0.75 if empty answers are excluded"
    assert right > 0.9


def test_states_and_rewards_of_turns_include_an_empty_turn(tmp_path):
    class Told(Plays):
        def generate(self, jobs, stage):
            turns = [[CALL, ""], [CALL, "12"], ["", ""], ["12", ""]]
            return [answered(TASK, Pays, *turns[seed[-1]]) for _, seed in jobs]

    source = RolloutDataModule(Guesses(), tasks_per_iteration=1, group_size=4, advantage=GiGPO())
    source.trainer, source.generator = trainer(tmp_path), Told(torch.zeros(3))
    (batch,) = source._iterate()
    assert batch.size == 4, "all must be learnable"


# -- answers that a budget cut ----------------------------------------------------------------------------------------

TIGHT = Budgets(turns=4, tokens=len("12"), context=8000)


def number(task, transcript):
    return float("12" in transcript[-1]["content"])


@pytest.mark.parametrize(
    "environment", [partial(SingleTurn, number), partial(Calculator, number), partial(FunctionTools, [], number), Pays]
)
def test_a_cut_answer_is_truncated_and_keeps_its_reward(environment):
    rollout = play(environment, "12 and more", stop=False, budgets=TIGHT)
    assert (rollout.status, rollout.reward, rollout.success) == ("truncated", 1.0, True)
    whole = play(environment, "12", budgets=Budgets(tokens=TIGHT.tokens + 1, context=8000))
    assert (whole.status, whole.success) == ("done", True), "its stop token is the last token within the budget"
    assert whole.stop_mask[-1]


def test_the_final_answer_of_an_episode_with_tools_can_be_cut():
    budgets = Budgets(tokens=500, turn_tokens=len(CALL) + 1, context=8000)
    rollout = play(Pays, CALL, "x" * 400, budgets=budgets)
    assert (rollout.status, rollout.turns, rollout.reward) == ("truncated", 2, 1.25)


def test_a_budget_of_one_token_allows_a_complete_or_a_cut_answer():
    one = Budgets(tokens=1, context=8000)
    assert play(Pays, "", budgets=one).status == "empty_response"
    assert play(Pays, "12", budgets=one).status == "truncated"
    assert play(Pays, " ", budgets=one).status == "truncated", "cut white space is not an empty answer"


def test_a_run_counts_cut_answers(tmp_path):
    class Scores(AnyCall):
        def step(self, message):
            return Step(done=True, reward=float(len(message["content"])))

    fit = trainer(tmp_path, generation(environment=Scores, budgets=Budgets(tokens=1, context=96)), max_epochs=1)
    fit.fit(module(), datamodule=data())
    assert fit.callback_metrics["rollouts/truncated"] > 0.8
    (record,) = read_records(tmp_path)
    assert all(r["row"] is not None for r in record.rollouts)


# -- failures beside the outcome --------------------------------------------------------------------------------------


def test_a_failing_close_does_not_change_the_score():
    rollout = play(doing(close=raising(RuntimeError("connection lost"))), CALL, "12")
    assert (rollout.status, rollout.reward, rollout.success, rollout.error) == ("done", 1.25, True, None)
    assert rollout.side_error == "close: RuntimeError: connection lost"
    rollout = play(doing(close=lambda: time.sleep(1000)), "12", budgets=Budgets(tokens=99, step_seconds=seconds(0.2)))
    assert (rollout.status, rollout.reward, rollout.learnable) == ("done", 1.0, True)
    assert rollout.side_error == f"close: no result within {seconds(0.2):g} s"
    failed = play(doing(raising(KeyError("lost")), close=raising(ValueError("too"))), "12")
    assert (failed.status, failed.error) == ("environment_error", "KeyError: 'lost'")
    assert failed.side_error == "close: ValueError: too"


def test_a_failing_close_before_a_retry_is_recorded():
    tries = []

    class Flaky(Pays):
        def reset(self, task, *, seed):
            tries.append(seed)
            if len(tries) == 1:
                raise ConnectionError("refused")
            return []

        def close(self):
            if len(tries) == 1:
                raise RuntimeError("close broke")

    rollout = play(Flaky, "12")
    assert (rollout.status, rollout.retries, rollout.side_error) == ("done", 1, "close: RuntimeError: close broke")


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (Step([tool_result("look", FLOOD)], 1.0, True), "bytes of text"),
        (Step([{"role": "tool", "content": b"x"}], 1.0, True), "expected a message"),
        (Step(5, 1.0, True), "expected a list of messages"),
        (Step([], 1.0, True, info={"state": 5}), "state 5, expected text"),
        (Step([], 1.0, True, info={"feedback": FLOOD}), "feedback of more than"),
        (Step([], 1.0, True, info={"decisions": [{"text": "r7", "right": True}]}), "does not contain"),
    ],
)
def test_invalid_parts_of_a_last_step_do_not_change_its_score(step, error):
    rollout = play(doing(lambda: step), "12")
    assert (rollout.status, rollout.reward, rollout.success, rollout.error) == ("done", 1.0, True, None)
    assert error in rollout.side_error
    assert rollout.messages[-1]["role"] == "assistant"
    assert not any(rollout.decisions)


BAD = (tool_result("look", "half a pair: \ud800"), tool_result("look", FLOOD), {"role": "tool", "content": b"x"})


@pytest.mark.parametrize("bad", BAD, ids=("surrogate", "flood", "bytes"))
def test_messages_that_the_policy_will_not_see_need_not_be_valid(bad):
    environment = doing(lambda: Step([bad], reward=1.0))
    rollout = play(environment, CALL, budgets=Budgets(turns=1, tokens=4000, context=8000))
    assert (rollout.status, rollout.reward) == ("truncated", 1.0), "no turns are left"
    rollout = play(environment, "12 and more", stop=False, budgets=TIGHT)
    assert (rollout.status, rollout.reward) == ("truncated", 1.0), "no tokens are left"
    assert not play(environment, CALL).status.startswith(("done", "truncated")), "it is needed if another turn follows"


def test_a_run_counts_and_reports_side_errors(tmp_path):
    class Leaks(AnyCall):
        def close(self):
            raise RuntimeError("close broke")

    fit = trainer(tmp_path, generation(environment=Leaks), max_epochs=1)
    with pytest.warns(UserWarning, match=r"task lookup-train.*close: RuntimeError: close broke.*keeps its reward"):
        fit.fit(module(), datamodule=data())
    assert fit.callback_metrics["rollouts/side_errors"] == 1
    assert fit.callback_metrics["rollouts/environment_error"] == 0
    (record,) = read_records(tmp_path)
    assert all(r["side_error"] == "close: RuntimeError: close broke" for r in record.rollouts)
    assert all(r["row"] is not None and r["error"] is None for r in record.rollouts)


def test_health_warns_if_most_rollouts_are_excluded(tmp_path):
    class Fails(AnyCall):
        def reset(self, task, *, seed):
            if random.Random(seed).random() < 0.8:
                raise ValueError("no such table")
            return super().reset(task, seed=seed)

    fit = trainer(tmp_path, generation(environment=Fails), Health(), max_epochs=2)
    with pytest.warns(UserWarning, match=r"of the iteration's 8 rollouts are left out .* environment_error") as warned:
        fit.fit(module(), datamodule=data())
    assert sum("left out of learning" in str(w.message) for w in warned) == 1
