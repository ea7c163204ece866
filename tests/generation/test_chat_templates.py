"""Published chat templates: everything that a conversation needs works, or is refused at the start."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from scripted_policy import Scripted
from template_corpus import (
    COLUMNS,
    FAMILIES,
    NESTED,
    ONE,
    TOOLS,
    USER,
    called,
    chat_of,
    differences,
    read_back,
    row,
    table,
)

from gear_lightning.batch import CALL, REASONING
from gear_lightning.environments.base import Task
from gear_lightning.environments.tools import ToolEnvironment
from gear_lightning.generation.agent_loop import AgentLoop
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.chat import ToolCallError
from gear_lightning.generation.engine import SampledTurn, Sampling
from gear_lightning.generation.tool_syntax import GemmaCalls, HarmonyCalls, JsonCalls

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "chat_templates.md"
ROWS = {name: row(family) for name, family in FAMILIES.items()}
# Families whose own syntax must be read.
NATIVE = [
    "DeepSeek R1 distilled", "DeepSeek V3", "DeepSeek V3.1", "DeepSeek V3.2, V4", "Gemma 4", "Gemma 4 (5)", "GLM 4.5",
    "GLM 4.7, GLM 5", "GPT-OSS", "Granite 3", "Granite 4", "Hermes 2 and 3", "Kimi K2", "LFM2", "LFM2.5",
    "Llama 3.1, 3.3", "Llama 3.2", "Llama 4 (JSON)", "Llama 4, 3.2 (Python)", "MiniMax M2", "Ministral 3, Devstral",
    "Mistral 7B v0.3, Nemo", "Mistral Small 3.2", "Nemotron 3 Nano", "Nemotron 3 Super", "Nemotron 3 Ultra",
    "Phi-4-mini", "Qwen2.5", "Qwen3", "Qwen3-2507", "Qwen3.5", "Qwen3.6", "Qwen3.8", "Seed-OSS", "SmolLM3",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_fails_in_silence(name):
    cells = ROWS[name]
    assert not [column for column in COLUMNS if cells[column] == "WRONG"], cells
    if "refused" in cells.values():
        assert "Set model.chat.tool_syntax to json_list" in cells["reason"]


@pytest.mark.parametrize("name", NATIVE)
def test_the_model_s_own_calls_are_read(name):
    assert {ROWS[name][column] for column in COLUMNS} <= {"yes", "-"}
    assert "tool_syntax" not in ROWS[name]["syntax"]


TURNS = {
    "call": called(ONE),
    "nested arguments": called(NESTED),
    "text": called(ONE, content="I look."),
    "thought": called(ONE, reasoning="Let me look."),
    "thought and text": called(ONE, content="I look.", reasoning="Let me look."),
    "two calls": called(ONE, {"city": "Bern"}),
}
# Templates that render a conversation in another way once it continues: (family, text that only they render there).
REWRITTEN = [
    ("GPT-OSS", "<|end|><|start|>user"),  # the answer ends with another token than the one that the model samples
    ("GPT-OSS", "<|channel|>analysis<|message|>I look."),  # text before a call becomes reasoning
    ("Gemma diffusion", "<|turn>model\nIt rains."),  # the generation prompt has no such header behind a result
    ("Mistral 7B v0.3, Nemo", "</s>[AVAILABLE_TOOLS]"),  # the tools are listed at the last user message
    ("Mistral Small 3.2", "</s>[AVAILABLE_TOOLS]"),
    ("Ministral 3, Devstral", "</s>[AVAILABLE_TOOLS]"),
    ("LFM2.5", "a \\ and\na line"),  # text is rendered without escapes
    ("LFM2.5 (2)", "a \\ and\na line"),
]


@cache
def compared(name):
    """Compare each turn of a family with what its template renders. Return turn -> (the parts that were compared, the
    differences that `REWRITTEN` does not explain)."""
    if "refused" in ROWS[name].values():
        return {}
    chat, found = chat_of(FAMILIES[name]), {}
    if not chat.tools.native or chat.tools.describes:
        return {}
    chat.check_tools()
    for turn, message in TURNS.items():
        thinks = chat.thinking and chat.thinking.native
        several = turn != "two calls" or ROWS[name]["two calls"] == "yes"
        if ("thought" in turn and not thinks) or not several or (name, turn) == ("GPT-OSS", "thought and text"):
            continue
        parts, pairs = differences(chat, message)
        left = [pair for pair in pairs if not any(name == n and text in pair[0] for n, text in REWRITTEN)]
        found[turn] = parts, left
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_policy_writes_and_reads_is_what_the_template_renders(name):
    assert not {turn: left for turn, (_, left) in compared(name).items() if left}


def test_most_turns_are_compared_with_the_template():
    calls = {name for name in FAMILIES if any("call" in parts for parts, _ in compared(name).values())}
    assert len(calls) >= 30
    assert {"Command R7B", "Gemma 4", "GLM 4.5", "Qwen3.5", "Llama 3.1, 3.3"} <= {
        n for n in calls if "call" in compared(n)
    }
    for name in ("Gemma 4", "Nemotron 3 Ultra", "Nemotron 3.5", "Qwen3", "GLM 4.7, GLM 5", "MiniMax M2"):
        assert "call" in compared(name)["thought"][0], name


def test_most_families_with_tools_need_no_override():
    with_tools = [name for name, family in FAMILIES.items() if "tool_syntax" not in family.options]
    native = [name for name in with_tools if "refused" not in ROWS[name].values()]
    assert len(native) >= 0.8 * len(with_tools)


def test_the_documented_table_is_true():
    """Update it with the output of ``python tests/support/template_corpus.py``."""
    shown = PAGE.read_text()
    assert table(ROWS) in shown


REASONED = {"role": "assistant", "content": "It rains.", "reasoning": "Let me think."}


@cache
def restarted(name):
    """Return what a conversation that restarts reads, and what the template renders for it; None if it is refused."""
    if "refused" in ROWS[name].values():
        return None
    chat, messages = chat_of(FAMILIES[name], earlier_reasoning="drop"), [USER, REASONED, USER]
    rendered = chat.template.render(messages, generate=True) + chat.turn.header
    drops = bool(chat.thinking and chat.thinking.native) and "Let me think" not in rendered
    ids = chat.prompt(messages)
    return chat.tokenizer.decode(ids), drops, ids == chat.template.encode(rendered)


@pytest.mark.parametrize("name", FAMILIES)
def test_conversations_restart_as_the_template_drops_reasoning(name):
    """Where the template drops earlier reasoning at a user message, ``drop`` gives exactly what it renders."""
    if (found := restarted(name)) is None:
        return
    text, drops, same = found
    assert "Let me think" not in text
    assert text.count("How is the weather?") == 2
    assert "It rains." in text
    assert same or not drops


def test_some_templates_drop_earlier_reasoning():
    for name in ("Qwen3", "GLM 4.5", "Nemotron 3 Nano"):
        assert restarted(name)[1:] == (True, True), name


@pytest.mark.parametrize("name", NATIVE)
def test_arguments_may_contain_the_syntax_s_own_marks(name):
    chat = chat_of(FAMILIES[name])
    chat.check_tools()
    example = chat.syntax.write([{"name": "weather_now", "arguments": {"city": "Bern"}}])
    opening, closing = example.partition("weather_now")[0], example.rpartition("Bern")[2]
    for text in (f"before {opening}x{closing} after", closing, opening):
        assert read_back(chat, called({"city": text, "days": 1})) or not chat.syntax.any_text, text


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_a_call_that_was_cut_is_no_call_or_an_error(name, cut):
    """A budget may end a turn anywhere; the half of a call must not be carried out with other arguments."""
    chat = chat_of(FAMILIES[name])
    ids = chat.write(called({"city": "Bern", "days": 12345}))
    part = ids[: int(cut * len(ids))]
    try:
        found = chat.read(part, TOOLS, chat.prompt([USER], TOOLS)).message.get("tool_calls") or []
    except ToolCallError:
        return
    assert all(c["function"]["arguments"].get("days") in (None, 12345) for c in found)


def test_a_thought_that_drafts_a_call_is_not_carried_out():
    for name, cells in ROWS.items():
        if cells["thinking"] != "yes" or "refused" in cells.values():
            continue
        chat = chat_of(FAMILIES[name])
        draft = chat.syntax.write([{"name": "weather_now", "arguments": {"city": "Bern"}}])
        context = chat.prompt([USER], TOOLS)
        marks = chat.turn.thought("x").partition("x")
        ids = chat.encode(f"{marks[0]}Maybe {draft}\nor not.{marks[2]}{chat.turn.before}No.")
        found = chat.read(ids, TOOLS, context)
        assert found.message["content"] == "No.", name
        assert "tool_calls" not in found.message, name
        assert "Maybe" in found.message["reasoning"], name
        assert found.parts.count(REASONING) > len(ids) // 2, name
        assert CALL not in found.parts, name


def test_gpt_oss_may_name_the_recipient_before_or_behind_the_channel():
    chat = chat_of(FAMILIES["GPT-OSS"])
    assert isinstance(chat.syntax, HarmonyCalls)
    call = 'to=functions.weather_now{}<|message|>{{"city": "Bern"}}'
    for text in (
        " " + call.format("<|channel|>commentary json"),
        "<|channel|>commentary " + call.format(" <|constrain|>json"),
        "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant<|channel|>commentary " + call.format(""),
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant " + call.format("<|channel|>commentary json"),
    ):
        message = chat.parse(chat.encode(text), TOOLS)
        assert message["tool_calls"][0]["function"] == {"name": "weather_now", "arguments": {"city": "Bern"}}
        assert message["content"] + message.get("reasoning", "") in ("", "I look.")


def test_gemma_s_notation_is_read():
    text = '<|tool_call>call:f{a:<|"|>x, {y}<|"|>,b:{c:[1,true,null,<|"|>z<|"|>]},d:-2.5}<tool_call|>'
    calls, end = GemmaCalls().read(text, 0, ())
    wanted = {"a": "x, {y}", "b": {"c": [1, True, None, "z"]}, "d": -2.5}
    assert (calls[0]["function"], end) == ({"name": "f", "arguments": wanted}, len(text))
    for broken in (
        text[:-15],
        '<|tool_call>call:f{a:<|"|>x',
        "<|tool_call>call:f{a}<tool_call|>",
        "<|tool_call>call:{}",
    ):
        with pytest.raises(ToolCallError):
            GemmaCalls().read(broken, 0, ())


GEMMA = [name for name in FAMILIES if name.startswith("Gemma 4")]
QUOTE = '<|"|>'


@pytest.mark.parametrize("name", GEMMA)
def test_gemma_s_marks_in_an_argument_are_no_tokens(name):
    """A string that spells the marks consists of ordinary tokens, so no text can end it."""
    chat = chat_of(FAMILIES[name])
    opening, closing = f"<|tool_call>call:weather_now{{city:{QUOTE}", f"{QUOTE}}}<tool_call|>"
    for text in (f"a{closing}{opening}b", (opening + "q" + closing) * 2, QUOTE, closing, f"{QUOTE},days:7,x:{QUOTE}"):
        for message in (called({"city": text, "days": 1}), called({"options": {"x": [text]}}, {"city": text})):
            assert read_back(chat, message), text


@pytest.mark.parametrize("name", ["Llama 3.1, 3.3", "Llama 3.2", "Llama 4 (JSON)", "Llama 4, 3.2 (Python)"])
def test_a_call_without_marks_is_carried_out_behind_text(name):
    chat = chat_of(FAMILIES[name])
    assert read_back(chat, called({"city": "Bern"}, content="I look."))
    call = chat.syntax.write([{"name": "weather_now", "arguments": {"city": "Bern"}}])
    context = chat.prompt([USER], TOOLS)
    for text in ("<|python_tag|>" + call, "Let me see.\n\n" + call):
        found = chat.read(chat.encode(text), TOOLS, context)
        assert found.message["tool_calls"][0]["function"]["arguments"] == {"city": "Bern"}
        assert CALL in found.parts


@pytest.mark.parametrize("name", NATIVE)
def test_an_optional_text_may_be_null(name):
    chat = chat_of(FAMILIES[name])
    note = {"anyOf": [{"type": "string"}, {"type": "null"}], "description": "A note."}
    function = {
        "name": "weather_now",
        "description": "d",
        "parameters": {"type": "object", "properties": {"note": note}},
    }
    tools = [{"type": "function", "function": function}]
    for value in (None, "nothing", "0"):
        assert read_back(chat, called({"note": value}), tools), value


def test_stop_tokens_are_those_of_the_template_and_of_the_generation_config():
    def stops(name):
        chat = chat_of(FAMILIES[name])
        return set(chat.tokenizer.convert_ids_to_tokens(list(chat.stop_ids)))

    assert stops("Llama 3.1, 3.3") == {"<|eot_id|>", "<|eom_id|>"}
    assert stops("GPT-OSS") == {"<|return|>", "<|call|>"}
    assert stops("GLM 4.7, GLM 5") == {"<|endoftext|>", "<|user|>", "<|observation|>"}
    assert stops("Gemma 4") == {"<eos>", "<turn|>", "<|tool_response>"}
    assert stops("Mistral Small 3.2") == {"</s>"}


@pytest.mark.parametrize("name", ["GLM 4.7, GLM 5", "Gemma 4"])
def test_a_stop_token_that_opens_the_results_is_not_repeated(name):
    chat = chat_of(FAMILIES[name])
    turn = chat.write(called({"city": "Bern"}))
    result = {"role": "tool", "name": "weather_now", "tool_call_id": "call00000", "content": "rain"}
    own, other = chat.continuation([result], turn[-1]), chat.continuation([result], chat.tokenizer.eos_token_id)
    assert other == [turn[-1], *own]


def test_the_id_of_a_call_reaches_its_result():
    chat = chat_of(FAMILIES["Kimi K2"])
    turn = chat.write(called({"city": "Bern"}, {"city": "Basel"}))
    calls = chat.read(turn, TOOLS).message["tool_calls"]
    assert [call["id"] for call in calls] == ["functions.weather_now:0", "functions.weather_now:1"]
    results = [{"role": "tool", "name": "weather_now", "tool_call_id": c["id"], "content": "x"} for c in calls]
    text = chat.tokenizer.decode(chat.continuation(results, turn[-1]))
    assert re.findall(r"Return of (\S+)", text) == [call["id"] for call in calls]


def test_a_user_may_bring_a_syntax():
    from gear_lightning.errors import UserError

    chat = chat_of(FAMILIES["Qwen2.5"], tool_syntax=JsonCalls("<call>", "</call>"))
    with pytest.raises(UserError, match="not read back"):
        chat.check_tools()  # the template renders other marks
    own = chat_of(FAMILIES["Gemma 3"], tool_syntax=JsonCalls("<call>", "</call>"), list_tools="system")
    own.check_tools()
    prompt = own.tokenizer.decode(own.prompt([USER], TOOLS))
    assert '<call>{"name": "<function>", "arguments": {"<argument>": "<value>"}}</call>' in prompt
    assert read_back(own, called({"city": "Bern"}))


class _Says(Scripted):
    """Returns the ids that a chat format writes for scripted messages."""

    def __init__(self, chat, *messages):
        super().__init__(*messages)
        self.chat = chat

    def say(self, request):
        ids = self.chat.write(self.turns[request.seed[-1]])
        return SampledTurn(request.key, ids, [-0.5] * len(ids), True)


class _Weather(ToolEnvironment):
    """Answers with the weather; the reward is 1 if the final answer names it."""

    def call(self, name, arguments):
        return f"rain in {arguments['city']}"


@pytest.mark.parametrize("name", NATIVE)
def test_a_rollout_in_the_model_s_own_syntax(name):
    chat = chat_of(FAMILIES[name])
    several = ROWS[name]["two calls"] == "yes"
    first = called({"city": "Bern"}, {"city": "Basel"}) if several else called({"city": "Bern"})
    answer = {"role": "assistant", "content": "It rains."}
    if ROWS[name]["thinking"] == "yes":
        first["reasoning"], answer["reasoning"] = "Maybe it is dry.", "Not dry."
    task = Task("t", [USER], TOOLS, meta={"answer": "dry"})
    loop = AgentLoop(chat, _Says(chat, first, answer), lambda: _Weather("contains"), Budgets(tokens=4000), Sampling())
    (rollout,), _ = loop.run(torch.nn.Linear(1, 1), [(task, (0,))], policy_version=0)
    assert (rollout.status, rollout.error) == ("done", None)
    assert rollout.reward == 0, "reasoning was scored"
    made, *results, said = rollout.messages[1:]
    assert [c["function"]["arguments"]["city"] for c in made["tool_calls"]] == ["Bern", "Basel"][: 1 + several]
    assert [m["content"] for m in results] == ["rain in Bern", "rain in Basel"][: 1 + several]
    assert said["content"] == "It rains."
    assert said.get("reasoning") == answer.get("reasoning")
    sampled = [i for i, mine in zip(rollout.tokens, rollout.action_mask, strict=True) if mine]
    assert sampled == chat.write(first) + chat.write(answer), "sampled ids are final"
