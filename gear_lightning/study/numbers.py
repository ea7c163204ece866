"""Numbers of arms: the summary of one, and of run directories the measure and its paired contrasts."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median_low

import numpy as np

from ..errors import UserError
from .runs import Arm, Run
from .statistics import (
    PairedDifference,
    Statistic,
    bootstrap_interval,
    collapse_rate,
    first_reach,
    iqm_statistic,
    mean_over_curve,
    mean_statistic,
    on_grid,
    paired_differences,
    probability_of_improvement,
)

Interval = tuple[float, float] | None  # 95 %; None if there is one seed


@dataclass(frozen=True)
class Summary:
    """Numbers of one arm.

    Attributes:
        mean: mean over the curve: its statistic over the seeds.
        mean_interval: interval of ``mean``.
        final: interquartile mean over the seeds of the last value.
        final_interval: interval of ``final``.
        reached: lower median over the runs of the x at which the threshold was reached; infinity if most runs never
            reached it; None: not requested.
        runs_reached: number of runs that reached it.
        collapsed: share of the runs that collapsed.
    """

    mean: float
    mean_interval: Interval
    final: float
    final_interval: Interval
    reached: float | None
    runs_reached: int
    collapsed: float


def summary(
    means: np.ndarray,
    finals: np.ndarray,
    reached: Sequence[float],
    curves: Iterable[np.ndarray],
    *,
    of_means: Statistic = mean_statistic,
    together: bool = False,
    collapse: float = 0.5,
) -> Summary:
    """Return the numbers of an arm.

    Args:
        means: mean over the curve [strata, seeds].
        finals: last values [strata, seeds].
        reached: x at which each run reached the threshold; empty: there is no threshold.
        curves: values [points] of each run.
        of_means: statistic of ``means``.
        together: as in `bootstrap_interval`.
        collapse: as ``fraction`` in `collapse_rate`.

    Raises:
        UserError: scores or values that are not finite.
    """
    return Summary(
        *_level(means, of_means, together),
        *_level(finals, iqm_statistic, together),
        median_low(reached) if reached else None,
        int(np.isfinite(reached).sum()),
        float(np.mean([collapse_rate(curve[None], collapse) for curve in curves])),
    )


def _level(scores: np.ndarray, statistic: Statistic, together: bool) -> tuple[float, Interval]:
    if scores.shape[1] < 2:
        return float(statistic(scores)), None
    low, high = bootstrap_interval(scores, statistic, together=together)
    return float(statistic(scores)), (float(low), float(high))


# -- of run directories -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """Measured quantity of the comparison: all runs over the same range of one axis.

    Attributes:
        metric: column of the runs.
        over: the axis, a key of `runs.AXES`.
        low: start of the range, the latest start of all runs.
        high: end of the range, the earliest end of all runs.
        threshold: in the metric's unit; None: not requested.
    """

    metric: str
    over: str
    low: float
    high: float
    threshold: float | None

    def mean(self, run: Run) -> float:
        """Return the mean over the curve."""
        return mean_over_curve(*run.curve(self.metric, self.over), self.low, self.high)

    def final(self, run: Run) -> float:
        """Return the value at the end of the range."""
        return float(on_grid(*run.curve(self.metric, self.over), np.array([self.high]))[0])

    def reached(self, run: Run) -> float:
        """Return the first measured x of the whole run at or above the threshold; infinity if there is none."""
        limit = np.inf if self.threshold is None else self.threshold
        return first_reach(*run.curve(self.metric, self.over), limit)

    def path(self, run: Run) -> np.ndarray:
        """Return the curve's values in the range, at the run's own points and at the end."""
        x, y = run.curve(self.metric, self.over)
        return np.append(y[(x >= self.low) & (x < self.high)], self.final(run))


@dataclass(frozen=True)
class Contrast:
    """Comparison of an arm with the first one, paired by seed.

    Attributes:
        arm: the arm.
        mean: paired difference of the mean over the curve; None if the two arms share no seed.
        final: the same for the last value.
        improvement: probability that a seed of this arm has a higher mean over the curve than one of the first arm.
    """

    arm: Arm
    mean: PairedDifference | None
    final: PairedDifference | None
    improvement: float


def measure(runs: list[Run], metric: str, over: str, threshold: float | None) -> Measure:
    """Return the measure over the range that all runs share.

    Raises:
        UserError: a run has not logged the axis, or no range is shared by all runs.
    """
    places = {run: run.curve(metric, over)[0] for run in runs}
    starts, ends = ({run: float(x[place]) for run, x in places.items()} for place in (0, -1))
    last, first = max(runs, key=lambda run: starts[run]), min(runs, key=lambda run: ends[run])
    if not starts[last] < ends[first]:
        raise UserError(
            f"{metric} begins at {starts[last]:g} {over} in {last.path} and ends at {ends[first]:g} in {first.path}: "
            "there is nothing to compare"
        )
    return Measure(metric, over, starts[last], ends[first], threshold)


def summarise(arm: Arm, what: Measure) -> Summary:
    """Return the numbers of an arm. Runs of one seed count once, with their mean."""
    means, finals = (_row(_by_seed(arm, value)) for value in (what.mean, what.final))
    reached = [] if what.threshold is None else [what.reached(run) for run in arm.runs]
    return summary(means, finals, reached, map(what.path, arm.runs))


def contrasts(arms: list[Arm], what: Measure) -> list[Contrast]:
    """Return the contrasts of every arm except the first with the first."""
    means, finals = ([_by_seed(arm, value) for arm in arms] for value in (what.mean, what.final))
    better = [probability_of_improvement(_row(mine), _row(means[0])) for mine in means[1:]]
    return [Contrast(*one) for one in zip(arms[1:], _paired(means), _paired(finals), better, strict=True)]


def _by_seed(arm: Arm, value: Callable[[Run], float]) -> dict[str, float]:
    return {seed: float(np.mean([value(run) for run in runs])) for seed, runs in arm.by_seed().items()}


def _row(scores: dict[str, float]) -> np.ndarray:
    return np.array([list(scores.values())])


def _paired(scores: list[dict[str, float]]) -> list[PairedDifference | None]:
    """Return the difference of every arm except the first from the first; None if the two share no seed."""
    base, *others = scores
    pairs = [np.array([(mine[seed], base[seed]) for seed in base if seed in mine]).T for mine in others]
    found = iter(paired_differences((pair[0], pair[1]) for pair in pairs if pair.size))
    return [next(found) if pair.size else None for pair in pairs]
