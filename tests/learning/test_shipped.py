"""Published files of a model reach the export, and its generation stops at the same tokens as sampling in training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import CHATML, HERMES, byte_tokenizer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import data, generation, trainer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gear_lightning.commands.template import template_command
from gear_lightning.credit import Uniform
from gear_lightning.environments.base import Task, TaskSource
from gear_lightning.environments.single_turn import SingleTurn
from gear_lightning.export.directory import export_checkpoint
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.chat import Chat, ignored_stops
from gear_lightning.learning.shipped import generation_config, merged_config
from gear_lightning.models import Pretrained
from gear_lightning.module import GearModule

DOCUMENT_END = "<|endoftext|>"


class Words(TaskSource):
    """Short prompts."""

    size = 4

    def __getitem__(self, index: int) -> Task:
        return Task(f"word-{index}", [{"role": "user", "content": f"Say {index}"}])


def letters() -> SingleTurn:
    return SingleTurn(lambda task, said: float(sum(c.islower() for c in said[-1]["content"])))


def tokenizer(template: Any = CHATML) -> Any:
    """Return a tokenizer whose end-of-text token differs from its end-of-turn token, as in base models."""
    made = byte_tokenizer(template)
    made.add_special_tokens({"eos_token": DOCUMENT_END, "pad_token": DOCUMENT_END})
    return made


def published(folder: Path, template: Any = CHATML, stops: Any = None, **sampling: Any) -> Path:
    """Write a model directory with all kinds of published files, and return its path."""
    made = tokenizer(template)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"eos_token_id": made.eos_token_id, "pad_token_id": made.pad_token_id, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(made) + 7, **sizes, **ends)).save_pretrained(folder)
    made.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_theta": 10000.0, "torch_dtype": "float32", "house_style": {"a": 1}}
    config |= {"auto_map": {"AutoConfig": "code.C"}, "_name_or_path": "/home/someone/model"}
    (folder / "config.json").write_text(json.dumps(config))
    if stops is None:
        stops = made.convert_tokens_to_ids([DOCUMENT_END, "<|im_start|>"])
    told = {"eos_token_id": stops, "pad_token_id": made.pad_token_id, **sampling}
    (folder / "generation_config.json").write_text(json.dumps(told))
    (folder / "LICENSE").write_text("Pass this on.\n")
    (folder / "preprocessor_config.json").write_text('{"size": 7}')
    (folder / "code.py").write_text("raise SystemExit\n")
    return folder


def fit(run: Path, model: Path, **options: Any) -> tuple[GearModule, Path]:
    module = GearModule(Pretrained(str(model)), Uniform(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), **options)
    play = generation(environment=letters, budgets=Budgets(turns=1, tokens=4, context=96))
    loop = trainer(run, play, ModelCheckpoint(run, save_last=True), enable_checkpointing=True, max_epochs=1)
    loop.fit(module, datamodule=data(train_tasks=Words(), val_tasks=None))
    return module, run / "last.ckpt"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a trained module, its checkpoint and the model directory that it started from."""
    folder = tmp_path_factory.mktemp("shipped")
    model = published(folder / "model", do_sample=True, temperature=0.6, top_k=20)
    return *fit(folder, model), model


def test_the_generation_config_is_kept_and_gets_the_stop_tokens_of_sampling(run, tmp_path):
    module, checkpoint, model = run
    export_checkpoint(checkpoint, tmp_path / "out")
    before, after = read(model / "generation_config.json"), read(tmp_path / "out" / "generation_config.json")
    assert {**after, "eos_token_id": before["eos_token_id"]} == before, "the sampling defaults have changed"
    assert set(after["eos_token_id"]) == set(module.chat_format.stop_ids)
    names = module.chat_format.tokenizer.convert_ids_to_tokens(after["eos_token_id"])
    assert set(names) == {DOCUMENT_END, "<|im_start|>", "<|im_end|>"}, "shipped stop tokens and the end-of-turn token"
    assert names[:2] == [DOCUMENT_END, "<|im_start|>"], "stop tokens of the model come first, in their order"


def test_the_exported_model_stops_at_the_end_of_a_turn(run, tmp_path):
    _, checkpoint, _ = run
    export_checkpoint(checkpoint, tmp_path / "out")
    loaded, said = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        tokenizer().convert_tokens_to_ids("<|im_end|>"),
    )

    class Force(torch.nn.Module):
        def forward(self, hidden):
            return torch.full((*hidden.shape[:-1], loaded.config.vocab_size), -50.0).index_fill(
                -1, torch.tensor([said]), 50.0
            )

    loaded.lm_head = Force()
    made = loaded.generate(torch.tensor([[1, 2]]), max_new_tokens=10, do_sample=False)
    assert made.shape[1] == 3, "generation must stop after one token"


@pytest.mark.parametrize(
    "wrong",
    [
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
        {"max_new_tokens": 7, "num_beams": 1, "early_stopping": True, "nonsense": {"x": [1]}},
    ],
)
def test_a_contradictory_generation_config_is_saved_and_exported_unchanged(tmp_path, wrong):
    """transformers warns about it on loading, and refuses to save it after its stop tokens have changed."""
    model = published(tmp_path / "model", **wrong)
    _, checkpoint = fit(tmp_path, model)
    export_checkpoint(checkpoint, tmp_path / "out")
    assert wrong.items() <= read(tmp_path / "out" / "generation_config.json").items()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id


def test_configuration_terms_and_preprocessor_are_exported_and_code_is_not(run, tmp_path):
    _, checkpoint, model = run
    export_checkpoint(checkpoint, tmp_path / "out", dtype="bfloat16")
    config = read(tmp_path / "out" / "config.json")
    assert config["house_style"] == {"a": 1}
    assert config["rope_theta"] == 10000.0, "other engines read this name, and transformers 5 writes another"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert not {"auto_map", "_name_or_path"} & set(config)
    for name in ("LICENSE", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    assert not (tmp_path / "out" / "code.py").exists()
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_theta"] == 10000.0


def test_the_files_come_from_the_start_of_the_run(tmp_path):
    """The model directory may be gone when the checkpoint is written."""
    model = published(tmp_path / "model")
    module = GearModule(Pretrained(str(model)), Uniform())
    assert module.chat_format  # read at the start of a run
    module.policy = module.source.model()
    (model / "LICENSE").unlink()
    (model / "generation_config.json").unlink()
    files = module.policy_files()
    assert files["LICENSE"].numpy().tobytes() == b"Pass this on.\n"
    assert len(json.loads(files["generation_config.json"].numpy().tobytes())["eos_token_id"]) == 3


def test_a_link_out_of_the_model_directory_is_not_published(tmp_path):
    model, secret = published(tmp_path / "model"), tmp_path / "secret"
    secret.write_text("mine")
    (model / "LICENSE").unlink()
    (model / "LICENSE").symlink_to(secret)
    assert "LICENSE" not in Pretrained(str(model)).shipped()
    cached = tmp_path / "hub" / "snapshots" / "abc"  # layout of the hub's cache
    cached.mkdir(parents=True)
    (tmp_path / "hub" / "blobs").mkdir()
    for path in model.iterdir():
        (tmp_path / "hub" / "blobs" / path.name).write_bytes(path.read_bytes())
        (cached / path.name).symlink_to(f"../../blobs/{path.name}")
    assert Pretrained(str(cached)).shipped()["LICENSE"] == b"mine", "a file within the cache"


def test_a_hub_model_ships_the_files_in_its_cache(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    cached = tmp_path / "models--me--model"
    (cached / "snapshots").mkdir(parents=True)
    published(tmp_path / "model").rename(cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    module = GearModule(Pretrained("me/model"), Uniform())
    assert len(module.chat_format.stop_ids) == 3
    module.policy = module.source.model()
    assert module.policy_files()["LICENSE"].numpy().tobytes() == b"Pass this on.\n"
    assert module._base_model == "me/model"
    assert Pretrained("me/none").shipped() == {}


def test_a_tokenizer_with_several_templates_keeps_them(tmp_path):
    model = published(tmp_path / "model", {"default": CHATML, "tool_use": HERMES})
    _, checkpoint = fit(tmp_path, model)
    export_checkpoint(checkpoint, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == {"default": CHATML, "tool_use": HERMES}
    recorded = tmp_path / "tokenizer"
    assert AutoTokenizer.from_pretrained(recorded).chat_template == {"default": CHATML, "tool_use": HERMES}


# -- stop tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_sampling_stops_where_the_published_model_stops(tmp_path, file):
    model = published(tmp_path / "model")
    if file == "config.json":  # used if generation_config.json is missing
        (model / "generation_config.json").unlink()
        told = read(model / file)
        (model / file).write_text(
            json.dumps({**told, "eos_token_id": tokenizer().convert_tokens_to_ids(["<|im_start|>"])})
        )
    chat = GearModule(Pretrained(str(model)), Uniform()).chat_format
    assert set(chat.tokenizer.convert_ids_to_tokens(list(chat.stop_ids))) == {
        DOCUMENT_END,
        "<|im_start|>",
        "<|im_end|>",
    }
    assert not chat.ignored_stops


def test_a_stop_token_that_is_ordinary_text_is_reported_and_not_used(tmp_path, capsys):
    """LlamaConfig's default end-of-text token is 2, whatever that token is in the tokenizer."""
    model = published(tmp_path / "model", stops=[7, 90_000])
    chat = GearModule(Pretrained(str(model)), Uniform()).chat_format
    assert chat.ignored_stops == {7, 90_000}
    assert set(chat.tokenizer.convert_ids_to_tokens(list(chat.stop_ids))) == {DOCUMENT_END, "<|im_end|>"}
    text = chat.tokenizer.decode([7])
    assert f"stops at token 7 ({text!r}), 90000" in ignored_stops(chat)
    template_command([str(model)])
    assert f"stops at token 7 ({text!r}), 90000" in " ".join(capsys.readouterr().out.split())


def test_a_single_stop_token_is_stored_as_a_number():
    assert generation_config({"eos_token_id": [5, 3], "top_k": 1}, {3}) == {"eos_token_id": 3, "top_k": 1}
    assert generation_config({"_from_model_config": True}, {4, 3}) == {"eos_token_id": [3, 4]}


def test_a_configuration_of_another_model_type_is_not_merged():
    whole = {"model_type": "seer", "text_config": {"a": 1}, "vision": 2}
    assert merged_config(whole, {"model_type": "seer_text", "a": 1}) == {"model_type": "seer_text", "a": 1}


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_a_broken_generation_config_is_named(tmp_path, content):
    from gear_lightning.errors import UserError

    model = published(tmp_path / "model")
    (model / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"model/generation_config\.json"):
        GearModule(Pretrained(str(model)), Uniform()).chat_format  # noqa: B018


def test_chat_accepts_only_control_tokens_as_stop_tokens():
    made = tokenizer()
    start, letter = made.convert_tokens_to_ids("<|im_start|>"), made.encode("a", add_special_tokens=False)[0]
    chat = Chat(made, stop_ids=[start, letter])
    assert start in chat.stop_ids
    assert letter not in chat.stop_ids
