"""Short runs with adapters."""

from pathlib import Path

import torch
from tiny_runs import data, generation, source, trainer
from transformers import AutoModelForCausalLM

from gear_lightning.learning.lora import LoRA, adapter_parameters
from gear_lightning.models import Pretrained
from gear_lightning.module import GearModule

SMALL = LoRA(rank=4, alpha=8)


TEMPLATE = " <ref> {reference}"


TOKENS = torch.arange(6, 46)[None]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits


def tied():
    from transformers import LlamaForCausalLM

    config = source().model().config
    config.tie_word_embeddings = True
    return LlamaForCausalLM(config)


def fit(run: Path, model: GearModule, *, saved: Path | None = None, resume: Path | None = None, **options):
    torch.manual_seed(99 if resume else 0)
    loop = trainer(run, generation(), **{"max_epochs": 2, **options})
    loop.fit(model, datamodule=data(), ckpt_path=resume, weights_only=True)
    if saved:
        loop.save_checkpoint(saved)
    return model


@torch.no_grad()
def stir(model, name: str = "policy", size: float = 0.3) -> None:
    """Change an adapter's weights so that it has an effect."""
    torch.manual_seed(5)
    for p in adapter_parameters(model, name):
        p.add_(size * torch.randn_like(p))


def adapted(options: LoRA = SMALL, kind=source):
    model = kind().model()
    options.adapt(model)
    return model


def flat(parameters) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in parameters])


def split(path: list, model: GearModule, name: str) -> list[torch.Tensor]:
    """Return the adapter of that name at every step of a run."""
    places = [i for i, (key, _) in enumerate(model.policy.named_parameters()) if f".{name}.weight" in key]
    return [flat(weights[i] for i in places) for weights in path]


def directory(folder: Path, tie: bool = False) -> Pretrained:
    """Write a model directory with other weights than the tiny source, and return its policy source."""
    torch.manual_seed(3)
    model = tied() if tie else source(seed=7).model()
    model.save_pretrained(folder)
    source().tokenizer().save_pretrained(folder)
    return Pretrained(str(folder))


def with_peft(base, folder: Path):
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
