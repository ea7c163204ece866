"""``gear-lightning template`` shows what is trained on, and refuses what cannot work."""

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


def test_only_what_the_policy_says_is_trained_on_stop_token_included(folder, capsys):
    assert template_command([str(folder)]) == 0
    shown = capsys.readouterr().out
    trained = [part.split("\n", 1)[1].split("\n-- ")[0].strip() for part in shown.split("-- sampled, ")[1:]]
    assert len(trained) == 2
    for text in trained:
        assert text.endswith("<|im_end|>"), "the policy must learn to stop"
        assert "<|im_start|>" not in text, "the turn's header is the template's, not the policy's"
        assert "<think>" not in text, "the template wrote into the policy's turn"
    assert '"calculator"' in trained[0]
    assert trained[1] == "It is 36.<|im_end|>"
    assert "36<|im_end|>" in shown or "36\n</tool_response>" in shown


@pytest.mark.parametrize("template", [CHATML, HERMES])
def test_the_spans_in_a_row_are_the_conversation_that_is_trained_on(template):
    chat = Chat(byte_tokenizer(template))
    whole = chat.tokenizer.decode([i for _, ids in spans(chat) for i in ids])
    assert whole.count("<|im_start|>assistant\n") == 2
    assert whole.count("<|im_end|>") == whole.count("<|im_start|>"), "a message was left open or closed twice"


def test_a_template_that_cannot_show_tool_results_is_refused(tmp_path):
    byte_tokenizer(NO_TOOL_ROLE).save_pretrained(tmp_path)
    source().model().config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="roles user, assistant, tool"):
        template_command([str(tmp_path)])
