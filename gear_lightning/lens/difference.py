"""Differences between two credits of the same rollouts: token by token, and as figures over many rollouts.

*here* is always the first of two credits, *there* the second. Entry t of a ``[B, T]`` tensor belongs to token t; only
action tokens count. Pure functions of tensors.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch import Credit
from ..runs.records import Record

CHANGED = 0.01  # a weight has changed if it differs by more
FIFTHS = 5
ROUNDED = 6  # decimals of a weight that count for its rank: differences due to rounding are ties


@dataclass(frozen=True)
class Side:
    """One credit of one rollout.

    Attributes:
        anchors: indices of its segments' anchors.
        covered: number of tokens in segments.
        fifths: sums of the weights by fifth of the rollout.
        wrong: divergence on tokens of wrong decisions.
        right: divergence on tokens of right decisions.
        blame: share of the negative advantage that falls on the first wrong decision; None if there is no negative
            advantage or no wrong decision.
        praise: the same for the positive advantage.
    """

    anchors: set[int]
    covered: int
    fifths: Tensor
    wrong: Tensor
    right: Tensor
    blame: float | None
    praise: float | None


@dataclass(frozen=True)
class Pair:
    """Two credits of one rollout.

    Attributes:
        tokens: number of action tokens, N.
        changed: number of tokens whose weight differs by more than `CHANGED`.
        fifths: number of tokens by fifth of the rollout.
        rank: Spearman's correlation of the weights; None if one of the two gives all tokens the same weight.
        moved: total variation between the two distributions of ``|token advantage|`` over the tokens, in [0, 1]; None
            if one of the two has only advantages of 0.
    """

    tokens: int
    changed: int
    fifths: Tensor
    rank: float | None
    moved: float | None
    here: Side
    there: Side


def ranks(values: Tensor) -> Tensor:
    """Return ranks ``[N]`` from 1; equal values share the mean of their ranks; float64."""
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[place]


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Return Spearman's rank correlation of two vectors of N values; None if one of them is constant."""
    x, y = (r - r.mean() for r in (ranks(a), ranks(b)))
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if scale > 0 else None


def total_variation(a: Tensor, b: Tensor) -> float | None:
    """Return half the L1 distance of two non-negative vectors, each divided by its sum; None if a sum is 0."""
    a, b = a.double(), b.double()
    if not (a.sum() > 0 and b.sum() > 0):
        return None
    return float((a / a.sum() - b / b.sum()).abs().sum() / 2)


def auc(high: Tensor, low: Tensor) -> float | None:
    """Return the probability that a value of ``high`` is above one of ``low``; ties count half.

    The result is None if all values are equal, or if one side is empty.
    """
    if not len(high) or not len(low):
        return None
    place = ranks(torch.cat([high, low]))
    if place.min() == place.max():
        return None
    return float((place[: len(high)].sum() - len(high) * (len(high) + 1) / 2) / (len(high) * len(low)))


def first_wrong(decisions: Tensor) -> Tensor:
    """Return a mask ``[T]`` of the first unbroken run of tokens of wrong decisions."""
    wrong = decisions < 0
    begun = wrong.cumsum(0) > 0
    return wrong & ((begun & ~wrong).cumsum(0) == 0)


def onset(decisions: Tensor) -> tuple[Tensor, Tensor]:
    """Return masks ``[T]`` of the first wrong decision and of the right decisions before it.

    Decisions after a wrong one may be right or wrong because of it, and are in neither mask.
    """
    wrong, where = first_wrong(decisions), torch.arange(len(decisions))
    return wrong, (decisions == 1) & (where < (where[wrong].min() if wrong.any() else len(decisions)))


def _side(credit: Credit, row: int, mask: Tensor, decisions: Tensor, fifth: Tensor) -> Side:
    anchor, divergence = credit.anchor[row][mask], credit.divergence[row][mask]
    advantages, first = credit.token_advantages[row].double(), first_wrong(decisions)
    shares = []
    for mass in ((-advantages).clamp_min(0), advantages.clamp_min(0)):
        total = mass[mask].sum()
        shares.append(float(mass[first].sum() / total) if first.any() and total > 0 else None)
    return Side(
        set(anchor[anchor >= 0].tolist()),
        int((anchor >= 0).sum()),
        torch.zeros(FIFTHS, dtype=torch.double).scatter_add(0, fifth, credit.weights[row][mask].double()),
        divergence[decisions[mask] < 0],
        divergence[decisions[mask] > 0],
        *shares,
    )


def compare(record: Record, here: Credit, there: Credit) -> list[Pair]:
    """Compare two credits of a record's rollouts: one `Pair` for each row that has action tokens."""
    pairs = []
    for row, mask in enumerate(record.tensors["action_mask"]):
        n = int(mask.sum())
        if not n:
            continue
        a, b = here.weights[row][mask], there.weights[row][mask]
        fifth = torch.arange(n) * FIFTHS // n
        decisions = torch.where(mask, record.tensors["decisions"][row], 0)
        pairs.append(
            Pair(
                n,
                int((~((a - b).abs() <= CHANGED)).sum()),
                torch.bincount(fifth, minlength=FIFTHS),
                rank_correlation(a.double().round(decimals=ROUNDED), b.double().round(decimals=ROUNDED)),
                total_variation(here.token_advantages[row][mask].abs(), there.token_advantages[row][mask].abs()),
                _side(here, row, mask, decisions, fifth),
                _side(there, row, mask, decisions, fifth),
            )
        )
    return pairs


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _both(pairs: list[Pair], value: Any) -> dict[str, Any]:
    return {side: value([getattr(pair, side) for pair in pairs]) for side in ("here", "there")}


def summary(pairs: list[Pair]) -> dict[str, Any]:
    """Summarize the two credits of several rollouts as plain data; None for a figure without values.

    Returns:
        ``rollouts``, ``tokens``; ``changed``: share of the tokens; ``rank_correlation`` and ``moved``: means over the
        rollouts that have a value (``..._rollouts`` is their number); ``anchors``: ``shared``, ``only_here``,
        ``only_there``; and, each for ``here`` and ``there``, ``segments_per_rollout``, ``in_segments`` (share of the
        tokens), ``weight_by_fifth`` (means, from the first tokens of a rollout to its last). ``decisions`` is None if
        none are known: ``wrong`` and ``right``: number of tokens; ``auc`` of the divergence for wrong against right
        ones; ``blame`` and ``praise``: share of a rollout's negative and positive advantage that falls on its first
        wrong decision, mean over the rollouts that have both.
    """
    tokens = sum(pair.tokens for pair in pairs)
    anchors = [(pair.here.anchors, pair.there.anchors) for pair in pairs]
    counts = sum((pair.fifths for pair in pairs), torch.zeros(FIFTHS)).tolist()
    wrong, right = sum(len(pair.there.wrong) for pair in pairs), sum(len(pair.there.right) for pair in pairs)

    def by_fifth(sides: list[Side]) -> list[float | None]:
        sums = sum((side.fifths for side in sides), torch.zeros(FIFTHS)).tolist()
        return [total / count if count else None for total, count in zip(sums, counts, strict=True)]

    decisions = None
    if wrong or right:
        decisions = {
            "wrong": wrong,
            "right": right,
            "auc": _both(pairs, lambda s: auc(torch.cat([x.wrong for x in s]), torch.cat([x.right for x in s]))),
            "blame": _both(pairs, lambda s: _mean([x.blame for x in s])),
            "praise": _both(pairs, lambda s: _mean([x.praise for x in s])),
        }
    return {
        "rollouts": len(pairs),
        "tokens": tokens,
        "changed": sum(pair.changed for pair in pairs) / tokens if tokens else None,
        "rank_correlation": _mean([pair.rank for pair in pairs]),
        "rank_correlation_rollouts": sum(pair.rank is not None for pair in pairs),
        "moved": _mean([pair.moved for pair in pairs]),
        "moved_rollouts": sum(pair.moved is not None for pair in pairs),
        "anchors": {
            "shared": sum(len(a & b) for a, b in anchors),
            "only_here": sum(len(a - b) for a, b in anchors),
            "only_there": sum(len(b - a) for a, b in anchors),
        },
        "segments_per_rollout": _both(pairs, lambda s: _mean([len(x.anchors) for x in s])),
        "in_segments": _both(pairs, lambda s: sum(x.covered for x in s) / tokens if tokens else None),
        "weight_by_fifth": _both(pairs, by_fifth),
        "decisions": decisions,
    }


@dataclass(frozen=True)
class Change:
    """A token whose advantage differs between two credits.

    Attributes:
        size: absolute difference of the advantages.
        iteration, rank, row: place of its rollout in the records.
        token: its index in the rollout.
        weights, advantages: here and there.
        before, after: ids around the token, within the rollout.
        id: id of the token.
    """

    size: float
    iteration: int
    rank: int
    row: int
    token: int
    weights: tuple[float, float]
    advantages: tuple[float, float]
    before: list[int]
    id: int
    after: list[int]


def largest_changes(record: Record, here: Credit, there: Credit, count: int = 10, context: int = 6) -> list[Change]:
    """Return the tokens of a record whose advantage differs most, largest first; differences below 1e-6 are ignored.

    Args:
        record: the rollouts.
        here: one credit of them.
        there: the other.
        count: maximum number of tokens.
        context: maximum number of ids before a token, and after it.
    """
    mask, ids = record.tensors["action_mask"], record.tensors["tokens"]
    size = torch.where(mask, (here.token_advantages - there.token_advantages).abs(), 0).nan_to_num(0, 0, 0)
    found = []
    for place in size.flatten().argsort(descending=True, stable=True)[:count].tolist():
        row, token = divmod(place, size.shape[1])
        if size[row, token] < 1e-6:
            break
        length = int(record.tensors["valid"][row].sum())
        found.append(
            Change(
                float(size[row, token]),
                record.iteration,
                record.rank,
                row,
                token,
                (float(here.weights[row, token]), float(there.weights[row, token])),
                (float(here.token_advantages[row, token]), float(there.token_advantages[row, token])),
                ids[row, max(0, token - context) : token].tolist(),
                int(ids[row, token]),
                ids[row, token + 1 : min(length, token + 1 + context)].tolist(),
            )
        )
    return found
