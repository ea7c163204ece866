"""Information from an environment besides its reward: right decisions, the state in which a turn began, feedback."""

import re

import pytest
import torch
from scripted_policy import CHAT, Scripted

from gear_lightning.environments.base import Environment, Step, Task, tool_call
from gear_lightning.environments.decisions import find
from gear_lightning.environments.lookup_chain import (
    CONFUSED,
    MEANING,
    THINKING_WORDS,
    TOOLS,
    LookupChain,
    LookupChainDemonstrations,
    LookupChainTasks,
    solution,
)
from gear_lightning.generation.agent_loop import AgentLoop
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.chat import Chat
from gear_lightning.generation.engine import SampledTurn, Sampling
from gear_lightning.models import FromScratch
from gear_lightning.rollout import Rollout

CALL = '<tool_call>[{"name": "look", "arguments": {"relation": "r1", "entity": "e1"}}]</tool_call>'


def play(environment, *turns: str) -> Rollout:
    loop = AgentLoop(CHAT, Scripted(*turns), environment, Budgets(tokens=4000, context=8000), Sampling())
    task = Task("t1", [{"role": "user", "content": "Go."}], TOOLS)
    (rollout,), _ = loop.run(torch.nn.Linear(1, 1), [(task, (0, 0, 0, 0))], policy_version=0)
    return rollout


class Tells(Environment):
    """Returns the ``info`` of its class attribute for each turn."""

    info: dict = {}  # noqa: RUF012

    def step(self, message):
        if message.get("tool_calls"):
            return Step([{"role": "tool", "name": "look", "content": "e2"}], reward=0.25, info=self.info)
        return Step(done=True, reward=1.0, info={"feedback": "the answer is right"})


def telling(**info) -> type[Tells]:
    return type("Telling", (Tells,), {"info": info})


def decided(rollout: Rollout) -> list[tuple[str, int]]:
    """Return the texts of the marked runs of tokens."""
    found, before = [], 0
    for token, mark in zip(rollout.tokens, rollout.decisions, strict=True):
        if mark and mark == before:
            found[-1] = (found[-1][0] + CHAT.text([token]), mark)
        elif mark:
            found.append((CHAT.text([token]), mark))
        before = mark
    return found


def test_decisions_mark_the_tokens_of_their_text():
    environment = telling(
        decisions=[
            {"text": "r1", "right": False, "occurrence": 0},
            {"text": "e1", "right": True},
        ]
    )
    rollout = play(environment, f"r1 or r1 {CALL}", "done")
    assert decided(rollout) == [("r1", -1), ("e1", 1)]
    assert rollout.decisions.index(-1) == rollout.prompt_length  # the first r1, at the start of the turn
    assert not any(mark for mark, sampled in zip(rollout.decisions, rollout.action_mask, strict=True) if not sampled)
    assert rollout.status == "done"


def test_each_turn_has_a_state_and_a_reward():
    rollout = play(telling(), CALL, CALL, "done")
    assert rollout.states == ["", "e2", "e2"]  # by default the text of the last messages
    assert rollout.turn_rewards == [0.25, 0.25, 1.0]
    assert rollout.reward == 1.5
    assert rollout.feedback == "the answer is right"
    assert play(telling(state="room 5"), CALL, "done").states == ["", "room 5"]


@pytest.mark.parametrize(
    ("info", "error"),
    [
        ({"decisions": [{"text": "r7", "right": True}]}, "the decision 'r7', which the turn does not contain"),
        ({"decisions": [{"text": "r1", "right": True, "occurrence": 5}]}, "the decision 'r1'"),
        ({"decisions": [{"text": "r1", "right": True}, {"text": "r7", "right": True}]}, "the decision 'r7'"),
        ({"decisions": [{"text": "r1"}]}, r"expected text \(str\) and right \(bool\)"),
        ({"decisions": [{"text": "", "right": True}]}, r"expected text \(str\)"),
        ({"decisions": {"r1": True}}, "expected a list"),
        ({"state": 5}, "state 5, expected text"),
        ({"state": "x" * 2_000_000}, "a state of more than"),
        ({"feedback": ["no"]}, "feedback .*, expected text"),
    ],
)
def test_invalid_info_is_dropped_and_reported(info, error):
    rollout = play(telling(**info), CALL, "done")
    assert (rollout.status, rollout.reward, rollout.turns) == ("done", 1.25, 2)
    assert re.search(error, rollout.side_error)
    assert not any(rollout.decisions), "if one decision is not found, none is marked"
    assert rollout.states == ["", "e2"], "the text of the messages"
    assert rollout.feedback == "the answer is right"


@pytest.mark.parametrize(
    ("pieces", "text", "occurrence", "places"),
    [
        (["look", "r1", "r12", "r1"], "r1", -1, [3]),  # whole tokens first: r12 does not match r1
        (["look", "r1", "r12", "r1"], "r1", 0, [1]),
        (["lo", "ok r", "1 now"], "r1", -1, [1, 2]),  # split into pieces: all tokens with a part of the text
        (["ab", "ab"], "b", -1, [1]),
        (["a"], "z", -1, []),
        (["", "a", ""], "a", 0, [1]),
    ],
)
def test_find(pieces, text, occurrence, places):
    assert find(pieces, text, occurrence) == places


# the lookup chain -----------------------------------------------------------------------------------------------------


def walk(*calls: tuple[str, ...]) -> list[list[tuple[str, bool]]]:
    """Return the decisions that the environment reports for each call on one task. Words are calls, numbers are steps
    of the solution."""
    task = LookupChainTasks(hops=2)[0]
    environment = LookupChain()
    environment.reset(task, seed=0)
    way = solution(task)
    decisions = []
    for name, *arguments in calls:
        values = dict(zip(["relation", "entity"] if name == "look" else ["entity"], arguments, strict=False))
        for key, value in values.items():
            if isinstance(value, int):
                values[key] = way[value][0 if key == "relation" else 1] if value < len(way) else way[-1][2]
        step = environment.step(tool_call(name, values))
        decisions.append([(d["text"], d["right"]) for d in step.info["decisions"]])
    return decisions


def test_all_decisions_of_the_solution_are_right():
    decisions = walk(("look", 0, 0), ("look", 1, 1), ("submit", 2))
    assert all(right for step in decisions for _, right in step)
    assert [len(step) for step in decisions] == [3, 3, 2]


def test_after_a_wrong_relation_only_going_back_is_right():
    task = LookupChainTasks(hops=2)[0]
    wrong = CONFUSED[task.meta["query"][0]]
    decisions = walk(("look", wrong, 0), ("look", 0, 0), ("look", 1, 1), ("submit", 2))
    assert [right for _, right in decisions[0]] == [True, False, True]
    assert all(right for step in decisions[1:] for _, right in step)
    decisions = walk(("look", wrong, 0), ("submit", 2))  # the right entity only by chance: it is too early to submit
    assert decisions[1][0] == ("submit", False)


def test_the_relation_in_a_thought_is_the_first_decision():
    task = LookupChainTasks(hops=2)[0]
    environment = LookupChain()
    environment.reset(task, seed=0)
    relation, entity, _ = solution(task)[0]
    word = task.meta["query"][0]
    message = tool_call("look", {"relation": relation, "entity": entity}, f"{word} {CONFUSED[word]} t0 t1")
    decisions = environment.step(message).info["decisions"]
    assert decisions[0] == {"text": CONFUSED[word], "right": False, "occurrence": 0}
    assert [d["right"] for d in decisions[1:]] == [True, True, True]


def test_demonstrations_with_thoughts_are_long_and_name_the_relation_early():
    demonstrations = LookupChainDemonstrations(hops=2, thought=3, hard_accuracy=1.0, easy_accuracy=1.0, seed=5)
    for index in range(20):
        item = demonstrations[index]
        says = [m for m in item.messages if m["role"] == "assistant"]
        for message in says[:-1]:
            words = message["content"].split()
            assert len(words) == 2 + 3 * 4
            assert words[0] in task_words(item)
            assert words[1] == message["tool_calls"][0]["function"]["arguments"]["relation"]
            assert set(words) <= set(THINKING_WORDS)
        assert len(says[-1]["content"].split()) == 3 * 4
    plain = LookupChainDemonstrations(hops=2)[0]
    assert all(not m.get("content") for m in plain.messages if m["role"] == "assistant")
    assert {MEANING[w] for w in task_words(demonstrations[0])} >= {
        c["function"]["arguments"]["relation"] for m in demonstrations[0].messages for c in m.get("tool_calls", [])[:1]
        if c["function"]["name"] == "look" and not demonstrations[0].unlearned
    }  # fmt: skip


def test_made_up_references_are_followed_and_do_not_reveal_the_meanings():
    made_up, right = (LookupChainDemonstrations(recovery_fraction=0.0, reference=r) for r in ("made_up", "right"))
    meant = []
    for index in range(200):
        item = made_up[index]
        if not item.privileged:
            assert item == right[index]
            continue
        made = [c["function"] for m in item.messages for c in m.get("tool_calls", [])]
        assert item.task.reference == " ".join(" ".join([c["name"], *c["arguments"].values()]) for c in made)
        follows = {}
        for word, call in zip(task_words(item), made[:-1], strict=True):
            assert follows.setdefault(word, call["arguments"]["relation"]) == call["arguments"]["relation"]
        meant += [relation == MEANING[word] for word, relation in follows.items()]
    assert len(meant) > 200
    assert sum(meant) / len(meant) < 0.15  # 1 of 16 matches by chance


def task_words(item) -> list[str]:
    return item.task.meta["query"]


def test_marks_with_the_built_in_tokenizer():
    """End to end with the built-in tokenizer: a thought, a call, and the marked tokens."""
    tokenizer = FromScratch("gear_lightning.environments.lookup_chain.THINKING_WORDS").tokenizer()
    chat = Chat(tokenizer)
    task = LookupChainTasks(hops=1)[0]
    (relation, entity, result) = solution(task)[0]
    first = f"{task.meta['query'][0]} {relation} t0 t1 t2 t3 look {relation} {entity}"

    class Says(Scripted):
        def say(self, request):
            text = first if request.seed[-1] == 0 else f"submit {result}"
            ids = [*chat.encode(text), chat.turn.end]
            return SampledTurn(request.key, ids, [-0.5] * len(ids), True)

    loop = AgentLoop(chat, Says(), LookupChain, Budgets(tokens=100), Sampling())
    (rollout,), _ = loop.run(torch.nn.Linear(1, 1), [(task, (0, 0, 0, 0))], policy_version=0)
    assert (rollout.status, rollout.reward) == ("done", 1.0)
    marked = [tokenizer.decode([t]).strip() for t, m in zip(rollout.tokens, rollout.decisions, strict=True) if m == 1]
    assert marked == [relation, "look", relation, entity, "submit", result]
    assert -1 not in rollout.decisions


def test_lookup_chain_references_match_their_option():
    calls, answer, another = (LookupChainTasks(2, reference=kind)[7] for kind in ("calls", "answer", "another"))
    assert calls.messages == answer.messages == another.messages
    way = solution(calls)
    assert calls.reference == " ".join([*(f"look {r} {e}" for r, e, _ in way), f"submit {way[-1][2]}"])
    assert answer.reference == f"submit {way[-1][2]}"
    assert another.reference != calls.reference
    assert len(another.reference.split()) == len(calls.reference.split())
