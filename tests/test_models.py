"""Policies with random weights, and policies that are loaded from a directory."""

import pytest
import torch
from model_families import Family
from safetensors.torch import load_file, save_file

from gear_lightning.errors import UserError
from gear_lightning.models import FromScratch, Pretrained

WORDS = "gear_lightning.environments.lookup_chain.WORDS"


def test_random_weights_depend_only_on_the_seed():
    before = torch.get_rng_state()
    first = FromScratch(WORDS, layers=1).model().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device("meta"):  # Lightning does the same with the GPU
        elsewhere = FromScratch(WORDS, layers=1).model().state_dict()
    other = FromScratch(WORDS, layers=1, seed=1).model().state_dict()
    assert all(torch.equal(value, elsewhere[name]) for name, value in first.items())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def written(kind, folder):
    source = Family(kind=kind)
    source.model().save_pretrained(folder)
    source.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["GPT-OSS", "Gemma 2", "Mamba 2"])
def test_a_model_without_sdpa_uses_its_own_attention(kind, tmp_path, caplog):
    folder = written(kind, tmp_path)
    with caplog.at_level("INFO"):
        model = Pretrained(str(folder)).model()
    assert model.config._attn_implementation == "eager"
    said = f"{folder}: {type(model).__name__} has no sdpa attention; training uses eager attention"
    assert (said in caplog.text) == (kind != "Mamba 2"), "Mamba has no attention at all"
    for load in ("model", "skeleton"):
        with pytest.raises(UserError, match=r"attn_implementation=sdpa cannot be used here .*remove it"):
            getattr(Pretrained(str(folder), attn_implementation="sdpa"), load)()
        getattr(Pretrained(str(folder), attn_implementation="eager"), load)()


def test_sdpa_is_the_default_without_a_message(tmp_path, caplog):
    with caplog.at_level("INFO"):
        model = Pretrained(str(written("Qwen3", tmp_path))).model()
    assert model.config._attn_implementation == "sdpa"
    assert not caplog.text


@pytest.mark.parametrize(("file", "text"), [("model.safetensors", "{"), ("model.safetensors.index.json", "[1]")])
def test_damaged_weights_are_named(tmp_path, file, text):
    folder = written("Mamba 2", tmp_path)
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=str(folder)):
        Pretrained(str(folder)).model()


def test_a_model_whose_weights_are_incomplete_is_rejected(tmp_path):
    """transformers would fill them with random numbers."""
    file = written("Qwen3", tmp_path) / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "layers.1.mlp" not in k}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"its weights are incomplete .*model\.layers\.1\.mlp.*3 in total"):
        Pretrained(str(tmp_path)).model()
