"""The credit page, the terminal view, the command and the callback, on fabricated records."""

import json
import re
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from credit_pages import ATTACK, LAYOUT, WORDS, add, decode, fake_rollout, fake_tensors, page_data, unpack
from headless_browser import dump

from gear_lightning.batch import Credit
from gear_lightning.callbacks.credit_map import CreditMap
from gear_lightning.commands.credit import credit_command
from gear_lightning.errors import UserError
from gear_lightning.lens.page import render_credit_page, write_credit_page
from gear_lightning.lens.text import render_credit_text
from gear_lightning.lens.trace import load_decoder, trace, visible
from gear_lightning.runs.records import Record, read_records


def test_trace_splits_a_row_into_runs_without_padding(run):
    add(run, fake_rollout())
    one = trace(next(read_records(run)), 0)
    assert one.tokens == list(range(10, 21))
    assert one.sections == [(-1, 0, 2), (0, 2, 6), (-1, 6, 8), (1, 8, 11)]
    assert one.segments == [(4, 4, 6)]
    assert (one.sampled, one.covered, one.anchors) == (7, 2, {4})
    assert one.columns["weights"].tolist() == [1, 0.5, 1.75, 1.75, 1, 1, 1]


def test_trace_names_the_record_of_a_missing_row(run):
    with pytest.raises(UserError, match=r"rollout 0 names row 3, .* 1 rows"):
        trace(Record(0, 0, [fake_rollout(row=3)], fake_tensors()), 0)


def test_visible_shows_whitespace_and_escapes_control_characters():
    assert visible("a\n\nb") == "a⏎\n⏎\nb"
    assert visible("  ") == "··"
    assert visible(" a\t") == " a⇥"
    assert visible("\x1b[31m\u202e") == "⟨U+001B⟩[31m⟨U+202E⟩"
    assert visible("") == "∅"


def test_page_stores_numbers_in_thousandths(run):
    add(run, fake_rollout())
    data = page_data(render_credit_page(list(read_records(run)), decode))
    (rollout,) = data["rollouts"]
    assert [data["vocabulary"][i] for i in unpack(rollout["ids"], 11)] == [
        [10 + n, " " + w] for n, w in enumerate(WORDS)
    ]
    (credit,) = rollout["credits"]
    assert data["sets"] == ["recorded"]
    assert unpack(credit["w"], 7) == [1000, 500, 1750, 1750, 1000, 1000, 1000]
    assert unpack(credit["a"], 7) == [-500, -250, -875, -875, -500, -500, -500]
    assert unpack(credit["d"], 7)[2] == 250
    assert credit["segments"] == [[4, 4, 6]]
    assert unpack(rollout["columns"]["p"], 7) == [-250, -375, -500, -625, -1000, -1125, -1250]
    assert rollout["columns"]["h"] == 250  # the same for all tokens
    assert (rollout["advantage"], rollout["solved"], rollout["decisions"]) == (-0.5, 0, [])


def test_large_numbers_use_32_bits(run):
    divergence = torch.zeros(1, 13)
    divergence[0, 2:6] = torch.tensor([40.0, -33.5, torch.inf, 1e30])
    add(run, fake_rollout(), divergence=divergence)
    (rollout,) = page_data(render_credit_page(list(read_records(run)), decode))["rollouts"]
    assert unpack(rollout["credits"][0]["d"], 7) == [40_000, -33_500, None, 2**31 - 1, 0, 0, 0]


def test_runs_of_decisions_end_with_their_turn(run):
    decisions = torch.tensor([[1, 1, 1, -1, -1, 0, 0, 0, 5, 0, 0, 0, 0]])  # those of the prompt do not count
    add(run, fake_rollout(), decisions=decisions)
    (rollout,) = page_data(render_credit_page(list(read_records(run)), decode))["rollouts"]
    assert rollout["decisions"] == [[1, 2, 3], [-1, 3, 5], [1, 8, 9]]


def other_credit() -> Credit:
    """Return possible credit of another rule for the rollout of `fake_tensors`."""
    tensors = fake_tensors()
    weights = torch.where(tensors["action_mask"], 2.0, 1.0)
    anchor = torch.full_like(tensors["anchor"], -1)
    anchor[0, 8:11] = 8
    return Credit(weights, -0.5 * weights, tensors["divergence"], anchor)


def test_other_credit_is_stored_next_to_the_recorded_credit(run):
    add(run, fake_rollout())
    add(run, fake_rollout(row=None, messages=[]), iteration=1)
    records = list(read_records(run))
    data = page_data(render_credit_page(records, decode, others={"Twice": [other_credit(), None]}))
    assert data["sets"] == ["recorded", "Twice"]
    first, second = data["rollouts"][1]["credits"]
    assert (first["segments"], second["segments"]) == ([[4, 4, 6]], [[8, 8, 11]])
    assert (second["w"], second["a"]) == (2000, -1000)
    assert first["d"] == second["d"]
    assert "credits" not in data["rollouts"][0]
    seen = []
    rule = lambda record: seen.append(record.iteration) or other_credit()  # noqa: E731
    written = page_data(write_credit_page(run, others={"Twice": rule}).read_text())
    assert written["rollouts"] == data["rollouts"]
    assert seen == [0]  # the other record has no tokens


def test_credit_of_other_rollouts_is_a_user_error(run):
    add(run, fake_rollout())
    records, credit = list(read_records(run)), other_credit()
    cut = Credit(credit.weights[:, :5], credit.token_advantages[:, :5], credit.divergence[:, :5], credit.anchor[:, :5])
    for credits, message in (
        ([credit, credit], r"credit of X is for 2 records, expected 1"),
        ([cut], r"iteration 0, rank 0: credit to compare with is \[1, 5\], expected \[1, 13\]"),
        ([None], r"credit to compare with is none"),
    ):
        with pytest.raises(UserError, match=message):
            render_credit_page(records, decode, others={"X": credits})


def test_a_page_has_at_most_forty_megabytes(run, monkeypatch):
    add(run, *(fake_rollout(rollout=n) for n in range(20)))
    monkeypatch.setattr("gear_lightning.lens.page._MAX_BYTES", 3000)
    data = page_data(render_credit_page(list(read_records(run)), decode))
    assert 1 <= len(data["rollouts"]) < 10
    assert len(json.dumps(data["rollouts"], separators=(",", ":"))) <= 3000 + len(data["rollouts"]) + 1
    assert data["left_out"] == 20 - len(data["rollouts"])


def test_page_has_no_column_without_a_teacher_and_null_for_nan(run):
    weights = torch.ones(1, 13)
    weights[0, 2] = torch.nan
    add(run, fake_rollout(), teacher_logprobs=torch.zeros(1, 13), weights=weights)
    (rollout,) = page_data(render_credit_page(list(read_records(run)), decode))["rollouts"]
    assert "t" not in rollout["columns"]
    assert unpack(rollout["credits"][0]["w"], 7) == [None, *[1000] * 6]


def test_model_output_is_never_markup(run):
    add(
        run,
        fake_rollout(task_id=ATTACK),
        fake_rollout(row=None, error=ATTACK, messages=[{"role": ATTACK, "content": ATTACK}]),
        tokens=torch.full((1, 13), 99),
    )
    page = render_credit_page(list(read_records(run)), decode, title=f"run {ATTACK}")
    assert "pwned" in page
    assert "<script>document" not in page
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert "innerHTML" not in page
    data = page_data(page)
    assert data["rollouts"][0]["task_id"] == ATTACK
    assert data["vocabulary"] == [[99, ATTACK]]


def test_page_loads_no_other_resources(run):
    add(run, fake_rollout())
    page = render_credit_page(list(read_records(run)), decode)
    assert re.findall(r"https?://[^\"' ]*", page) == ["http://www.w3.org/2000/svg"]  # a namespace, never fetched
    assert not re.search(r"<link|@import|\bsrc=|fetch\(|XMLHttpRequest", page)


def test_a_rollout_without_a_row_has_its_transcript_and_error(run):
    add(run, fake_rollout(row=None, reward=None, status="environment_error", error="ValueError: no door"))
    (rollout,) = page_data(render_credit_page(list(read_records(run)), decode))["rollouts"]
    assert "ids" not in rollout
    assert rollout["messages"][0]["content"] == "task: look please"
    assert (rollout["error"], rollout["reward"], rollout["advantage"]) == ("ValueError: no door", None, None)


def test_newest_iterations_come_first_and_omitted_rollouts_are_counted(run):
    for iteration in range(3):
        for rank in range(2):
            add(run, fake_rollout(), fake_rollout(rollout=1), iteration=iteration, rank=rank)
    written = page_data(write_credit_page(run, max_rollouts=5).read_text())
    rendered = page_data(render_credit_page(list(read_records(run)), decode, max_rollouts=5))
    for data in (written, rendered):
        places = [(r["iteration"], r["rank"], r["rollout"]) for r in data["rollouts"]]
        assert places == [(2, 0, 0), (2, 0, 1), (2, 1, 0), (2, 1, 1), (1, 0, 0)]
        assert data["left_out"] == 7
    assert len(page_data(write_credit_page(run, iterations=[1]).read_text())["rollouts"]) == 4


def test_page_needs_at_most_forty_bytes_per_token(run):
    torch.manual_seed(0)
    shape = (1, 4000)
    names = ("sampler_logprobs", "policy_logprobs", "teacher_logprobs", "entropy", "divergence", "token_advantages")
    tensors = fake_tensors("A" * 4000, padding=0) | {name: torch.randn(shape) for name in names}
    tensors |= {"weights": torch.rand(shape) * 2, "tokens": torch.randint(100, 50_000, shape)}
    add(run, fake_rollout(row=None))
    empty = len(render_credit_page(list(read_records(run)), str))
    add(run, fake_rollout(), **tensors)
    # 21 for the columns and the ids, and the rest for a vocabulary as large as the rollout
    assert len(render_credit_page(list(read_records(run)), str)) - empty < 40 * 4000


def test_write_credit_page_is_atomic_and_names_what_is_missing(run):
    with pytest.raises(UserError, match="no rollout records"):
        write_credit_page(run)
    add(run, fake_rollout())
    assert write_credit_page(run) == run / "credit_map.html"
    assert write_credit_page(run, run / "other.html").exists()
    assert not list(run.glob("*.partial"))
    with pytest.raises(UserError, match="does not exist"):
        write_credit_page(run, run / "nowhere" / "page.html")
    for out, message in ((run, "is a folder; give a file in it"), ("/proc/x.html", "x.html cannot be written")):
        with pytest.raises(UserError, match=message):
            credit_command([str(run), "--html", str(out)])
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(UserError, match="no tokenizer"):
        write_credit_page(run)


def test_decoder_decodes_tokens_as_in_the_middle_of_a_text(run, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    assert [load_decoder(run)(i) for i in (10, 11)] == [" task:", " look"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    backend.train_from_iterator(["the the the"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.save_pretrained(tmp_path / "bytes" / "tokenizer")
    pieces = [load_decoder(tmp_path / "bytes")(i) for i in tokenizer("the the\né<|end|>").input_ids]
    assert pieces == ["the", " the", "\n", "\\xc3", "\\xa9", "<|end|>"]


def test_plain_text_marks_weights_anchors_and_sections(run):
    add(run, fake_rollout())
    text = render_credit_text(next(read_records(run)), 0, decode, color=False)
    assert "\x1b" not in text
    lines = [line for line in text.splitlines() if not line.startswith("legend")]
    assert lines[0] == "doors/1 · iteration 0 · rank 0 · rollout 0"
    assert "reward 0 (not solved)" in lines[1]
    assert "advantage -0.500" in lines[1]
    assert "1 segments, 29% of 7 sampled tokens" in lines[1]
    assert [line.split(" · ")[0] for line in lines[2::2]] == ["── prompt", "── turn 0", "── observation", "── turn 1"]
    assert lines[3::2] == [" task: look", " please open⟨0.5⟩▲[ red door]⟨1.8⟩", " it is", " locked I quit"]


def test_colored_text_has_the_same_content_and_no_escapes_of_the_model(run):
    add(run, fake_rollout(error="bad \x1b[2J"))
    record = next(read_records(run))
    text = render_credit_text(record, 0, lambda token: "\x1b[2J" if token == 10 else decode(token), width=80)
    assert "\x1b[2J" not in text
    assert "⟨U+001B⟩[2J" in text
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert " please open▲ red door" in plain
    styled = {word: style for style, word in re.findall(r"\x1b\[([\d;]*)m (open|red|please)", text)}
    assert "48;2;" in styled["open"]
    assert "48;2;" in styled["red"]
    assert styled["open"] != styled["red"]
    assert "please" not in styled


def test_text_of_a_rollout_without_a_row_is_its_transcript(run):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "open", "arguments": {}}}]}
    add(run, fake_rollout(row=None, reward=None, error="ValueError: x", messages=[*fake_rollout()["messages"], call]))
    text = render_credit_text(next(read_records(run)), 0, decode, color=False)
    for part in ("reward unknown", "error: ValueError: x", "── user", "task: look please", '"name": "open"'):
        assert part in text


def test_command_prints_the_failed_rollout_with_a_segment_of_the_last_iteration(run, capsys):
    solved = fake_rollout(task_id="solved", success=True, reward=1.0)
    add(run, fake_rollout(task_id="old"), iteration=0)
    add(run, solved, iteration=1)
    add(run, fake_rollout(task_id="excluded", row=None), fake_rollout(task_id="failed"), iteration=1, rank=1)
    for arguments, first in (([], "failed"), (["--task", "old"], "old"), (["--iteration", "0"], "old")):
        assert credit_command([str(run), *arguments]) == 0
        assert capsys.readouterr().out.startswith(f"{first} · iteration {int(first != 'old')}")


def test_command_lists_and_writes_the_page(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    add(run, fake_rollout(), fake_rollout(row=None, rollout=1, reward=None, status="environment_error"), iteration=4)
    assert credit_command([str(run), "--list"]) == 0
    title, head, first, second = capsys.readouterr().out.splitlines()
    assert title.strip() == "iteration 4"
    assert head.split()[:3] == ["rank", "rollout", "reward"]
    assert first.split() == ["0", "0", "0", "-0.50", "7", "1", "0.50-1.75", "done", "doors/1"]
    assert second.split() == ["0", "1", "-", "-", "0", "0", "-", "environment_error", "doors/1"]
    assert credit_command([str(run), "--html"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "credit_map.html")
    assert credit_command([str(run), "--iteration", "4", "--html", str(run / "x.html")]) == 0
    assert (run / "x.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iteration", "7"], r"no records of iteration 7; there are 0, 2"),
        (["--iteration", "7", "--html"], r"no records of iteration 7; there are 0, 2"),
        (["--task", "doors/9"], r"no task doors/9; the tasks are doors/1"),
        (["--task", "doors/1", "--rollout", "5", "--iteration", "2"], r"'doors/1' has no rollout 5 .*; it has 0, 1"),
        (["--task", "doors/1", "--html"], r"--html can be combined only with --iteration"),
    ],
)
def test_command_lists_valid_values(run, arguments, message):
    for iteration in (0, 2):
        add(run, fake_rollout(), fake_rollout(rollout=1), iteration=iteration)
    with pytest.raises(UserError, match=message):
        credit_command([str(run), *arguments])


def test_command_without_records_is_a_user_error(tmp_path):
    for arguments in ([], ["--list"], ["--html"]):
        with pytest.raises(UserError, match="no rollout records"):
            credit_command([str(tmp_path), *arguments])


def test_callback_writes_after_every_nth_iteration_and_at_the_end(run):
    page, callback = run / "credit_map.html", CreditMap(every_n_iterations=2, max_rollouts=3)
    add(run, fake_rollout())
    for epoch, expected in ((0, False), (1, False), (2, True)):
        trainer: Any = SimpleNamespace(default_root_dir=str(run), current_epoch=epoch, is_global_zero=True)
        callback.on_train_epoch_start(trainer, None)  # pyright: ignore[reportArgumentType]
        assert page.exists() is expected  # iteration 1 is the second; its page appears as iteration 2 starts
        callback.on_train_epoch_end(trainer, None)  # pyright: ignore[reportArgumentType]
    for end in (lambda: callback.on_fit_end(trainer, None), lambda: callback.on_exception(trainer, None, OSError())):  # pyright: ignore
        page.unlink()
        end()
        assert page.exists()


def test_callback_does_nothing_on_other_ranks_or_without_records_and_warns_on_failure(run, recwarn):
    callback = CreditMap()
    trainer: Any = SimpleNamespace(default_root_dir=str(run), current_epoch=0, is_global_zero=True)
    callback.on_fit_end(trainer, None)  # pyright: ignore[reportArgumentType]
    add(run, fake_rollout())
    trainer.is_global_zero = False
    callback.on_fit_end(trainer, None)  # pyright: ignore[reportArgumentType]
    assert not (run / "credit_map.html").exists()
    assert not recwarn.list
    trainer.is_global_zero = True
    shutil.rmtree(run / "tokenizer")
    with pytest.warns(UserWarning, match="could not be written: UserError: .*no tokenizer"):
        callback.on_exception(trainer, None, OSError())  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="every_n_iterations=0"):
        CreditMap(every_n_iterations=0)


def test_browser_shows_every_token_and_runs_no_injected_script(run, tmp_path):
    tokens = fake_tensors()["tokens"].masked_fill(torch.arange(13)[None] == 9, 99)
    add(run, fake_rollout(task_id=ATTACK, error=ATTACK), tokens=tokens)
    page = tmp_path / "page.html"
    page.write_text(render_credit_page(list(read_records(run)), decode, title="Credit"))
    dom = dump(page, tmp_path / "profile")
    assert "<title>Credit</title>" in dom
    shown = dom[dom.index('<section id="tokens"') : dom.index('<aside id="right"')]
    assert len(re.findall(r'<span class="tok\b', shown)) == len(LAYOUT)
    assert len(re.findall(r'<section class="turn"', shown)) == 2
    assert re.search(
        r'<span class="seg"><span class="tok hi anchor\b.*?1\.75.*? red</span>.*? door</span></span>', shown
    )
    assert "&lt;script&gt;document.title='pwned'&lt;/script&gt;" in shown
    assert "<img" not in dom
