"""Low-precision weights under every strategy: gradients are summed in float32, and adapters are float32."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from distributed_runs import Opinions
from rank_group import make_strategy
from short_runs import train
from torch import nn

from gear_lightning.distributed.sharding import full
from gear_lightning.errors import UserError
from gear_lightning.learning.gradients import Float32Sums
from gear_lightning.learning.lora import LoRA, is_adapter
from gear_lightning.models import Float32Buffers, Pretrained
from gear_lightning.strategies import place

MICRO_BATCHES, WIDTH = 64, 4096
ROUNDING = 0.003  # rounding one number to bfloat16: up to 0.39 %, 0.17 % on average


class Block(nn.Module):
    """A vector w; returns w x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


class Model(nn.Module):
    """Two blocks, which the strategies shard as layers."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([block(x) for block in self.blocks]).sum()


def inputs(rank: int, micro_batch: int) -> torch.Tensor:
    """Return the input of a rank: one direction plus noise, like gradients of rollouts."""
    mean = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1 + 1000 * rank + micro_batch))
    return (mean + 0.3 * noise).bfloat16()


class Data(torch.utils.data.Dataset):
    """This rank's inputs."""

    def __len__(self) -> int:
        return MICRO_BATCHES

    def __getitem__(self, index: int) -> torch.Tensor:
        return inputs(int(os.environ.get("RANK", "0")), index)


class Sums(Float32Buffers, Float32Sums, L.LightningModule):
    """One step of SGD with learning rate 1 from 0, after which the weights are the negative mean gradient."""

    def __init__(self, seen: list[torch.dtype]):
        super().__init__()
        self.policy: Any = None
        self.seen = seen

    def configure_model(self) -> None:
        if self.policy is None:
            self.policy, _ = place(self.trainer.strategy, Model, Model)
            self.prepare_sums(low_precision=True)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.policy(batch[0]) * MICRO_BATCHES  # Lightning divides by it

    def configure_optimizers(self) -> Any:
        self.start_sums(self.policy.parameters())
        return torch.optim.SGD(self.policy.parameters(), lr=1.0)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen += [p.grad.dtype for p in self.policy.parameters() if p.grad is not None]


def one_step(run: Path, name: str, options: dict[str, Any]) -> tuple[float, list[torch.dtype]]:
    """Return the relative error of the weights after a step, and the dtypes of the gradients before it."""
    seen: list[torch.dtype] = []
    module = Sums(seen)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy="auto" if name == "one" else make_strategy(name, **options),
        precision="bf16-true", max_steps=1, accumulate_grad_batches=MICRO_BATCHES, default_root_dir=run,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(Data()))
    exact = sum(inputs(rank, i).double() for rank in range(world) for i in range(MICRO_BATCHES)) / world
    found = [-full(p).double() for p in module.policy.parameters()]
    return max(float((f - exact).norm() / exact.norm()) for f in found), seen


def test_one_process_sums_micro_batches_in_float32(tmp_path):
    error, seen = one_step(tmp_path, "one", {})
    assert error < ROUNDING
    assert seen == [torch.bfloat16] * 2, "code that clips or reads gradients would not find them"


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_gradients_of_micro_batches_and_ranks_are_summed_in_float32(pair, tmp_path, name):
    for error, seen in pair.run(one_step, tmp_path, name, {}):
        assert error < ROUNDING
        assert seen == ([] if "zero" in name else [torch.bfloat16] * 2)


# -- adapters ---------------------------------------------------------------------------------------------------------

LORA = LoRA(rank=4, alpha=8)
STEP = 1e-5  # learning rate at which most values of A would not change in a bfloat16 adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Pretrained:
    """A model directory."""
    folder = tmp_path_factory.mktemp("base")
    Opinions().model().save_pretrained(folder)
    Opinions().tokenizer().save_pretrained(folder)
    return Pretrained(str(folder))


class Types(L.Callback):
    """Collects the dtypes of base, adapters, their gradients and the optimizer state."""

    def __init__(self) -> None:
        self.found: dict[str, set[torch.dtype]] = {"base": set(), "adapters": set(), "gradients": set(), "state": set()}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name, p in pl_module.policy.named_parameters():
            self.found["adapters" if is_adapter(name) else "base"].add(p.dtype)
            if p.grad is not None:
                self.found["gradients"].add(p.grad.dtype)

    def on_train_end(self, trainer, pl_module):
        for optimizer in trainer.optimizers:
            for state in getattr(optimizer, "optimizer", optimizer).state.values():
                self.found["state"] |= {v.dtype for v in state.values()}


def adapters(run: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train adapters for one more iteration and write a checkpoint."""
    types = Types()
    found = train(run, name, model={"lora": LORA}, callbacks=[types], whole=True, **options)
    return {"gap": found["metrics"]["train/sampler_gap_max"], **types.found}


def chain(pair: Any, run: Path, base: Pretrained, names: list[str], precision: str, lr: float) -> list[dict[str, Any]]:
    """Run every iteration under another strategy, resuming from the previous checkpoint; return the checkpoints."""
    states, resume = [], None
    for number, name in enumerate(names):
        folder = run / f"{number}-{name}"
        folder.mkdir()
        options = {"policy": base, "precision": precision, "lr": lr, "max_epochs": number + 1, "resume": resume}
        results = [adapters(folder, name, options)] if name == "one" else pair.run(adapters, folder, name, options)
        low = precision == "bf16-true"
        for found in results:
            assert found["gap"] < (0.2 if low else 1e-4)
            assert found["base"] == {torch.bfloat16 if low else torch.float32}
            assert found["adapters"] == found["state"] == {torch.float32}
            assert found["gradients"] == {torch.float32} or "zero" in name
        resume = folder / "end.ckpt"
        states.append(torch.load(resume, weights_only=True))
    return states


def test_float32_adapters_on_a_bfloat16_base_resume_under_other_strategies(pair, base, tmp_path):
    states = chain(pair, tmp_path, base, ["ddp", "fsdp", "zero1", "zero2", "zero3"], "bf16-true", STEP)
    for state in states:
        assert all(is_adapter(key) for key in state["state_dict"]), "frozen weights were saved"
        assert {v.dtype for v in state["state_dict"].values()} == {torch.float32}
        assert state["lora"] == states[0]["lora"], "the base's fingerprint depends on the strategy"
    first, last = (state["state_dict"] for state in (states[0], states[-1]))
    for key, value in first.items():
        if ".lora_A.policy." in key:
            assert (last[key] != value).float().mean() > 0.9, key


def test_adapters_trained_under_several_strategies_equal_those_of_one_process(pair, base, tmp_path):
    lr = 1e-3
    states = chain(pair, tmp_path, base, ["fsdp", "zero3", "one"], "32-true", lr)
    folder = tmp_path / "whole"
    folder.mkdir()
    adapters(folder, "one", {"policy": base, "max_epochs": 3})
    whole = torch.load(folder / "end.ckpt", weights_only=True)["state_dict"]
    for key, value in states[-1]["state_dict"].items():
        # B starts at 0 and is a few steps of Adam in size; Adam divides by the gradient's size, including that of
        # rounding: allow 1e-4 of a step
        limit = max(2e-5 * float(value.abs().max()), 1e-4 * lr)
        assert (value - whole[key]).abs().max() <= limit, key


def refused(run: Path, name: str, options: dict[str, Any]) -> str:
    try:
        adapters(run, name, options)
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_adapters_of_another_base_are_refused_on_all_ranks(pair, base, tmp_path, name):
    adapters(tmp_path, "one", {"policy": base, "max_epochs": 1})
    Opinions(seed=3).model().save_pretrained(tmp_path / "other")
    Opinions().tokenizer().save_pretrained(tmp_path / "other")
    other = Pretrained(str(tmp_path / "other"))
    for said in pair.run(refused, tmp_path, name, {"policy": other, "resume": tmp_path / "end.ckpt"}):
        assert "those of" in said
        assert "differ from the ones used in training" in said
