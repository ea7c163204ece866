"""Export of adapters: merged into a full model, or in peft's format."""

import math

import pytest
import torch
from lora_runs import SMALL, TEMPLATE, directory, fit, logits, with_peft
from tiny_runs import module, source
from transformers import AutoModelForCausalLM, AutoTokenizer

from gear_lightning.commands.export import export_command
from gear_lightning.errors import UserError
from gear_lightning.export.directory import export_checkpoint
from gear_lightning.learning.lora import LoRA, remove
from gear_lightning.models import Pretrained
from gear_lightning.module import GearModule
from gear_lightning.teacher import TeacherOptions


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a trained module and its checkpoint."""
    folder = tmp_path_factory.mktemp("lora")
    return fit(folder, module(lora=SMALL), saved=folder / "last.ckpt"), folder / "last.ckpt"


CASES = {
    "all": (False, SMALL),
    "tied": (True, SMALL),
    "some": (False, LoRA(rank=2, alpha=math.pi, targets=["q_proj", "lm_head", "layers.0.mlp.up_proj"])),
}


@pytest.mark.parametrize("case", CASES)
def test_both_exports_give_the_trained_logits(tmp_path, case):
    tie, options = CASES[case]
    policy = directory(tmp_path / "model", tie)
    start = logits(policy.model())
    model = GearModule(
        policy,
        teacher=TeacherOptions(template=TEMPLATE),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        lora=options,
    )
    fit(tmp_path, model, saved=tmp_path / "a.ckpt", max_epochs=4)
    export_checkpoint(tmp_path / "a.ckpt", tmp_path / "merged")
    export_checkpoint(tmp_path / "a.ckpt", tmp_path / "adapter", adapter=True)
    trained = logits(model.policy)
    assert (trained - start).abs().max() > 0.05, "training did not change the policy"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), trained, atol=1e-5, rtol=1e-5)
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in policy.model().named_parameters()}
    assert torch.equal(logits(with_peft(str(tmp_path / "model"), tmp_path / "adapter")), trained)
    from peft import PeftConfig

    assert PeftConfig.from_pretrained(str(tmp_path / "adapter")).base_model_name_or_path == str(tmp_path / "model")
    files = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert not {"base", "config.json", "model.safetensors"} & files
    again = Pretrained(str(tmp_path / "merged"))  # training can continue from the export
    assert torch.equal(logits(again.model()), logits(merged))


def test_a_base_model_that_exists_nowhere_else_is_exported(run, tmp_path, capsys):
    model, checkpoint = run
    assert export_command([str(checkpoint), str(tmp_path / "out"), "--adapter"]) == 0
    base = tmp_path / "out" / "base"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(base)), logits(model.source.model()))
    assert torch.equal(logits(with_peft(base, tmp_path / "out")), logits(model.policy))
    expression = capsys.readouterr().out.strip().partition("load it with ")[2]
    from peft import PeftModel

    loaded = eval(expression, {"PeftModel": PeftModel, "AutoModelForCausalLM": AutoModelForCausalLM})
    assert torch.equal(logits(loaded), logits(model.policy))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == model.chat_format.tokenizer.chat_template


def test_adapters_trained_on_a_warm_start_are_exported_with_it(tmp_path):
    policy, warm = directory(tmp_path / "model"), tmp_path / "warm"
    source(seed=8).model().save_pretrained(warm)

    def make() -> GearModule:
        return GearModule(policy, teacher=TeacherOptions(template=TEMPLATE), lora=SMALL)

    model = make()
    model.initial_weights = warm
    fit(tmp_path, model, saved=tmp_path / "a.ckpt")
    resumed = fit(tmp_path, make(), resume=tmp_path / "a.ckpt", saved=tmp_path / "b.ckpt", max_epochs=3)
    for trained, name in ((model, "a"), (resumed, "b")):
        export_checkpoint(tmp_path / f"{name}.ckpt", tmp_path / name, adapter=True)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / name / "base")
        assert torch.equal(logits(base), logits(source(seed=8).model()))
        assert torch.equal(logits(with_peft(tmp_path / name / "base", tmp_path / name)), logits(trained.policy))


def test_merging_keeps_a_small_change_of_bfloat16_weights(tmp_path):
    options = {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-4), "lora": SMALL}
    model = fit(tmp_path, module(**options), saved=tmp_path / "a.ckpt", precision="bf16-true")
    export_checkpoint(tmp_path / "a.ckpt", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.float32
    exact = model.policy.float()
    torch.testing.assert_close(logits(merged), logits(exact), atol=1e-5, rtol=1e-5)
    rounded, base = model.policy, source().model().bfloat16()
    remove(rounded, merge=True)
    same = [torch.equal(a.bfloat16(), b) for a, b in zip(rounded.parameters(), base.parameters(), strict=True)]
    assert sum(same) > 2, "this test needs a change that a merge in bfloat16 loses"
    export_checkpoint(tmp_path / "a.ckpt", tmp_path / "adapter", adapter=True)
    from safetensors.torch import load_file

    assert {v.dtype for v in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {torch.float32}


def test_exporting_adapters_without_adapters_is_an_error(tmp_path):
    fit(tmp_path, module(), saved=tmp_path / "full.ckpt", max_epochs=1)
    with pytest.raises(UserError, match=r"full\.ckpt: contains no adapters.*without --adapter"):
        export_checkpoint(tmp_path / "full.ckpt", tmp_path / "out", adapter=True)
    assert not (tmp_path / "out").exists()
