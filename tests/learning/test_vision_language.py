"""The text of vision-language models is trained; their image encoder is frozen and exported unchanged."""

from functools import partial

import pytest
import torch
import transformers
import vision_language
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import data, generation, trainer

from gear_lightning.credit import Uniform
from gear_lightning.export.directory import export_checkpoint
from gear_lightning.learning.lora import LoRA
from gear_lightning.models import Pretrained
from gear_lightning.module import GearModule

TOKENS = torch.arange(6, 46)[None]
WHOLE = ["Qwen2.5-VL", "Qwen3-VL", "Gemma 3", "Mistral 3"]
TEXT_ONLY = ["Llama 4", "Qwen3.5"]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        *((kind, None) for kind in ("Qwen2.5-VL", "Gemma 3", "Mistral 3", "Qwen3.5")),
        *((kind, LoRA(rank=2, alpha=4)) for kind in ("Qwen3-VL", "Llama 4")),
        ("Mistral 3", LoRA(rank=2, alpha=4, targets=["q_proj"])),  # the image encoder has layers of this name
    ],
)
def test_the_text_part_is_trained_and_the_rest_kept(tmp_path, kind, lora):
    published = vision_language.write(kind, tmp_path / "model")
    before = transformers.AutoModelForImageTextToText.from_pretrained(published)
    adamw = partial(torch.optim.AdamW, lr=1e-2)
    model = GearModule(Pretrained(str(published)), Uniform(), lora=lora, optimizer=adamw)
    keeper = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, save_on_train_epoch_end=True)
    run = trainer(tmp_path, generation(), keeper, max_epochs=1, enable_checkpointing=True)
    run.fit(model, datamodule=data())
    assert float(run.callback_metrics["train/sampler_gap_max"]) < 5e-6
    trained = {name for name, p in model.policy.named_parameters() if p.requires_grad}
    assert not [name for name in trained if "vis" in name or "projector" in name]

    how = export_checkpoint(tmp_path / "checkpoints" / "last.ckpt", tmp_path / "out")
    # transformers loads Gemma 3 whole by both classes
    kept = "AutoModelForCausalLM" if kind in (*TEXT_ONLY, "Gemma 3") else "AutoModelForImageTextToText"
    assert how.startswith(f"{kept}.from_pretrained")
    assert kept in (tmp_path / "out" / "README.md").read_text()
    after = getattr(transformers, kept).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(after), logits(model.policy), atol=1e-4, rtol=1e-4)  # merged adapters round
    assert (logits(after) - logits(before)).abs().max() > 1e-3, "training did not change the policy"
    if kind in WHOLE:
        assert type(after) is type(before)
        vision = {n: p for n, p in before.state_dict().items() if "vis" in n or "projector" in n}
        assert vision
        assert all(torch.equal(p, after.state_dict()[n]) for n, p in vision.items())
