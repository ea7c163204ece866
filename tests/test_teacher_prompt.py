"""The teacher sees the policy's question, the reference and the policy's response; the policy sees no reference."""

import csv
import tempfile
from pathlib import Path

import pytest
import torch
from chat_templates import CHATML, HERMES, byte_tokenizer
from every_rule import Sharp, Talk, TalkTasks, watched
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import data, generation, source

from gear_lightning.credit import Uniform
from gear_lightning.distillation import OPSD
from gear_lightning.environments.base import Step, Task
from gear_lightning.environments.lookup_chain import WORDS
from gear_lightning.errors import UserError
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.chat import Chat, ChatOptions
from gear_lightning.generation.engine import Sampling
from gear_lightning.module import GearModule
from gear_lightning.rollout import Rollout, RolloutGroup
from gear_lightning.teacher import TeacherOptions, privileged_prompt, privileged_text

TEMPLATE = " <ref> {reference}"
WITH_SECRET = [*WORDS, "secret"]
WITH_FEEDBACK = [*WORDS, "wrong", "assistant:", "user:"]
CHATS = {
    "chatml": Chat(byte_tokenizer(CHATML), ChatOptions("json_list")),
    "hermes": Chat(byte_tokenizer(HERMES)),
    "words": Chat(source().tokenizer()),
}


def talk(run: Path, model: GearModule, tasks: TalkTasks, environment=Talk, **options):
    generate = generation(environment=environment, budgets=Budgets(4, 80, 24, 250), sampling=Sampling(0.8))
    return watched(run, model, data(train_tasks=tasks, val_tasks=None, **options), generate, max_epochs=1)


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 999), st.integers(1, 4), st.integers(0, 12), st.integers(0, 2))
def test_teacher_ids_end_with_exactly_the_policys_response(seed, turns, hint, opening):
    environment = type("Opens", (Talk,), {"opening": opening})
    model = GearModule(Sharp(seed=seed % 3), teacher=TeacherOptions(template=TEMPLATE))
    tasks = TalkTasks(turns=turns, seed=seed, reference=" ".join(["e1"] * hint))
    with tempfile.TemporaryDirectory() as folder:
        seen = talk(Path(folder), model, tasks, environment, seed=seed, micro_batch_size=3).seen
    chat = model.chat_format
    for batch in (s.batch for s in seen):
        for i in range(batch.size):
            tokens = batch.tokens[i][batch.valid[i]].tolist()
            teacher = batch.teacher_tokens[i][batch.teacher_valid[i]].tolist()
            first = int(batch.action_mask[i].int().argmax())
            response = tokens[first:]
            assert teacher[-len(response) :] == response
            assert len(teacher) - len(tokens) == batch.teacher_offset[i] == hint + 1
            sampled = batch.action_mask[i].nonzero().squeeze(-1)
            there = sampled + batch.teacher_offset[i]
            assert torch.equal(batch.teacher_tokens[i, there], batch.tokens[i, sampled])
            # the ids before the response are the policy's prompt plus the hint, and nothing else
            added = chat.encode(" ".join(["<ref>"] + ["e1"] * hint))
            assert any(tokens[:n] + added + tokens[n:] == teacher for n in range(first + 1))


def test_without_a_reference_the_teacher_sees_the_policys_prompt(tmp_path):
    """Also if the environment adds its own opening messages."""
    environment = type("Opens", (Talk,), {"opening": 2})
    model = GearModule(Sharp(), teacher=TeacherOptions("live", template=TEMPLATE, max_prompt=1))
    for s in talk(tmp_path, model, TalkTasks(), environment).seen:
        assert torch.equal(s.batch.teacher_tokens, s.batch.tokens)
        assert torch.equal(s.batch.teacher_valid, s.batch.valid)
        assert not s.batch.teacher_offset.any()
        assert (s.outputs["credit"].divergence == 0).all()
        assert (s.outputs["credit"].weights == 1).all()


def test_the_reference_never_reaches_the_policy(tmp_path):
    policy = Sharp(f"{__name__}.WITH_SECRET", silent="secret")  # otherwise it could produce the word by chance
    model = GearModule(policy, teacher=TeacherOptions(template=TEMPLATE))
    secret = model.chat_format.encode("secret")
    assert len(secret) == 1
    assert secret != model.chat_format.encode("unheard")
    watch = talk(tmp_path, model, TalkTasks(reference="secret"))
    turns = 0
    for batch in (s.batch for s in watch.seen):
        assert (batch.teacher_tokens == secret[0]).sum(-1).tolist() == [1] * batch.size
        assert not (batch.tokens == secret[0]).any()
        turns = max(turns, int(batch.turn_ids.max()) + 1)
    assert turns > 1, "no rollout had a second turn"
    for group in model.trainer.datamodule.groups:
        for rollout in group.rollouts:
            assert "secret" not in str(rollout.messages)


def common_end(a: list[int], b: list[int]) -> list[int]:
    n = next((n for n, (x, y) in enumerate(zip(a[::-1], b[::-1], strict=False)) if x != y), min(len(a), len(b)))
    return a[len(a) - n :]


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("opening", [("user",), ("system", "user"), ("user", "assistant", "user"), ("system",)])
def test_both_prompts_end_in_the_same_generation_prefix(kind, opening):
    chat = CHATS[kind]
    messages = [{"role": role, "content": f"w{n} e{n}"} for n, role in enumerate(opening)]
    task = Task("t", messages, reference="e7 e8")
    told, dropped = privileged_prompt(task, messages, chat, TeacherOptions(template=TEMPLATE))
    plain = chat.prompt(messages)
    prefix = chat.encode(
        chat.template.render(messages, generate=True).removeprefix(chat.template.render(messages, generate=False))
    )
    assert prefix
    assert not dropped
    assert common_end(told, plain)[-len(prefix) :] == prefix
    text = chat.tokenizer.decode(told)
    assert " <ref> e7 e8" in text
    asked = [m["content"] for m in messages]
    assert [text.count(content) for content in asked] == [1] * len(asked)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(0, 60), st.integers(1, 200), st.sampled_from(sorted(CHATS)))
def test_a_too_long_prompt_drops_the_reference_and_never_the_question(question, reference, longest, kind):
    chat = CHATS[kind]
    messages = [{"role": "user", "content": " ".join(f"w{i}" for i in range(question))}]
    task = Task("t9", messages, reference=" ".join(["e5"] * reference))
    plain = chat.prompt(messages)
    full, _ = privileged_prompt(task, messages, chat, TeacherOptions(template=TEMPLATE, max_prompt=10**6))
    ids, dropped = privileged_prompt(task, messages, chat, TeacherOptions(template=TEMPLATE, max_prompt=longest))
    assert dropped == (len(full) > longest)
    assert ids == (plain if dropped else full)
    assert messages[0]["content"] in chat.tokenizer.decode(ids)
    strict = TeacherOptions(template=TEMPLATE, max_prompt=longest, overlong="error")
    if dropped:
        with pytest.raises(UserError, match=rf"task t9.*{len(full)} tokens.*max_prompt={longest}"):
            privileged_prompt(task, messages, chat, strict)
    else:
        assert privileged_prompt(task, messages, chat, strict) == (full, False)


def overlong(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["teacher/overlong"]) for row in csv.DictReader(file)]


def test_dropped_references_are_counted(tmp_path):
    tasks, hint = TalkTasks(longest=30), len(["<task>", "<end>", "<act>", "<ref>", "e1", "e2", "e3"])
    limit = 20
    model = GearModule(Sharp(), teacher=TeacherOptions(template=TEMPLATE, max_prompt=limit))
    seen = talk(tmp_path, model, tasks, tasks_per_iteration=6).seen
    long = [i for i in range(6) if len(tasks[i].messages[0]["content"].split()) + hint > limit]
    assert 0 < len(long) < 6
    rows = [(int(g), int(n)) for s in seen for g, n in zip(s.batch.group_ids, s.batch.teacher_offset, strict=True)]
    for group, offset in rows:
        assert offset == (0 if group in long else 4)
    assert overlong(tmp_path) == [sum(group in long for group, _ in rows)]


def test_too_long_prompts_stop_the_run_with_overlong_error(tmp_path):
    options = TeacherOptions(template=TEMPLATE, max_prompt=5, overlong="error")
    with pytest.raises(UserError, match=r"task talk-0: its privileged prompt has .* tokens, max_prompt=5"):
        talk(tmp_path, GearModule(Sharp(), teacher=options), TalkTasks())


# -- privileged text --------------------------------------------------------------------------------------------------

SAID = [
    {"role": "assistant", "content": "I look", "tool_calls": [{"function": {"name": "look", "arguments": '{"a": 1}'}}]},
    {"role": "tool", "content": "e4"},
    {"role": "assistant", "content": "e4"},
]
PEER = 'assistant: I look look({"a": 1})\ntool: e4\nassistant: e4'


@pytest.mark.parametrize(
    ("shows", "given", "expected"),
    [
        ("reference", {"peer": SAID, "feedback": "no"}, "<e1 e2>"),
        ("answer", {"peer": SAID, "feedback": "no"}, "<42>"),
        ("peer", {"peer": SAID, "feedback": "no"}, f"<{PEER}>"),
        ("peer", {"feedback": "no"}, "<e1 e2>"),
        ("feedback", {"peer": SAID, "feedback": "no: e3"}, "[no: e3]"),
        ("feedback", {"peer": SAID}, None),
        ("feedback", {"feedback": " \n"}, None),
        ("peer_or_feedback", {"peer": SAID, "feedback": "no"}, f"<{PEER}>"),
        ("peer_or_feedback", {"feedback": "no {reference}"}, "[no {reference}]"),
        ("peer_or_feedback", {}, None),
    ],
)
def test_the_privileged_text_of_each_teacher(shows, given, expected):
    known = {"feedback_template": "[{feedback}]"} if "feedback" in shows else {}
    options = TeacherOptions(shows=shows, template="<{reference}>", **known)
    task = Task("t", [{"role": "user", "content": "q"}], reference="e1 e2", meta={"answer": 42})
    assert privileged_text(task, options, **given) == expected
    plain = CHATS["chatml"].prompt(task.messages)
    ids, dropped = privileged_prompt(task, task.messages, CHATS["chatml"], options, **given)
    assert not dropped
    assert (ids == plain) == (expected is None)
    assert expected is None or f"q{expected}" in CHATS["chatml"].tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shows": "feedback", "feedback_template": "no place"}, r"teacher\.feedback_template must contain {feedback}"),
        ({"feedback_template": "so: {feedback}"}, r"feedback_template does nothing with teacher\.shows=reference"),
    ],
)
def test_invalid_feedback_templates_are_rejected(options, message):
    with pytest.raises(UserError, match=message):
        TeacherOptions(**options)


class Critic(Talk):
    """Gives feedback on some rollouts at their end; some of them are right."""

    def step(self, message: dict) -> Step:
        step = super().step(message)
        if step.done:
            step.info["success"] = self.rng.random() < 0.1
            if self.rng.random() < 0.5:
                step.info["feedback"] = f"wrong {len(message['content'].split())}"
        return step


@pytest.mark.parametrize("shows", ["feedback", "peer_or_feedback"])
def test_the_teacher_sees_feedback_on_the_same_rollout_and_needs_no_reference(tmp_path, shows):
    class Bare(TalkTasks):
        def __getitem__(self, index):
            task = super().__getitem__(index)
            return Task(task.id, task.messages, meta=task.meta)

    teacher = TeacherOptions(
        "frozen", shows=shows, template=" <ref> {reference}", feedback_template=" <ref> {feedback}"
    )
    words = f"{__name__}.WITH_FEEDBACK"
    model = GearModule(Sharp(words), Uniform(), objective=None, distillation=OPSD(), teacher=teacher)
    watch = talk(tmp_path, model, Bare(), Critic, tasks_per_iteration=6)
    chat, groups = model.chat_format, model.trainer.datamodule.groups
    rows: dict[tuple[int, str], bool] = {}
    for batch in (s.batch for s in watch.seen):
        for i, place in enumerate(batch.index.tolist()):
            group: RolloutGroup = groups[place // 4]
            rollout: Rollout = group.rollouts[place % 4]
            peer = group.peer(place % 4) if shows == "peer_or_feedback" else None
            text = None if rollout.feedback is None else f" <ref> {rollout.feedback}"
            if peer is not None:
                text = " <ref> " + privileged_text(
                    rollout.task, TeacherOptions(shows="peer", template="{reference}"), peer.messages[1:]
                )
            opening = rollout.messages[:1]
            told = [{**opening[0], "content": opening[0]["content"] + (text or "")}]
            expected = chat.prompt(told) + rollout.tokens[rollout.prompt_length :]
            assert batch.teacher_tokens[i][batch.teacher_valid[i]].tolist() == expected
            assert batch.privileged[i] == (text is not None)
            rows[place, "peer" if peer else "feedback" if text else "nothing"] = True
    kinds = {kind for _, kind in rows}
    assert kinds == {"feedback", "nothing"} | ({"peer"} if shows == "peer_or_feedback" else set())
