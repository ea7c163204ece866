"""Chat templates are applied incrementally, tool calls are parsed, and unsupported templates are rejected early."""

import contextlib
import json

import pytest
from chat_templates import CHATML, HERMES, NO_END_MARK, NO_GENERATION_PROMPT, NO_TOOL_ROLE, byte_tokenizer, ending
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import source

from gear_lightning.environments.base import tool_call, tool_result
from gear_lightning.environments.lookup_chain import TOOLS
from gear_lightning.errors import UserError
from gear_lightning.generation.chat import Chat, ChatOptions, ToolCallError
from gear_lightning.generation.tool_syntax import WordCalls
from gear_lightning.generation.tool_syntax.known import json_calls
from gear_lightning.generation.turn_text import read_turn

ONE = [{"function": {"name": "f", "parameters": {}}}]


def parse_tool_calls(text):
    found = read_turn(text, json_calls(), ONE)
    return found.content, found.calls


USER = {"role": "user", "content": "What is 5 + 7?"}


@pytest.mark.parametrize("template", [CHATML, HERMES])
def test_each_turn_extends_the_previous_ids(template):
    chat = Chat(byte_tokenizer(template), ChatOptions("json_list" if template is CHATML else "auto"))
    ids = chat.prompt([USER], TOOLS)
    assert chat.tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    ids += chat.write(tool_call("look", {"relation": "r1", "entity": "e1"}, "Let me see."))
    assert chat.tokenizer.decode(ids).endswith("<|im_end|>")
    ids += chat.continuation([tool_result("look", "e9")])
    text = chat.tokenizer.decode(ids)
    result = "<|im_start|>tool\ne9" if template is CHATML else "<|im_start|>user\n<tool_response>\ne9\n</tool_response>"
    assert text.endswith(f"<|im_end|>\n{result}<|im_end|>\n<|im_start|>assistant\n")
    assert "<think>" not in text, "an earlier turn was rendered again"


def test_words_syntax_of_the_from_scratch_model():
    chat = Chat(source().tokenizer())
    assert isinstance(chat.syntax, WordCalls)
    ids = chat.prompt([{"role": "user", "content": "e5 w3"}], TOOLS)
    ids += chat.write(tool_call("look", {"relation": "r1", "entity": "e5"}))
    ids += chat.continuation([tool_result("look", "e9")])
    assert chat.tokenizer.convert_ids_to_tokens(ids) == (
        ["<task>", "e5", "w3", "<end>", "<act>", "look", "r1", "e5", "<end>", "<tool>", "e9", "<end>", "<act>"]
    )
    message = chat.parse(chat.write(tool_call("look", {"relation": "r1", "entity": "e5"})), TOOLS)
    assert message["tool_calls"][0]["function"] == {"name": "look", "arguments": {"relation": "r1", "entity": "e5"}}
    with pytest.raises(ToolCallError, match="look takes 2 arguments"):
        chat.parse(chat.encode("look r1"), TOOLS)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("12", "12", []),
        ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', "", [("f", {"x": 1})]),
        ('So: <tool_call>[{"name": "f", "arguments": {"x": "a"}}]</tool_call>', "So:", [("f", {"x": "a"})]),
        ('<tool_call>[{"name": "f"}, {"name": "g", "arguments": {}}]</tool_call>', "", [("f", {}), ("g", {})]),
        ('<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"name": "g", "arguments": {}}</tool_call>',
         "", [("f", {}), ("g", {})]),
        ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}', "", [("f", {"x": 1})]),
    ],
)  # fmt: skip
def test_tool_calls_are_parsed(text, content, calls):
    found_content, found = parse_tool_calls(text)
    assert found_content == content
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in found] == calls


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>nonsense</tool_call>",
        '<tool_call>{"name": 3}</tool_call>',
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        "<tool_call>" + "[" * 100_000,
        '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": ' + "9" * 10_000 + "}}</tool_call>",
    ],
)
def test_invalid_tool_calls_raise_a_tool_call_error(text):
    with pytest.raises(ToolCallError):
        parse_tool_calls(text)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from(list('<>/tool_call{}[]":,name arguments0\\u\n'))))
def test_no_text_breaks_the_parser(text):
    for attempt in (text, f"<tool_call>{text}</tool_call>", f'<tool_call>{{"name": "f", "arguments": {text}}}'):
        with contextlib.suppress(ToolCallError):
            json.dumps(parse_tool_calls(attempt), allow_nan=False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no end token|no special token"),
        ("{{ bos_token }}<|im_start|>assistant\n", "does not render the text of assistant messages"),
    ],
)
def test_unsupported_templates_are_rejected_at_the_start(template, message):
    with pytest.raises(UserError, match=message):
        Chat(byte_tokenizer(template))


def test_the_header_of_a_turn_is_added_where_the_template_ignores_the_generation_prompt():
    chat = Chat(byte_tokenizer(NO_GENERATION_PROMPT))
    assert chat.tokenizer.decode(chat.prompt([USER])).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert chat.tokenizer.decode(chat.continuation([USER])).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_turn_without_an_end_token_ends_at_the_first_token_of_the_next_message():
    """As with GLM 4.5: the policy samples the token that opens the next message."""
    chat = Chat(byte_tokenizer(NO_END_MARK))
    start, end = chat.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert chat.stop_ids == {start, end}
    wanted = "user\nWhat is 5 + 7?<|im_start|>assistant\n"
    assert chat.tokenizer.decode(chat.continuation([USER], start)) == wanted
    assert chat.tokenizer.decode(chat.continuation([USER], end)) == "<|im_start|>" + wanted


def test_tools_that_the_template_does_not_list_need_a_choice():
    with pytest.raises(UserError, match=r"lists no tools.*set model\.chat.tool_syntax to json_list"):
        Chat(byte_tokenizer(CHATML)).check_tools()
    with pytest.raises(UserError, match="lists no tools"):
        Chat(byte_tokenizer(CHATML)).prompt([USER], TOOLS)


def test_results_are_user_messages_where_the_template_has_no_tool_role():
    chat = Chat(byte_tokenizer(NO_TOOL_ROLE), ChatOptions("json_list"))
    chat.check_tools()
    text = chat.tokenizer.decode(chat.continuation([tool_result("look", "e9"), tool_result("look", "e8")]))
    results = "<tool_response>\ne9\n</tool_response>\n<tool_response>\ne8\n</tool_response>"
    assert f"<|im_start|>user\n{results}<|im_end|>" in text


def test_tools_are_listed_in_the_prompt_once():
    for template in (CHATML, HERMES):
        chat = Chat(byte_tokenizer(template), ChatOptions("json_list" if template is CHATML else "auto"))
        text = chat.tokenizer.decode(chat.prompt([{"role": "system", "content": "Be brief."}, USER], TOOLS))
        assert text.count('"submit"') == 1
        assert "Be brief." in text


@pytest.mark.parametrize(
    ("before", "end"),
    [
        ("", "<|im_end|>"),
        ("\\n", "<|im_end|>"),
        (" ", "<|im_end|>"),
        ("\\n\\n ", "<|im_end|>"),
        (" ", "{{ eos_token }}"),
    ],
)
def test_a_turn_ends_at_the_end_token_and_not_at_white_space_before_it(before, end):
    """DeepSeek-Coder's template has a newline there, Llama 2's a space; a stop there would limit answers to a line."""
    chat = Chat(byte_tokenizer(ending(before, end)))
    assert chat.tokenizer.convert_ids_to_tokens(list(chat.stop_ids)) == ["<|im_end|>"]
    answer = "\none line\nand another"
    assert not set(chat.encode(answer)) & chat.stop_ids
    opening, closing = chat.prompt([USER]), chat.continuation([USER])
    whole = chat.tokenizer.decode([*opening, *chat.write({"role": "assistant", "content": answer}), *closing])
    said = {"role": "assistant", "content": answer}
    rendered = chat.tokenizer.apply_chat_template([USER, said, USER], add_generation_prompt=True, tokenize=False)
    assert whole == rendered, "a demonstration differs from the rendered template"
    assert chat.parse([*chat.encode(answer), *chat.stop_ids])["content"] == answer.strip()


@pytest.mark.parametrize("end", ["### End", "</turn>", "\\n\\n### End\\n{{ eos_token }}"])
def test_a_template_that_ends_turns_with_ordinary_text_is_rejected(end):
    with pytest.raises(
        UserError, match=r"ends an assistant turn with the text .* could not end its turn; use a template that"
    ):
        Chat(byte_tokenizer(ending("", end)))


def test_added_tokens_of_white_space_do_not_end_a_turn():
    tokenizer = byte_tokenizer(ending("\\n  ", "<|im_end|>"))
    tokenizer.add_tokens(["  ", "\n"])  # as in GPT-NeoX
    chat = Chat(tokenizer)
    assert chat.tokenizer.convert_ids_to_tokens(list(chat.stop_ids)) == ["<|im_end|>"]


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_no_turn_begins_with_a_stray_space(scheme):
    """Tokenizers with a Metaspace pre-tokenizer (Llama 2, Mistral) add a space at the beginning of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "\n"]
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False, special_tokens=special)
    backend.train_from_iterator(["hello world what is twelve"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "<s>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    chat, question, answer = Chat(tokenizer), {"role": "user", "content": "what is"}, "twelve"
    said = {"role": "assistant", "content": answer}
    ids = chat.prompt([question]) + chat.write(said) + chat.continuation([question])
    whole = tokenizer.apply_chat_template([question, said, question], add_generation_prompt=True, tokenize=False)
    assert ids == tokenizer.encode(whole, add_special_tokens=False)
