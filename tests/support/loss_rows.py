"""Rows of tokens for the tests of objectives."""

import torch
from torch import Tensor


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


def count(n: int) -> Tensor:
    return torch.tensor(n)


def random_step(seed: int, rows: int = 6, width: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(rows, width, generator=g) * 3
    old = logprobs + torch.randn(rows, width, generator=g) * 0.4
    mask = torch.rand(rows, width, generator=g) < torch.rand(rows, 1, generator=g)
    mask[0] = False
    return logprobs, old, torch.randn(rows, width, generator=g), mask


def off_sampler(seed: int, old: Tensor, spread: float = 0.6) -> Tensor:
    """Return the log-probs of a sampler that does not agree with the trainer."""
    return old + spread * torch.randn(old.shape, generator=torch.Generator().manual_seed(seed + 1))
