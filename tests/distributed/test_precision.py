"""Low-precision weights under every strategy: gradients are added up in float32."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from distributed.group import make_strategy
from torch import nn

from gear_lightning.gradients import Float32Sums
from gear_lightning.models import Float32Buffers
from gear_lightning.sharding import full
from gear_lightning.strategies import place

MICRO_BATCHES, WIDTH = 64, 4096
ROUNDING = 0.003  # of one number to bfloat16: up to 0.39 %, 0.17 % in the mean


class Block(nn.Module):
    """A vector w; gives w x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


class Model(nn.Module):
    """Two blocks, which the strategies spread as layers."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([block(x) for block in self.blocks]).sum()


def inputs(rank: int, micro_batch: int) -> torch.Tensor:
    """What a rank sees: one direction and noise, as gradients of rollouts have them."""
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
    """One step of SGD at rate 1 from 0: the weights are then the negative mean gradient."""

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
    """The weights' error after a step, as a share of them, and the types of gradients before it."""
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


def test_one_process_adds_micro_batches_up_in_float32(tmp_path):
    error, seen = one_step(tmp_path, "one", {})
    assert error < ROUNDING
    assert seen == [torch.bfloat16] * 2, "what clips gradients, or looks at them, does not find them"


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload"])
def test_gradients_of_micro_batches_and_ranks_are_added_up_in_float32(pair, tmp_path, name):
    for error, seen in pair.run(one_step, tmp_path, name, {}):
        assert error < ROUNDING
        assert seen == ([] if "zero" in name else [torch.bfloat16] * 2)
