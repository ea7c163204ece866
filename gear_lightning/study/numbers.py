"""Numbers of a comparison of arms."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .runs import Arm, Run
from .statistics import (
    PairedDifference,
    bootstrap_interval,
    collapse_rate,
    first_reach,
    holm,
    interquartile_mean,
    iqm_statistic,
    lower_median,
    mean_over_curve,
    on_grid,
    paired_difference,
    probability_of_improvement,
)

Interval = tuple[float, float] | None  # 95 %; None if there is one seed


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
        return mean_over_curve(*self._curve(run), self.low, self.high)

    def final(self, run: Run) -> float:
        """Return the value at the end of the range."""
        return float(on_grid(*self._curve(run), np.array([self.high]))[0])

    def reached(self, run: Run) -> float:
        """Return the first measured x of the whole run at or above the threshold; infinity if there is none."""
        assert self.threshold is not None
        return first_reach(*self._curve(run), self.threshold)

    def path(self, run: Run) -> np.ndarray:
        """Return the curve's values in the range, at the run's own points and at the end."""
        x, y = self._curve(run)
        return np.append(y[(x >= self.low) & (x < self.high)], self.final(run))

    def _curve(self, run: Run) -> tuple[np.ndarray, np.ndarray]:
        curve = run.curve(self.metric, self.over)
        assert curve is not None
        return curve


@dataclass(frozen=True)
class Summary:
    """Numbers of one arm. Runs of one seed count once, with their mean.

    Attributes:
        arm: the arm.
        mean: mean over the curve, then over the seeds.
        mean_interval: interval of ``mean``.
        final: interquartile mean over the seeds of the last value.
        final_interval: interval of ``final``.
        reached: lower median over the runs of the x at which the threshold was reached; infinity if most runs never
            reached it; None: not requested.
        runs_reached: number of runs that reached it.
        collapsed: share of the runs whose last value is below half of their best.
    """

    arm: Arm
    mean: float
    mean_interval: Interval
    final: float
    final_interval: Interval
    reached: float | None
    runs_reached: int
    collapsed: float


@dataclass(frozen=True)
class Contrast:
    """Comparison of an arm with the first one, paired by seed.

    Attributes:
        arm: the arm.
        mean: paired difference of the mean over the curve; None if the two arms share no seed.
        final: the same for the last value.
        adjusted: Holm's p of the sign test on ``mean``, over all contrasts.
        improvement: probability that a seed of this arm has a higher mean over the curve than one of the first arm.
    """

    arm: Arm
    mean: PairedDifference | None
    final: PairedDifference | None
    adjusted: float | None
    improvement: float


def measure(runs: list[Run], metric: str, over: str, threshold: float | None) -> Measure:
    """Return the measure over the range that all runs share.

    Raises:
        UserError: a run has not logged the axis, or no range is shared by all runs.
    """
    starts, ends = {}, {}
    for run in runs:
        curve = run.curve(metric, over)
        if curve is None:
            raise UserError(f"{run.path}: the run has not logged {over}; compare over iterations")
        starts[run], ends[run] = float(curve[0][0]), float(curve[0][-1])
    last, first = max(runs, key=lambda run: starts[run]), min(runs, key=lambda run: ends[run])
    if not starts[last] < ends[first]:
        raise UserError(
            f"{metric} begins at {starts[last]:g} {over} in {last.path} and ends at {ends[first]:g} in {first.path}: "
            "there is nothing to compare"
        )
    return Measure(metric, over, starts[last], ends[first], threshold)


def summarise(arm: Arm, what: Measure) -> Summary:
    """Return the numbers of an arm."""
    means, finals = _by_seed(arm, what.mean), _by_seed(arm, what.final)
    m, f = (np.array([list(values.values())]) for values in (means, finals))
    many = len(means) > 1
    reached = [what.reached(run) for run in arm.runs] if what.threshold is not None else []
    collapsed = [collapse_rate(what.path(run)[None]) for run in arm.runs]
    return Summary(
        arm,
        float(m.mean()),
        _pair(bootstrap_interval(m)) if many else None,
        interquartile_mean(f),
        _pair(bootstrap_interval(f, iqm_statistic)) if many else None,
        lower_median(reached) if reached else None,
        int(np.isfinite(reached).sum()),
        float(np.mean(collapsed)),
    )


def contrasts(arms: list[Arm], what: Measure) -> list[Contrast]:
    """Return the contrasts of every arm except the first with the first."""
    base_mean, base_final = _by_seed(arms[0], what.mean), _by_seed(arms[0], what.final)
    found = []
    for arm in arms[1:]:
        mean, final = _by_seed(arm, what.mean), _by_seed(arm, what.final)
        better = probability_of_improvement(np.array([list(mean.values())]), np.array([list(base_mean.values())]))
        found.append((arm, _paired(mean, base_mean), _paired(final, base_final), better))
    tested = [mean for _, mean, _, _ in found if mean is not None]
    adjusted = iter(holm(np.array([difference.test.p for difference in tested])).tolist())
    return [
        Contrast(arm, mean, final, None if mean is None else next(adjusted), better)
        for arm, mean, final, better in found
    ]


def _by_seed(arm: Arm, value: Callable[[Run], float]) -> dict[str, float]:
    return {seed: float(np.mean([value(run) for run in runs])) for seed, runs in arm.by_seed().items()}


def _paired(ours: dict[str, float], theirs: dict[str, float]) -> PairedDifference | None:
    shared = [seed for seed in theirs if seed in ours]
    if not shared:
        return None
    return paired_difference(np.array([ours[s] for s in shared]), np.array([theirs[s] for s in shared]))


def _pair(interval: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    return float(interval[0]), float(interval[1])
