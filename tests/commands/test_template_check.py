"""``gear-lightning template`` shows which spans are trained on, and proves or refuses tool calls."""

import re
from pathlib import Path

import pytest
from chat_templates import CHATML, HERMES, NO_TOOL_ROLE, byte_tokenizer
from template_corpus import FAMILIES, chat_of, tokenizer_of
from tiny_runs import source

from gear_lightning.commands.template import spans, template_command
from gear_lightning.errors import UserError
from gear_lightning.generation.chat import Chat, ChatOptions

SYNTAX = {CHATML: "json_list", HERMES: "auto"}


@pytest.fixture
def published(tmp_path):
    """Return a function that saves a tokenizer like a published model."""

    def save(tokenizer):
        tokenizer.save_pretrained(tmp_path)
        source().model().config.save_pretrained(tmp_path)
        return str(tmp_path)

    return save


@pytest.mark.parametrize("template", [CHATML, HERMES])
def test_only_tokens_of_the_policy_are_trained_on_including_the_stop_token(template, published, capsys):
    assert template_command([published(byte_tokenizer(template)), "--tool_syntax", SYNTAX[template]]) == 0
    shown = capsys.readouterr().out
    parts = re.findall(r"^-- (.*?), \d+ tokens\n(.*?)(?=^-- |\Z)", shown, re.DOTALL | re.MULTILINE)
    trained = [text.strip() for kind, text in parts if "trained on" in kind]
    assert [kind for kind, _ in parts] == [
        "prompt",
        "answer: trained on",
        "tool call: trained on",
        "observation",
        "answer: trained on",
    ]
    for text in trained:
        assert "<|im_start|>" not in text, "the header of the turn comes from the template, not from the policy"
        assert "<think>" not in text, "the template wrote into the policy's turn"
    assert '"calculator"' in trained[1]
    assert trained[1].endswith("<|im_end|>"), "the policy must learn to stop"
    assert trained[2] == "It is 36.<|im_end|>"
    assert "36<|im_end|>" in shown or "36\n</tool_response>" in shown
    assert "passed: text with the syntax's own marks" in shown
    assert "failed" not in shown


@pytest.mark.parametrize("template", [CHATML, HERMES])
def test_the_concatenated_spans_are_the_conversation_that_is_trained_on(template):
    chat = Chat(byte_tokenizer(template), ChatOptions(SYNTAX[template]))
    whole = chat.tokenizer.decode([i for _, ids in spans(chat) for i in ids])
    assert whole.count("<|im_start|>assistant\n") == 2
    assert whole.count("<|im_end|>") == whole.count("<|im_start|>"), "a message was not closed or closed twice"


@pytest.mark.parametrize("template", [CHATML, NO_TOOL_ROLE])
def test_tools_that_cannot_be_used_give_status_1_and_what_to_set(template, published, capsys):
    assert template_command([published(byte_tokenizer(template))]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "set model.chat.tool_syntax to json_list" in shown
    assert "failed: tools are listed" in shown
    assert "answer: trained on" in shown, "chat without tools works"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        *[(name, text) for name in ("config.json", "tokenizer_config.json") for text in ("[1]", "null", "5", "{", "")],
        *[(name, "[1]") for name in ("special_tokens_map.json", "added_tokens.json", "tokenizer.json")],
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": 5}'),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("tokenizer_config.json", '{"model_max_length": "x"}'),
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}'),
        ("generation_config.json", "[1]"),
        ("model.safetensors.index.json", "5"),
    ],
)
def test_a_damaged_file_of_a_model_directory_is_one_line(file, text, published):
    folder = Path(published(byte_tokenizer(CHATML)))
    if file == "tokenizer_config.json":
        (folder / "chat_template.jinja").unlink()
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=re.escape(str(folder))) as raised:
        template_command([str(folder)])
    assert "\n" not in str(raised.value)
    if not text.startswith("{"):
        assert file in str(raised.value)


def test_calls_that_are_not_read_back_are_shown_without_a_result(published, capsys):
    assert template_command([published(source().tokenizer())]) in (0, 1)
    assert "answer: trained on" in capsys.readouterr().out


def test_a_template_that_cannot_be_continued_is_refused(published):
    folder = published(byte_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}"))
    with pytest.raises(UserError, match="could not end its turn"):
        template_command([folder])


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (
            "Qwen3.5",
            ("TaggedCalls (learned from the template)", "<function=<function>>", "between <think> and </think>"),
        ),
        ("Granite 3", ("JsonCalls (known; the template does not render calls)", "stops at: <|end_of_text|>")),
        ("LFM2.5", ("PythonCalls (learned", "does not escape all arguments")),
        ("GPT-OSS", ("HarmonyCalls", "<|return|>", "<|call|>")),
    ],
)
def test_the_command_says_what_serves_a_model(name, facts, published, capsys):
    assert template_command([published(tokenizer_of(FAMILIES[name]))]) == 0
    shown = capsys.readouterr().out
    for fact in facts:
        assert fact in shown, shown


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sample_conversation_of_every_family_has_a_call(name):
    chat = chat_of(FAMILIES[name])
    try:
        chat.check_tools()
    except UserError:
        assert [kind for kind, _ in spans(chat, tools=False)][:1] == ["prompt"]
        return
    assert "call" in [kind for kind, _ in spans(chat)]


def test_a_sample_conversation_that_cannot_be_rendered_is_reported(published, capsys):
    check = "{% if '12' in m.content %}{{ raise_exception('no numbers') }}{% endif %}"
    limited = CHATML.replace("<|im_start|>{{", check + "<|im_start|>{{")
    assert template_command([published(byte_tokenizer(limited)), "--tool_syntax", "json_list"]) == 1
    assert "the sample conversation cannot be rendered" in capsys.readouterr().out
