"""Comparison of two runs of a recipe, except for rounding: rollouts, credit, losses, steps and checkpoints.

Rounding occasionally changes a discrete decision: a sampled token near a boundary between two, or a credit anchor at
its threshold. Everything after that differs, whatever the strategy: such runs are compared up to that point.
"""

import csv
import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runs.step_records import read_steps, sample
from .steps import compare_steps, drifts
from .tolerance import LOW_TOLERANCE, TOLERANCE, Tolerance

COMPARED = ("policy_logprobs", "divergence", "weights", "token_advantages")
IN_NATS = ("policy_logprobs", "divergence")
APART = 0.3  # relative difference above which rounding cannot be distinguished from errors
UNLIKELY = 3.0  # times the expected number of divergent samples due to rounding
Key = tuple[int, int, int]
Rollouts = dict[Key, dict[str, Tensor]]


@dataclass
class Comparison:
    """Differences between a run and the reference.

    Attributes:
        worst: quantity -> largest difference found: mean difference of an iteration's tokens as a share of their mean
            for log-probs, divergence, credit and loss; see `gear_lightning.parity.steps.StepComparison` for the others.
        faults: differences that rounding does not explain, in words; start with the first.
        iterations: number of iterations compared completely, including their updates.
        steps: number of compared optimizer steps that had a gradient.
        parted: the decision that rounding changed, so that the rest was not compared; empty if there is none.
    """

    worst: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    iterations: int = 0
    steps: int = 0
    parted: str = ""

    @property
    def equal(self) -> bool:
        """Whether at least one update was compared, and everything compared is equal except for rounding."""
        return self.steps > 0 and not self.faults

    @property
    def verdict(self) -> str:
        """The result in a few words."""
        if self.faults:
            return "NOT EQUAL"
        return ("equal" if not self.parted else f"equal to {self.iterations}") if self.equal else "NOT COMPARED"


def tolerance_of(precision: str) -> Tolerance:
    """Return the tolerance for rounding with a value of ``trainer.precision``."""
    return TOLERANCE if precision in ("32-true", "64-true") else LOW_TOLERANCE


def precision_of(run: Path) -> str:
    """Return ``trainer.precision`` of a run; float32 if the run has no config."""
    from omegaconf import OmegaConf

    if not (run / "config.yaml").exists():
        return "32-true"
    loaded: Any = OmegaConf.load(run / "config.yaml")
    return str(loaded.trainer.precision or "32-true")


def read_rollouts(run: Path) -> Rollouts:
    """Return (iteration, group, rollout) -> the recorded tensors of the rollout, without padding."""
    from ..runs.records import read_records

    found = {}
    for record in read_records(run):
        for line in record.rollouts:
            row, mine = line["row"], {}
            if row is not None:
                length = int(record.tensors["valid"][row].sum())
                mine = {k: v[row][:length] for k, v in record.tensors.items() if v.dim() > 1}
            found[line["iteration"], line["group_id"], line["rollout"]] = mine
    return found


def metric(run: Path, name: str) -> list[float]:
    """Return the values of a column of a run's metrics; empty cells are skipped."""
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def compare(reference: Path, other: Path, tolerance: Tolerance | None = None) -> Comparison:
    """Compare two run directories.

    Args:
        reference: the run that the other one should equal.
        other: a run of the same recipe with the same seeds.
        tolerance: None: chosen by the reference's precision.

    Raises:
        UserError: a run has no records of its rollouts or steps.
    """
    tolerance = tolerance or tolerance_of(precision_of(reference))
    found = Comparison()
    ours, theirs = read_rollouts(reference), read_rollouts(other)
    apart = dict(reversed(drifts(reference, other)))  # iteration -> at its first step
    credit = _compare_rollouts(found, ours, theirs, {i: tolerance.after(drift) for i, drift in apart.items()})
    later, found.faults = found.faults, []  # faults of the first iteration that is not in ``credit``
    _compare_losses(found, ours, [metric(run, "train/loss") for run in (reference, other)], credit, tolerance)
    steps = compare_steps(reference, other, tolerance, credit)
    found.worst.update(steps.worst)
    found.faults += [*steps.faults, *later]
    found.steps = steps.steps
    if not found.faults:
        found.iterations = len(credit)
        for run, whose in ((reference, "the reference's"), (other, "the run's")):
            found.faults += [f"{whose} {fault}" for fault in _compare_checkpoint(run)]
    return found


def _compare_rollouts(
    found: Comparison, ours: Rollouts, theirs: Rollouts, tolerances: dict[int, Tolerance]
) -> dict[int, float]:
    """Return iteration -> difference of its credit, for iterations whose updates can be compared."""
    credit: dict[int, float] = {}
    for iteration in sorted({key[0] for key in ours.keys() | theirs.keys()}):
        mine, other = ({k: v for k, v in run.items() if k[0] == iteration} for run in (ours, theirs))
        if odd := mine.keys() ^ other.keys():
            found.faults.append(f"{_place(min(odd))} is in only one of the runs")
            return credit
        if iteration not in tolerances:
            found.faults.append(f"iteration {iteration + 1} has an optimizer step in only one of the runs")
            return credit
        tolerance = tolerances[iteration]
        if tolerance.share > APART:
            found.parted = f"the weights of iteration {iteration + 1} differ by {tolerance.share:.0%} of their change"
            return credit
        same = {key: _same_length(mine[key], other[key]) for key in mine}
        parted = [key for key, length in same.items() if length is not None]
        shares = {}
        for name in COMPARED if not parted else COMPARED[:1]:
            shares[name] = share = _share(name, mine, other, same, tolerance)
            found.worst[name] = max(found.worst.get(name, 0.0), share)
            if name in IN_NATS and not share <= tolerance.share:
                found.faults.append(f"iteration {iteration + 1}: {name} differs by {share:.1e}")
                return credit
        if parted:
            _judge_parting(found, mine, other, same, parted)
            return credit
        credit[iteration] = max(shares[name] for name in COMPARED[2:])
        if not credit.get(iteration, 0.0) <= tolerance.share:
            del credit[iteration]
            _judge_credit(found, iteration, mine, other, tolerance)
            return credit
    return credit


def _same_length(mine: dict[str, Tensor], other: dict[str, Tensor]) -> int | None:
    """Return the number of tokens before two rollouts differ; None if they are equal."""
    if not mine or not other:
        return None if mine.keys() == other.keys() else 0
    length = min(len(mine["tokens"]), len(other["tokens"]))
    differ = torch.zeros(length, dtype=torch.bool)
    for name in ("tokens", "action_mask"):
        differ |= mine[name][:length] != other[name][:length]
    if differ.any():
        return int(differ.nonzero()[0])
    return None if len(mine["tokens"]) == len(other["tokens"]) else length


def _share(name: str, ours: Rollouts, theirs: Rollouts, same: dict[Key, int | None], tolerance: Tolerance) -> float:
    """Return the mean difference over an iteration's sampled tokens, as a share of their mean.

    Tokens count until the two rollouts differ.
    """
    gap, size, count = _sums(name, ours, theirs, same)
    room = count * tolerance.nats if name in IN_NATS else 0.0
    if name == "divergence":  # a difference of two models' log-probs
        room = max(room, 2 * _sums("policy_logprobs", ours, theirs, same)[0])
    size += room / tolerance.share
    return gap / size if size else gap


def _sums(name: str, ours: Rollouts, theirs: Rollouts, same: dict[Key, int | None]) -> tuple[float, float, int]:
    """Return, over the tokens of `_share`, the sum of differences, the sum of sizes, and the number of tokens."""
    gap, size, count = 0.0, 0.0, 0
    for key, length in same.items():
        if ours[key] and theirs[key]:
            mask = ours[key]["action_mask"][:length]
            mine, other = (run[key][name][:length][mask].double() for run in (ours, theirs))
            gap, size, count = (
                gap + float((mine - other).abs().sum()),
                size + float(mine.abs().sum()),
                count + len(mine),
            )
    return gap, size, count


def _judge_parting(
    found: Comparison, ours: Rollouts, theirs: Rollouts, same: dict[Key, int | None], parted: list[Key]
) -> None:
    """Judge whether rounding explains that sampled ids differ.

    A token is sampled by the position of a random number among the cumulative probabilities of all tokens. If log-probs
    differ by g nats, probabilities differ by a share g, and a sample from about exp(entropy) likely tokens lands on the
    other side of a boundary in about a share g x exp(entropy) of all cases.
    """
    gap, expected, entropies = 0.0, 0.0, []
    count = 0
    for key, length in same.items():
        if not ours[key] or not theirs[key]:
            continue
        mask = ours[key]["action_mask"][:length]
        names = ("policy_logprobs", "sampler_logprobs")
        off = [(ours[key][n][:length] - theirs[key][n][:length])[mask].abs() for n in names]
        gap, count = gap + float(torch.maximum(*off).double().sum()), count + int(mask.sum())
        entropies.append(ours[key]["entropy"][: None if length is None else length + 1].double())
    mean = gap / max(count, 1)
    expected = float(sum((mean * e.exp()).clamp_max(1.0).sum() for e in entropies))
    first = min(parted)
    where = f"{_place(first)}, token {same[first]}"
    many = f"{len(parted)} of {len(same)} rollouts"
    if any(_sampled(run[key], same[key]) is False for key in parted for run in (ours, theirs)):
        found.faults.append(f"tokens that are not sampled differ at {where}: another environment answer, or a seed")
    elif len(parted) > 1 + UNLIKELY * expected:
        found.faults.append(
            f"sampled ids differ in {many}, first at {where}, where log-probs differ by {mean:.1e} nats on average: "
            "more often than rounding explains"
        )
    else:
        found.parted = f"sampled ids differ in {many}, first at {where}; log-probs differ by {mean:.1e} nats on average"


def _sampled(rollout: dict[str, Tensor], place: int | None) -> bool | None:
    """Return whether the policy sampled the token at a position; None if the rollout has no token there."""
    if not rollout or place is None or place >= len(rollout["tokens"]):
        return None
    return bool(rollout["action_mask"][place])


def _judge_credit(found: Comparison, iteration: int, ours: Rollouts, theirs: Rollouts, tolerance: Tolerance) -> None:
    """Judge whether rounding explains that credit differs while tokens and divergences do not."""
    everywhere = dict.fromkeys(ours)
    gap, size, _ = _sums("divergence", ours, theirs, everywhere)
    divergence = gap / size if size else 0.0
    if divergence > tolerance.share:
        found.parted = f"credit differs in iteration {iteration + 1}, where the divergence is as small as rounding"
        return
    off = [
        key
        for key in ours
        if any(_share(name, ours, theirs, {key: None}, tolerance) > tolerance.share for name in COMPARED[2:])
    ]
    tokens = sum(int(rollout["action_mask"].sum()) for rollout in ours.values() if rollout)
    # expected number of anchors at their threshold: tokens x relative difference of the divergence
    if len(off) <= 1 + UNLIKELY * tokens * divergence:
        many = f"{len(off)} of {len(ours)} rollouts"
        found.parted = f"credit differs in {many}, first in {_place(off[0])}, at a threshold"
        return
    found.faults.append(
        f"iteration {iteration + 1}: credit differs in {len(off)} of {len(ours)} rollouts, first in {_place(off[0])}, "
        f"where divergences differ by {divergence:.1e}"
    )


def _compare_losses(
    found: Comparison, ours: Rollouts, losses: list[list[float]], credit: dict[int, float], tolerance: Tolerance
) -> None:
    """Compare the losses.

    A loss of the first epoch on its rollouts is a sum of advantages that cancel, so that only rounding remains. It is
    therefore compared relative to the mean size of its terms.
    """
    for iteration, (mine, other) in enumerate(zip(*losses, strict=False)):
        if iteration not in credit:
            return
        advantages = [r["token_advantages"].double().abs() for k, r in ours.items() if k[0] == iteration and r]
        term = float(torch.cat(advantages).mean()) if advantages else 0.0
        share = abs(mine - other) / (max(abs(mine), term) or 1.0)
        found.worst["train/loss"] = max(found.worst.get("train/loss", 0.0), share if share == share else math.inf)
        if not share <= tolerance.share + 10 * credit[iteration]:
            found.faults.append(f"iteration {iteration + 1}: train/loss is {other:g} instead of {mine:g}")
            return


def _compare_checkpoint(run: Path) -> list[str]:
    """Return the differences between ``last.ckpt`` and the weights that the run had after its last step."""
    path = run / "checkpoints" / "last.ckpt"
    if not path.exists():
        return ["last.ckpt is missing"]
    checkpoint = torch.load(path, weights_only=True, mmap=True)
    last = deque(read_steps(run), maxlen=1).pop()
    if checkpoint["global_step"] != last.number:
        return [f"last.ckpt is from step {checkpoint['global_step']}, but the last step was {last.number}"]
    for name, value in last.weights.items():
        saved = checkpoint["state_dict"].get(name)
        if saved is None or not torch.equal(sample(saved, last.elements), value):
            return [f"last.ckpt holds other values of {name} than the run had"]
    return []


def _place(key: Key) -> str:
    return "iteration {}, group {}, rollout {}".format(key[0] + 1, *key[1:])
