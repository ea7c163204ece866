"""Measures the size of rounding in a run, for its credit rule: once, on rollouts, with the same result on all ranks.

The choice of rollouts depends neither on their distribution over ranks nor on the micro-batches, and the percentiles
are computed over the tokens of all ranks. So the number of ranks and micro-batches changes the constant, and with it a
gradient, only by rounding.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..batch import RolloutRow, collate
from ..credit import CreditAssigner, RoundingNoise
from ..distributed.collective import gather
from .noise_floor import Scored, noise_of, p99, read_floor, rounding_of, score


@dataclass(frozen=True)
class Floor:
    """Noise floor of a run: 99th percentiles of the differences that rounding alone causes.

    Attributes:
        log_ratio: log-ratio at sampled tokens, nats.
        divergence: divergence that the rule uses, nats.
        weights: distance of a weight from its rollout's median weight.
        tokens: number of measured tokens.
    """

    log_ratio: float
    divergence: float
    weights: float
    tokens: int

    def rounding(self, rule: CreditAssigner) -> RoundingNoise:
        """Return the part that credit rules use."""
        return RoundingNoise(self.log_ratio, self.divergence if rule.top_k else 0.0)

    def plain(self) -> dict[str, Any]:
        """Return the floor as plain data for a checkpoint; ``Floor(**plain)`` restores it."""
        return asdict(self)


def floor_from(path: Path) -> tuple[Floor, dict[str, Any]]:
    """Return the floor in a file of ``gear-lightning noise-floor``, and the whole contents of the file.

    Raises:
        UserError: the file does not exist or is not a result of ``gear-lightning noise-floor``.
    """
    found = read_floor(path)
    sizes = (float(found[name]["p99"]) for name in ("log_ratio", "divergence", "weight_spread"))
    return Floor(*sizes, tokens=int(found["tokens"])), found


def chosen(rows: Sequence[RolloutRow], group_size: int, tokens: int) -> list[RolloutRow]:
    """Return this rank's share of the rollouts to measure: the first of every group, then the second, and so on, until
    they have ``tokens`` sampled tokens over all ranks. All ranks must call it.

    Args:
        rows: this rank's rollouts of an iteration.
        group_size: number of rollouts of a group, including excluded ones.
        tokens: number of tokens to measure.
    """
    places = [(row.index % group_size, row.group_id) for row in rows]
    mine = [(place, sum(row.action_mask)) for place, row in zip(places, rows, strict=True)]
    wanted, found = set(), 0
    for place, size in sorted(pair for pairs in gather(mine) for pair in pairs):
        if found >= tokens:
            break
        wanted.add(place)
        found += size
    return [row for place, row in zip(places, rows, strict=True) if place in wanted]


def measure_floor(
    module: Any,
    rows: Sequence[RolloutRow],
    *,
    micro_batch_size: int,
    temperature: float,
    context: Callable[[], AbstractContextManager[Any]],
) -> Floor | None:
    """Measure rounding on rollouts, with two forwards without gradient per micro-batch. All ranks must call it.

    Args:
        module: a `gear_lightning.module.GearModule`.
        rows: this rank's share of the rollouts, from `chosen`.
        micro_batch_size: number of rollouts in one forward.
        temperature: sampling temperature.
        context: returns the precision context of training.

    Returns:
        The floor, the same on all ranks; None if no rollout of any rank has a sampled token.
    """
    rule, order = module.credit, sorted(rows, key=lambda row: (row.length + row.teacher_length, row.index))
    cuts = [order[i : i + micro_batch_size] for i in range(0, len(order), micro_batch_size)]
    scored: list[Scored] = []
    for i in range(max(gather(len(cuts)))):  # under a sharded strategy a forward is a collective
        cut = cuts[i] if i < len(cuts) else []
        batch = collate(cut, step_tokens=1, step_rollouts=1, temperature=temperature).to(module.device)
        with context():
            scored.append(score(module.policy, batch, rule))
    raw = [noise_of(one, rule) for one in scored]
    log_ratio, divergence = _pooled([n.log_ratio for n in raw]), _pooled([n.divergence for n in raw])
    if not len(log_ratio):
        return None
    rounding = rounding_of(log_ratio, divergence, rule)
    spread = _pooled([noise_of(one, rule, rounding).spread for one in scored])
    return Floor(rounding.log_ratio, p99(divergence), p99(spread), tokens=len(log_ratio))


def _pooled(values: list[Tensor]) -> Tensor:
    """Return the values of all ranks in one tensor, in order of rank."""
    return torch.cat([x for theirs in gather([x.cpu() for x in values]) for x in theirs] or [torch.zeros(0)])
