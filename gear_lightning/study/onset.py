"""Credit at the first wrong decision: divergence and segments compared with the environment's labels."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..lens.difference import auc, onset
from ..runs.records import Record, read_records, record_files
from .plan import Run


def onset_scores(record: Record) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the scores of the deciding tokens in the rollouts of one record.

    A rollout contributes the tokens of its first wrong decision, and those of its right decisions before it.

    Returns:
        ``divergence`` (nats) and ``segment`` (1 inside a segment, else 0): scores on first wrong decisions, and on the
        right ones before them. Empty if no teacher ran.
    """
    tensors = record.tensors
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {"divergence": ([], []), "segment": ([], [])}
    if not len(tensors.get("tokens", ())) or not tensors["teacher_logprobs"].any():
        return {}
    scores = {"divergence": tensors["divergence"], "segment": (tensors["anchor"] >= 0).float()}
    for row, decisions in enumerate(tensors["decisions"]):
        wrong, before = onset(decisions)
        for name, score in scores.items():
            found[name][0].append(score[row][wrong])
            found[name][1].append(score[row][before])
    return {name: (torch.cat(high), torch.cat(low)) for name, (high, low) in found.items()}


def onset_of(runs: Iterable[Run]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return how well divergence and segments detect first wrong decisions, by arm and iteration, over all its runs.

    Returns:
        arm -> iteration -> ``divergence`` and ``segment`` (area under the ROC curve), ``first_wrong`` and ``right``
        (tokens). Arms without a teacher, and tasks without labeled decisions, are omitted.
    """
    pooled: dict[tuple[str, int], dict[str, tuple[list[Tensor], list[Tensor]]]] = {}
    for run in runs:
        if not record_files(run.folder):
            continue
        for record in read_records(run.folder):
            for name, (high, low) in onset_scores(record).items():
                place = pooled.setdefault((run.arm, record.iteration), {}).setdefault(name, ([], []))
                place[0].append(high)
                place[1].append(low)
    told: dict[str, dict[str, dict[str, Any]]] = {}
    for (arm, iteration), scores in sorted(pooled.items(), key=lambda item: item[0][1]):
        joined = {name: (torch.cat(high), torch.cat(low)) for name, (high, low) in scores.items()}
        wrong, right = (len(x) for x in joined["divergence"])
        if wrong and right:
            areas = {name: auc(high, low) for name, (high, low) in joined.items()}
            told.setdefault(arm, {})[str(iteration)] = {**areas, "first_wrong": wrong, "right": right}
    return told
