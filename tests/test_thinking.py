"""Reasoning in rollouts: parts mark its tokens, a budget closes it, and options that need it are refused without it."""

import csv
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from chat_templates import CHATML, byte_tokenizer
from deadlines import seconds
from template_corpus import TOOLS, USER, chat_of, corpus
from tiny_runs import data, generation, module, source, trainer

from gear_lightning.batch import CALL, REASONING
from gear_lightning.credit import GEAR, RLSD
from gear_lightning.data import make_row
from gear_lightning.environments.base import Demonstration, Environment, Step, Task, tool_result
from gear_lightning.environments.lookup_chain import LookupChainTasks
from gear_lightning.errors import UserError
from gear_lightning.generation import CachedEngine, GenerateEngine
from gear_lightning.generation.agent_loop import AgentLoop
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.chat import Chat, ChatOptions
from gear_lightning.generation.engine import GenerationEngine, SampledTurn, Sampling, TurnRequest
from gear_lightning.learning.warm_start import encode
from gear_lightning.rollout import Rollout
from gear_lightning.runs.records import read_records
from gear_lightning.teacher import TeacherOptions

CHAT = Chat(byte_tokenizer(CHATML), ChatOptions("json_list"))
OPENED = Chat(byte_tokenizer(CHATML[: -len("{% endif %}")] + "<think>\n{% endif %}"), ChatOptions("json_list"))
CALL_TEXT = '<tool_call>[{"name": "weather_now", "arguments": {"city": "Bern"}}]</tool_call>'


class Thinks(GenerationEngine):
    """A policy with a script for each turn; when its reasoning was closed for it, it goes on with ``then``."""

    def __init__(self, chat: Chat, *turns: str, then: str = "It rains."):
        self.chat, self.turns, self.then = chat, turns, then

    def begin(self, model, sampling, stop_ids):
        self.requests, self.waiting, self.rest = [], [], []

    def submit(self, request):
        self.requests.append(request)
        self.waiting.append(request)

    def poll(self):
        waiting, self.waiting = self.waiting, []
        return [self.say(request) for request in waiting]

    def ids(self, text):
        return [*self.chat.encode(text), self.chat.turn.end]

    def say(self, request):
        mark = self.chat.closing()
        if len(request.seed) == 5:
            self.rest = self.ids(self.turns[min(request.seed[-1], len(self.turns) - 1)])
        elif request.ids[-len(mark) :] == mark:
            self.rest = self.ids(self.then)
        said, self.rest = self.rest[: request.max_tokens], self.rest[request.max_tokens :]
        return SampledTurn(request.key, said, [-0.5] * len(said), not self.rest)

    def release(self, key):
        pass

    def end(self):
        pass


class Answers(Environment):
    """Answers calls; a message without calls ends the episode. Keeps the messages."""

    seen: ClassVar[list] = []

    def step(self, message):
        self.seen.append(message)
        marks = [{"text": "rains", "right": True, "occurrence": 0}] if "rains" in message["content"] else []
        if message.get("tool_calls"):
            return Step([tool_result("weather_now", "rain")])
        return Step(done=True, reward=1.0, info={"decisions": marks})


def play(engine: GenerationEngine, chat: Chat = CHAT, tools=TOOLS, environment=Answers, **budgets) -> Rollout:
    Answers.seen = []
    limits = Budgets(**{"tokens": 2000, "context": 4000, "step_seconds": seconds(30), **budgets})
    loop = AgentLoop(chat, engine, environment, limits, Sampling())
    (found,), _ = loop.run(torch.nn.Linear(1, 1), [(Task("t", [USER], tools), (0, 0, 0, 0))], policy_version=0)
    columns = (found.action_mask, found.turn_ids, found.stop_mask, found.sampler_logprobs, found.decisions, found.parts)
    assert {len(column) for column in columns} == {len(found.tokens)}
    for own, turn, logprob, part in zip(
        found.action_mask, found.turn_ids, found.sampler_logprobs, found.parts, strict=True
    ):
        assert own == (turn >= 0) == (logprob != 0)
        assert own or not part
    return found


def part_texts(found: Rollout, chat: Chat = CHAT) -> dict[int, str]:
    """Return the sampled text of each part."""
    mine = [(p, t) for p, t, own in zip(found.parts, found.tokens, found.action_mask, strict=True) if own]
    ids = {part: [t for p, t in mine if p == part] for part in (0, REASONING, CALL)}
    return {part: chat.tokenizer.decode(tokens) for part, tokens in ids.items()}


def test_parts_mark_reasoning_calls_and_answers():
    found = play(Thinks(CHAT, f"<think>I look.</think>\n\nWait.{CALL_TEXT}", "<think>Hm.</think>It rains."))
    assert found.status == "done"
    texts = part_texts(found)
    assert texts[REASONING] == "<think>I look.</think><think>Hm.</think>"
    assert texts[CALL] == f"{CALL_TEXT}<|im_end|>", "a stop token belongs to what it ends"
    assert texts[0] == "\n\nWait.It rains.<|im_end|>"
    assert [m["content"] for m in Answers.seen] == ["Wait.", "It rains."]
    assert [m["reasoning"] for m in Answers.seen] == ["I look.", "Hm."]
    row = make_row(found, found.tokens[: found.prompt_length], 1.0, 0, 0)
    assert row.columns["parts"].tolist() == found.parts
    old = found.state_dict()
    del old["parts"], old["closed_thoughts"]  # a checkpoint of an earlier version
    row = make_row(Rollout.from_state_dict(old, found.task), found.tokens[: found.prompt_length], 1.0, 0, 0)
    assert not row.columns["parts"].any()


def test_a_call_that_cannot_be_read_is_a_call_and_its_reasoning_is_not():
    broken = '<tool_call>[{"name": "weather_now", "arguments": {"city"</tool_call>'
    found = play(Thinks(CHAT, f"<think>I could write {CALL_TEXT}</think>Well. {broken}"))
    assert found.status == "invalid_tool_call"
    texts = part_texts(found)
    assert texts[REASONING] == f"<think>I could write {CALL_TEXT}</think>"
    assert texts[CALL] == f"{broken}<|im_end|>"
    assert found.messages[-1]["content"] == f"Well. {broken}"
    assert found.messages[-1]["reasoning"] == f"I could write {CALL_TEXT}"


def test_a_turn_that_ends_inside_of_its_reasoning_says_so():
    found = play(Thinks(CHAT, "<think>I could guess that"))
    assert found.messages[-1] == {
        "role": "assistant", "content": "", "reasoning": "I could guess that", "unfinished": True
    }  # fmt: skip
    assert part_texts(found) == {0: "", REASONING: "<think>I could guess that<|im_end|>", CALL: ""}


@pytest.mark.parametrize("chat", [CHAT, OPENED], ids=["opened by the policy", "opened by the template"])
def test_reasoning_over_its_budget_is_closed_and_the_turn_goes_on(chat):
    opening = "" if chat is OPENED else "<think>"
    engine = Thinks(chat, opening + "the tool call is name " * 20)
    thought = engine.ids(engine.turns[0])[:40]
    found = play(engine, chat, thinking_tokens=40, turn_tokens=100)
    prompt, mark, then = chat.prompt([USER], TOOLS), chat.closing(), engine.ids("It rains.")
    assert chat.tokenizer.decode(mark) == "\n</think>\n\n"
    assert found.tokens == [*prompt, *thought, *mark, *then]
    own = [False] * len(prompt) + [True] * 40 + [False] * len(mark) + [True] * len(then)
    assert found.action_mask == own
    assert found.turn_ids == [0 if sampled else -1 for sampled in own]
    assert [i for i, stop in enumerate(found.stop_mask) if stop] == [len(found.tokens) - 1]
    assert found.parts == [0] * len(prompt) + [REASONING] * 40 + [0] * (len(mark) + len(then))
    marked = [token for token, right in zip(found.tokens, found.decisions, strict=True) if right]
    assert chat.tokenizer.decode(marked).strip() == "rains"
    assert (found.status, found.turns, found.closed_thoughts, found.turn_rewards) == ("done", 1, 1, [1.0])
    message = found.messages[-1]
    assert message["content"] == "It rains."
    assert "unfinished" not in message
    assert message["reasoning"] == chat.tokenizer.decode(thought).removeprefix("<think>").strip()
    first, second = engine.requests
    assert first.seed == (0, 0, 0, 0, 0)
    assert (first.max_tokens, second.max_tokens) == (40, 60)
    assert second.ids == [*prompt, *thought, *mark]
    assert second.seed[:5] == first.seed
    assert second.seed != first.seed


def test_a_turn_within_its_budget_is_the_turn_without_one():
    turn = "<think>I look.</think>" + "the answer is twelve " * 40
    plain, limited = Thinks(CHAT, turn), Thinks(CHAT, turn)
    first, second = play(plain), play(limited, thinking_tokens=30)
    a, b = first.state_dict(), second.state_dict()
    assert a == b
    assert second.closed_thoughts == 0
    assert len(plain.requests) == 1 < len(limited.requests)
    assert plain.requests[0].seed == limited.requests[0].seed
    assert len({request.seed for request in limited.requests}) == len(limited.requests)
    short = Thinks(CHAT, "<think>I look.</think>It rains.")
    assert play(short, thinking_tokens=100).tokens == play(Thinks(CHAT, *short.turns)).tokens
    assert len(short.requests) == 1


class Asks(Environment):
    """A user who asks twice; calls are answered in between."""

    def reset(self, task, seed=None):
        self.answers = 0
        return []

    def step(self, message):
        if message.get("tool_calls"):
            return Step([tool_result("weather_now", "rain")])
        self.answers += 1
        return Step([{"role": "user", "content": "And there?"}] if self.answers < 2 else [], done=self.answers == 2)


ASKED = [f"<think>I look.</think>{CALL_TEXT}", "<think>It is wet.</think>It rains.", "<think>Hm.</think>It snows."]


def test_earlier_reasoning_is_dropped_when_a_user_message_comes():
    chat = Chat(CHAT.tokenizer, ChatOptions("json_list", earlier_reasoning="drop"))
    engine = Thinks(chat, *ASKED)
    found = play(engine, chat, environment=Asks)
    first, second, third = (chat.tokenizer.decode(request.ids) for request in engine.requests)
    assert second.startswith(f"{first}<think>I look.</think>{CALL_TEXT}<|im_end|>"), "a result drops nothing"
    assert "<think>" not in third.removeprefix(first)
    assert third.startswith(f"{first}{CALL_TEXT}<|im_end|>"), "the calls remain"
    assert third.index("rain") < third.index("It rains.") < third.index("And there?")
    assert (found.status, found.turns, found.states[2:]) == ("done", 3, ["And there?"])
    assert part_texts(found, chat) == {REASONING: "<think>Hm.</think>", 0: "It snows.<|im_end|>", CALL: ""}
    assert set(found.turn_ids) == {-1, 2}
    assert [m.get("reasoning") for m in found.messages if m["role"] == "assistant"] == ["I look.", "It is wet.", "Hm."]
    assert found.tokens[: found.prompt_length] == chat.prompt(found.prompt, TOOLS) == engine.requests[2].ids
    assert found.opening_messages == 1
    assert Rollout.from_state_dict(found.state_dict(), found.task).prompt == found.prompt


def test_earlier_reasoning_is_kept_by_default_and_turns_without_any_stay_learned():
    kept = play(Thinks(CHAT, *ASKED), environment=Asks)
    assert set(kept.turn_ids) == {-1, 0, 1, 2}
    chat = Chat(CHAT.tokenizer, ChatOptions("json_list", earlier_reasoning="drop"))
    plain = play(Thinks(chat, CALL_TEXT, "It rains.", "It snows."), chat, environment=Asks)
    assert set(plain.turn_ids) == {-1, 0, 1, 2}


@pytest.mark.parametrize("engine", [CachedEngine, GenerateEngine])
def test_engines_sample_a_conversation_that_restarts_from_its_prompt(engine):
    model = source().model()
    made = engine()
    made.begin(model.eval(), Sampling(), set())
    turns = []
    for key, ids in ((0, [7, 8, 9, 10, 11, 12]), (0, [7, 9, 13]), (1, [7, 9, 13])):
        made.release(0)
        made.submit(TurnRequest(key, ids, 6, (1,)))
        turns.append(made.poll()[0].ids)
    assert turns[1] == turns[2] != turns[0]
    made.end()


def test_demonstrations_restart_like_rollouts():
    chat = Chat(CHAT.tokenizer, ChatOptions("json_list", earlier_reasoning="drop"))
    engine = Thinks(chat, *ASKED)
    found = play(engine, chat, environment=Asks)
    item = Demonstration(found.task, found.messages[1:])
    made = [encode(item, chat, TeacherOptions(), stretch=number) for number in range(3)]
    assert made[0] == made[2]
    texts = [chat.tokenizer.decode([t for t, own in zip(*pair, strict=True) if own]) for pair in made]
    assert texts[0].count("<think>") == 2
    assert "It rains." in texts[0]
    assert made[1][0][: found.prompt_length] == found.tokens[: found.prompt_length]
    assert texts[1].count("<think>") == 1
    assert "It snows." in texts[1]


def test_a_template_that_omits_earlier_calls_cannot_drop_reasoning():
    silent = CHATML.replace("{{ m.content }}", "{{ m.content if loop.index < 3 or loop.last else '' }}")
    chat = Chat(byte_tokenizer(silent), ChatOptions("json_list", earlier_reasoning="drop"))
    with pytest.raises(UserError, match=r"earlier_reasoning=drop: .* cannot render .*; set it to keep"):
        chat.check_tools()
    with pytest.raises(UserError, match=r"earlier_reasoning=drop needs .* model.chat.thinking=off does not"):
        Chat(CHAT.tokenizer, ChatOptions("json_list", earlier_reasoning="drop", thinking="off"))


def test_every_turn_has_a_budget_of_its_own():
    engine = Thinks(CHAT, f"<think>I look.</think>{CALL_TEXT}", "<think>" + "no " * 100)
    found = play(engine, thinking_tokens=50)
    assert (found.turns, found.closed_thoughts) == (2, 1)
    assert [m.get("content") for m in found.messages[1:]] == ["", "rain", "It rains."]
    assert found.messages[-1]["reasoning"].startswith("no no")
    assert sorted(set(found.turn_ids)) == [-1, 0, 1]


def test_reasoning_that_is_opened_again_is_closed_again():
    engine = Thinks(CHAT, "<think>" + "no " * 100, then="<think>" + "no " * 400)
    found = play(engine, thinking_tokens=50, tokens=400)
    assert found.closed_thoughts > 3
    assert found.status == "truncated"
    mark = CHAT.closing()
    gaps, last = [], found.prompt_length
    for i in range(found.prompt_length, len(found.tokens)):
        if found.tokens[i : i + len(mark)] == mark and not found.action_mask[i]:
            gaps.append(i - last)
            last = i + len(mark)
    assert gaps[0] == 50
    assert set(gaps[1:]) == {64}


@pytest.mark.parametrize(
    ("budgets", "closed"),
    [({"context": 100}, 1), ({"context": 70}, 0), ({"tokens": 45}, 1), ({"turn_tokens": 41}, 1)],
)
def test_other_limits_hold_in_a_turn_whose_reasoning_is_closed(budgets, closed):
    prompt = len(CHAT.prompt([USER]))
    if "context" in budgets:
        budgets = {"context": budgets["context"] - 30 + prompt}
    found = play(
        Thinks(CHAT, "<think>" + "no " * 100, then="the answer " * 90), tools=[], thinking_tokens=40, **budgets
    )
    assert found.status == "truncated"
    assert found.closed_thoughts == closed
    assert len(found.tokens) <= budgets.get("context", 4000)
    assert sum(found.action_mask) == {"tokens": 45, "turn_tokens": 41}.get(*budgets, sum(found.action_mask))
    assert found.action_mask[-1], "a turn does not end with a mark that the policy did not sample"
    assert found.messages[-1].get("unfinished", False) == (not closed)


def test_budgets_that_contradict_each_other_are_refused():
    for options in ({"turn_tokens": 40}, {"turn_tokens": 20}, {"tokens": 40}):
        with pytest.raises(UserError, match=r"budgets.thinking_tokens=40 must be less than the \d+ tokens of a turn"):
            Budgets(thinking_tokens=40, **options)
    with pytest.raises(UserError, match=r"budgets.thinking_tokens=0: must be above 0"):
        Budgets(thinking_tokens=0)


THINKING = [f for f in corpus() if "REFUSED" not in f.name]


@pytest.mark.parametrize("family", THINKING, ids=lambda f: f.name)
def test_closed_reasoning_is_read_with_every_template(family):
    try:
        chat = chat_of(family)
    except UserError:
        return
    if not (chat.thinking and chat.thinking.native):
        return
    context = chat.prompt([USER], ())
    begun = chat.encode(chat.turn.thought("I think of rain").partition(" rain")[0])
    _, inside = chat.open_thought(begun, (), context)
    assert inside
    rest = chat.write({"role": "assistant", "content": "It rains."})
    if chat.turn.thought(""):  # the template opened reasoning: what was written begins with its end
        rest = rest[len(chat.encode(chat.turn.thought(""))) :]
    read = chat.read([*begun, *chat.closing(), *rest], (), context)
    assert not read.unfinished
    assert read.message["content"] == "It rains."
    assert read.message["reasoning"] == "I think of"
    space = next(i for i, part in enumerate(read.parts) if part)
    assert not chat.tokenizer.decode(begun[:space]).strip()
    assert read.parts[space : len(begun)] == [REASONING] * (len(begun) - space)


# -- real models -------------------------------------------------------------------------------------------------------

WORDS = ChatOptions(thinking=["<act>", "e2"])  # the generation prompt opens reasoning


def sampled(engine: GenerationEngine, **budgets) -> list[Rollout]:
    torch.manual_seed(0)
    policy, chat = source().model(), Chat(source().tokenizer(), WORDS)
    limits = Budgets(**{"tokens": 40, "turn_tokens": 20, "context": 120, "turns": 2, **budgets})
    tasks = LookupChainTasks(2)
    jobs = [(tasks[i], (0, 0, i, r)) for i in range(3) for r in range(4)]
    found, _ = AgentLoop(chat, engine, Answers, limits, Sampling()).run(policy, jobs, policy_version=0)
    return found


def test_engines_agree_on_turns_whose_reasoning_is_closed():
    cached, slow = sampled(CachedEngine(), thinking_tokens=3), sampled(GenerateEngine(), thinking_tokens=3)
    assert sum(r.closed_thoughts for r in cached) > 0
    for ours, theirs in zip(cached, slow, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.parts == theirs.parts
        assert ours.sampler_logprobs == pytest.approx(theirs.sampler_logprobs, abs=1e-4)


def test_training_with_a_budget_of_reasoning(tmp_path):
    limits = Budgets(turns=3, tokens=40, turn_tokens=16, thinking_tokens=3, context=120)
    model = module(RLSD(where="answer"), chat=WORDS)
    trainer(tmp_path, generation(budgets=limits)).fit(model, datamodule=data())
    closed, weighed, kept = 0, 0, 0
    for record in read_records(tmp_path):
        t = record.tensors
        closed += sum(r["closed_thoughts"] for r in record.rollouts)
        thoughts = t["parts"] == REASONING
        assert torch.equal(t["token_advantages"][thoughts], t["base_advantages"][thoughts])
        assert torch.equal(t["action_mask"], t["turn_ids"] >= 0)
        kept += int(thoughts.sum())
        weighed += int((t["weights"][t["action_mask"] & ~thoughts] != 1).sum())
    assert min(closed, weighed, kept) > 0
    with (tmp_path / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    values = {name: [float(line[name]) for line in lines if line.get(name)] for name in lines[-1]}
    assert 0 < max(values["rollouts/closed_thoughts"]) <= 1
    assert 0 < max(values["train/reasoning_token_fraction"]) < 1
    assert max(values["train/sampler_gap_max"]) < 1e-3


def test_options_without_effect_are_refused_before_the_rollouts(tmp_path):
    off = ChatOptions(thinking="off")
    limits = Budgets(tokens=24, turn_tokens=8, thinking_tokens=3, context=96)
    for model, budgets, name in (
        (module(chat=off), limits, "generation.budgets.thinking_tokens does nothing"),
        (module(RLSD(where="answer"), chat=off), Budgets(), "model.credit.where=answer does nothing"),
        (module(GEAR(where="answer"), chat=off), limits, "thinking_tokens and model.credit.where=answer do nothing"),
    ):
        with pytest.raises(UserError, match=name):
            trainer(tmp_path, generation(budgets=budgets)).fit(model, datamodule=data())


class NoTools(LookupChainTasks):
    def __getitem__(self, index):
        return replace(super().__getitem__(index), tools=[])


def test_a_scope_of_calls_needs_tasks_with_tools(tmp_path):
    with pytest.raises(UserError, match=r"where=actions weighs only tool calls, and none of .* tasks .* has tools"):
        trainer(tmp_path, generation()).fit(module(RLSD(where="actions")), datamodule=data(train_tasks=NoTools(2)))
