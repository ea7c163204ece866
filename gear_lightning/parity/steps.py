"""Comparison of the optimizer steps of two runs of a recipe, except for rounding.

A gradient is judged by the norm of its difference. Weights cannot be judged by their size: Adam divides a gradient by
its own size, so that the rounding error of a gradient near zero becomes a step of the size of the learning rate. An
update is therefore judged in units of the maximum change per step, element by element, and each element may differ by
what the recorded difference of its own gradients explains.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..runs.step_records import Step, is_teacher, read_steps
from .tolerance import TOLERANCE, Tolerance

ARITHMETIC = 1e-4  # share of a step: two implementations of one optimizer differ by less on the same gradients
# A relative change r of the gradients seen so far changes an update by less than AMPLIFIED x r steps: for Adam by at
# most (1 + |m| / sqrt(v)) x r, where |m| / sqrt(v) <= (1 - beta1) / sqrt(1 - beta2) = 3.2; for momentum 0.9 by 10 x r
AMPLIFIED = 10.0
ROUNDINGS = 4  # rounding errors of a weight in the two runs' steps, in units in the last place
FEW = 1e-3  # share of a tensor's elements that may exceed the limit, e.g. if an optimizer like Lion uses only signs
SMALL = 1e-2  # a tensor's gradient counts as at least this share of the average one, and a step's norm as at least
QUIET = 1e-3  # this share of the largest one: smaller values are remainders of terms that cancel


@dataclass
class StepComparison:
    """Differences between the steps of a run and those of the reference.

    Attributes:
        worst: ``gradient`` -> largest relative difference, of a whole step or of a tensor; ``norm`` -> of its norm;
            ``update`` -> largest difference of an update, in learning rates, where the gradient is above rounding;
            ``teacher`` -> the same for a teacher's weight, beyond what the policy's weights explain.
        faults: differences that rounding does not explain, in words.
        steps: number of compared optimizer steps that had a gradient.
    """

    worst: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("gradient", "norm", "update"), 0.0))
    faults: list[str] = field(default_factory=list)
    steps: int = 0

    def most(self, name: str, value: float) -> None:
        """Keep the larger of the stored and the new value."""
        self.worst[name] = max(self.worst.get(name, 0.0), value if value == value else math.inf)


@dataclass
class _History:
    """State of one tensor's elements after some steps: float64, with the elements of the record's sample."""

    weights: tuple[Tensor, Tensor]  # of the reference and of the other run, at the last step
    size: float = 0.0  # spacing of numbers near 1 in the weights' type
    difference: Tensor = field(init=False)  # largest difference of the clipped gradients so far
    mean: Tensor = field(init=False)  # mean square of the reference's clipped gradients
    recent: Tensor = field(init=False)  # and its moving average
    moved: Tensor = field(init=False)  # largest update so far, in learning rates
    hull: tuple[Tensor, Tensor] = field(init=False)  # least and largest difference of the weights so far

    def __post_init__(self) -> None:
        zero = torch.zeros_like(self.weights[0])
        self.difference, self.mean, self.recent, self.moved = zero, zero, zero, zero
        gap = self.weights[1] - self.weights[0]
        self.hull = gap.clamp_max(0), gap.clamp_min(0)

    def see(self, gradients: tuple[Tensor, Tensor], number: int) -> Tensor:
        """Add the clipped gradients of a step, and return their relative difference over all steps so far."""
        ours, theirs = gradients
        self.difference = torch.maximum(self.difference, (theirs - ours).abs())
        self.mean = self.mean + (ours.square() - self.mean) / number
        self.recent = 0.9 * self.recent + 0.1 * ours.square()
        usual = torch.minimum(self.mean, self.recent / (1 - 0.9**number)).sqrt()
        # if both are 0 there is no difference to explain
        return torch.where(self.difference == 0, 0.0, self.difference / usual)


def drifts(reference: Path, other: Path) -> list[tuple[int, float]]:
    """Return how far two runs' trained weights have moved apart, for each optimizer step.

    Rounding moves weights apart; gradients, log-probs and credit of later iterations then differ too.

    Returns:
        (iteration, L2 norm of the difference at the step's start, divided by that of the change since the first
        weights).

    Raises:
        UserError: there are no records.
    """
    found, drift = [], 0.0
    first: dict[str, Tensor] = {}
    for ours, theirs in zip(read_steps(reference), read_steps(other), strict=False):
        trained = [name for name in ours.weights if not is_teacher(name) and name in theirs.weights]
        if ours.number:
            found.append((ours.iteration, drift))
        else:
            first = ours.weights
        moved = math.hypot(*(float((ours.weights[n].double() - first[n].double()).norm()) for n in trained))
        gap = math.hypot(*(float((ours.weights[n].double() - theirs.weights[n].double()).norm()) for n in trained))
        drift = gap / moved if moved else 0.0
    return found


def compare_steps(
    reference: Path, other: Path, tolerance: Tolerance = TOLERANCE, allowed: dict[int, float] | None = None
) -> StepComparison:
    """Compare the records of two runs' optimizer steps.

    Args:
        reference: a run directory.
        other: another one.
        tolerance: limits of rounding.
        allowed: iteration -> difference of its credit, which its gradients follow. Only these iterations are compared.
            None: compare all, with equal credit.

    Raises:
        UserError: there are no records.
    """
    found = StepComparison()
    histories: dict[str, _History] = {}
    largest_norm = max(step.norm for step in read_steps(reference))
    apart = drifts(reference, other)
    pairs = zip(read_steps(reference), read_steps(other), strict=False)
    for ours, theirs in pairs:
        if ours.number == 0:
            _start(found, histories, ours, theirs)
            continue
        if allowed is not None and ours.iteration not in allowed:
            return found
        if (ours.iteration, ours.lr) != (theirs.iteration, theirs.lr):
            text = f"of iteration {ours.iteration + 1} with learning rate {ours.lr:g}"
            other_text = f"of iteration {theirs.iteration + 1} with {theirs.lr:g}"
            found.faults.append(f"step {ours.number} is {text} in the reference and {other_text} here")
            return found
        if ours.gradients.keys() != theirs.gradients.keys() or ours.weights.keys() != theirs.weights.keys():
            found.faults.append(f"step {ours.number}: the runs have different parameters")
            return found
        found.steps += ours.norm > 0
        credit = 0.0 if allowed is None else allowed[ours.iteration]
        room = tolerance.after(apart[ours.number - 1][1])
        _judge_gradients(found, ours, theirs, room, credit, QUIET * largest_norm)
        _judge_weights(found, histories, ours, theirs)
        if found.faults:  # later differences follow from these
            return found
    lengths = [sum(1 for _ in read_steps(run)) - 1 for run in (reference, other)]
    if allowed is None and lengths[0] != lengths[1]:
        found.faults.append(f"{lengths[1]} optimizer steps instead of {lengths[0]}")
    return found


def _start(found: StepComparison, histories: dict[str, _History], ours: Step, theirs: Step) -> None:
    if ours.weights.keys() != theirs.weights.keys():
        found.faults.append("the runs start from different parameters")
        return
    for name, value in ours.weights.items():
        if not torch.equal(value, theirs.weights[name]):
            found.faults.append(f"the runs start from different weights ({name})")
            return
        # the coarser dtype of the two determines the rounding
        size = max(torch.finfo(v.dtype).eps for v in (value, theirs.weights[name]))
        histories[name] = _History((value.double(), theirs.weights[name].double()), size)


def _judge_gradients(
    found: StepComparison, ours: Step, theirs: Step, tolerance: Tolerance, credit: float, least: float
) -> None:
    """Judge the norm of the difference, for the whole gradient and for each tensor."""
    room = tolerance.share + 10 * credit  # terms of both signs cancel: credit changes their sum more
    parts = {n: (g.double(), theirs.gradients[n].double()) for n, g in ours.gradients.items()}
    norms = {n: float(g.norm()) for n, (g, _) in parts.items()}
    gaps = {n: float((h - g).norm()) for n, (g, h) in parts.items()}
    sizes = {n: g.numel() for n, (g, _) in parts.items()}
    gap, scale = math.hypot(*gaps.values()), max(math.hypot(*norms.values()), least) or 1.0
    whole, total = gap / scale, sum(sizes.values())
    shares = {n: gaps[n] / (norms[n] + SMALL * scale * math.sqrt(sizes[n] / total)) for n in parts}
    worst = max(shares, key=lambda n: math.inf if shares[n] != shares[n] else shares[n])
    found.most("gradient", max(whole, shares[worst]))
    if not (whole <= room and shares[worst] <= room):  # True for NaN
        told = f"the gradient differs by {whole:.1e} of its norm, that of {worst} by {shares[worst]:.1e}"
        found.faults.append(f"step {ours.number}: {told}")
        return
    ratio = abs(theirs.norm - ours.norm) / (max(ours.norm, least) or 1.0)
    found.most("norm", ratio)
    if not ratio <= tolerance.norm + credit:
        found.faults.append(f"step {ours.number}: the gradient's norm differs by {ratio:.1e}")


def _judge_weights(found: StepComparison, histories: dict[str, _History], ours: Step, theirs: Step) -> None:
    """Judge each update of a trained weight by its gradients, then the teacher's weights by those of the policy."""
    for name in [n for n in ours.weights if not is_teacher(n)]:
        past, lr = histories[name], ours.lr
        before, after = past.weights, (ours.weights[name].double(), theirs.weights[name].double())
        update = after[0] - before[0]
        gap = ((after[1] - before[1]) - update).abs()
        past.weights = after
        past.hull = torch.minimum(past.hull[0], after[1] - after[0]), torch.maximum(past.hull[1], after[1] - after[0])
        explained = torch.zeros_like(gap)
        if name in ours.gradients:
            explained = past.see((_clipped(ours, name), _clipped(theirs, name)), ours.number)
        past.moved = torch.maximum(past.moved, update.abs() / (lr or 1.0))
        grid = ROUNDINGS * past.size * torch.maximum(after[0].abs(), before[0].abs())
        arithmetic = max(ARITHMETIC, 64 * past.size)  # bfloat16 optimizers round their averages, too
        most = lr * past.moved.clamp_min(1.0) * (arithmetic + AMPLIFIED * explained) + grid
        clear = AMPLIFIED * explained < 10 * arithmetic
        found.most("update", float(torch.where(clear, gap - grid, 0.0).clamp_min(0).max()) / (lr or 1.0))
        _count(found, ours, name, ~(gap <= most), "has an update that its gradient does not explain")
    for name in [n for n in ours.weights if is_teacher(n)]:
        own, followed = histories[name], histories.get(_followed(name))
        after = ours.weights[name].double(), theirs.weights[name].double()
        gap = after[1] - after[0]
        low, high = (gap.new_zeros(()),) * 2 if followed is None else followed.hull
        grid = ROUNDINGS * ours.number * own.size * after[0].abs()
        # an average of the policy's differences lies between their least and largest
        beyond = torch.maximum(low - gap, gap - high).clamp_min(0)
        found.most("teacher", float((beyond - grid).clamp_min(0).max()) / (ours.lr or 1.0))
        _count(found, ours, name, ~(beyond <= grid), "does not follow the policy as in the reference")


def _count(found: StepComparison, step: Step, name: str, beyond: Tensor, what: str) -> None:
    count = int(beyond.sum())
    if count > max(1, FEW * beyond.numel()):
        found.faults.append(f"step {step.number}: {name} {what} ({count} of {beyond.numel()} elements)")


def _clipped(step: Step, name: str) -> Tensor:
    gradient = step.gradients[name].double()
    if step.clip_by == "value" and step.clip:
        return gradient.clamp(-step.clip, step.clip)
    return gradient * min(1.0, step.clip / (step.norm + 1e-6)) if step.clip else gradient


def _followed(name: str) -> str:
    """Return the policy's parameter that a teacher's follows: in a copy, or in an adapter inside the policy."""
    return (
        f"policy.{name.removeprefix('teacher.model.')}"
        if name.startswith("teacher.")
        else name.replace(".teacher.", ".policy.")
    )
