"""``gear-lightning template`` shows which spans are trained on, and refuses unsupported templates."""

import pytest
from chat_templates import CHATML, HERMES, NO_TOOL_ROLE, byte_tokenizer
from tiny_runs import source

from gear_lightning.commands.template import spans, template_command
from gear_lightning.errors import UserError
from gear_lightning.generation.chat import Chat


@pytest.fixture(params=[CHATML, HERMES], ids=["chatml", "hermes"])
def folder(request, tmp_path):
    byte_tokenizer(request.param).save_pretrained(tmp_path)
    source().model().config.save_pretrained(tmp_path)
    return tmp_path


def test_only_tokens_of_the_policy_are_trained_on_including_the_stop_token(folder, capsys):
    assert template_command([str(folder)]) == 0
    shown = capsys.readouterr().out
    trained = [part.split("\n", 1)[1].split("\n-- ")[0].strip() for part in shown.split("-- sampled, ")[1:]]
    assert len(trained) == 2
    for text in trained:
        assert text.endswith("<|im_end|>"), "the policy must learn to stop"
        assert "<|im_start|>" not in text, "the header of the turn comes from the template, not from the policy"
        assert "<think>" not in text, "the template wrote into the policy's turn"
    assert '"calculator"' in trained[0]
    assert trained[1] == "It is 36.<|im_end|>"
    assert "36<|im_end|>" in shown or "36\n</tool_response>" in shown


@pytest.mark.parametrize("template", [CHATML, HERMES])
def test_the_concatenated_spans_are_the_conversation_that_is_trained_on(template):
    chat = Chat(byte_tokenizer(template))
    whole = chat.tokenizer.decode([i for _, ids in spans(chat) for i in ids])
    assert whole.count("<|im_start|>assistant\n") == 2
    assert whole.count("<|im_end|>") == whole.count("<|im_start|>"), "a message was not closed or closed twice"


def test_a_template_that_cannot_show_tool_results_is_refused(tmp_path):
    byte_tokenizer(NO_TOOL_ROLE).save_pretrained(tmp_path)
    source().model().config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="roles user, assistant, tool"):
        template_command([str(tmp_path)])
