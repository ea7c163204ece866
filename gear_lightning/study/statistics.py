"""Statistics of runs: pure functions on NumPy arrays (extra: ``study``).

Scores are float arrays of shape [strata, seeds]: a stratum is a task or a setting, and the seeds are independent runs
of it. Intervals of a level are percentile bootstraps: with fewer than about ten seeds they are too narrow. Intervals of
paired differences are Student's, those of a ratio of two of them Fieller's. All resampling is seeded, so that the
numbers of a report can be reproduced.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..errors import UserError

Statistic = Callable[[np.ndarray], np.ndarray]  # [..., strata, seeds] -> [...]


def interquartile_mean(scores: np.ndarray) -> float:
    """Return the mean of the middle half of all scores, whatever their shape; robust to single collapsed runs.

    A quarter of the scores, rounded down, is removed at each end; below four scores the result is the mean.
    Source: Agarwal et al. 2021 (arXiv 2108.13264).

    Raises:
        UserError: no scores, or scores that are not finite.
    """
    return float(iqm_statistic(_finite(scores).reshape(1, -1)))


def mean_statistic(scores: np.ndarray) -> np.ndarray:
    """Return the mean over strata and seeds."""
    return scores.mean((-2, -1))


def iqm_statistic(scores: np.ndarray) -> np.ndarray:
    """Return the interquartile mean over strata and seeds together."""
    from scipy.stats import trim_mean

    return trim_mean(scores.reshape(*scores.shape[:-2], -1), 0.25, axis=-1)


def bootstrap_interval(
    scores: np.ndarray,
    statistic: Statistic = mean_statistic,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    together: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentile interval of a statistic by the stratified bootstrap: seeds are drawn within each stratum.

    Source: Efron and Tibshirani 1993; stratified as in Agarwal et al. 2021 (arXiv 2108.13264).

    Args:
        scores: [strata, seeds, ...]; further axes (points of a curve) are kept together in every draw.
        statistic: of scores [..., strata, seeds] -> [...].
        level: coverage, between 0 and 1.
        resamples: number of draws.
        seed: of the draws.
        together: draw the same seeds in all strata: for strata whose seeds are the same (a seed's run at each learning
            rate), which are not independent runs.

    Returns:
        Low and high end, with the shape of the further axes.

    Raises:
        UserError: fewer than two seeds, scores that are not finite, or a level outside (0, 1).
    """
    from scipy.stats import bootstrap

    scores = _finite(scores)
    if not 0 < level < 1:
        raise UserError(f"level={level} must lie between 0 and 1")
    if scores.ndim < 2 or scores.shape[1] < 2:
        raise UserError(f"an interval needs scores [strata, seeds] of at least 2 seeds, got shape {list(scores.shape)}")
    draws: Any = {"n_resamples": resamples, "paired": together, "confidence_level": level, "rng": seed}
    of_draws = lambda *drawn, axis: statistic(np.stack(drawn, axis - 1))  # noqa: E731
    return bootstrap(tuple(scores), of_draws, method="percentile", vectorized=True, **draws).confidence_interval


@dataclass(frozen=True)
class SignTest:
    """Result of `sign_test`: number of differences above, below and at zero, and the two-sided p."""

    wins: int
    losses: int
    ties: int
    p: float


def sign_test(differences: np.ndarray) -> SignTest:
    """Run an exact two-sided sign test of paired differences against a median of zero. Ties are counted and dropped.

    With n pairs without ties the smallest p is 2 / 2^n: 5 pairs cannot reach 0.05. Source: Dixon and Mood 1946.

    Raises:
        UserError: differences that are not finite.
    """
    from scipy.stats import binomtest

    differences = _finite(differences).ravel()
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return SignTest(wins, losses, len(differences) - wins - losses, p)


@dataclass(frozen=True)
class PairedDifference:
    """Result of `paired_difference`; there is no interval for one pair. ``holm`` is the test's p after `holm`."""

    mean: float
    interval: tuple[float, float] | None
    pairs: int
    test: SignTest
    holm: float


def paired_difference(ours: np.ndarray, theirs: np.ndarray, *, level: float = 0.95) -> PairedDifference:
    """Return the mean of ``ours - theirs`` over pairs (same seed, same tasks), its interval and the sign test.

    The interval is Student's, mean ± t(pairs - 1) s / sqrt(pairs): a 95 % bootstrap of five pairs covers only 83 %.
    Source: Student 1908.

    Args:
        ours: [pairs].
        theirs: [pairs], in the same order.
        level: coverage of the interval, between 0 and 1.

    Raises:
        UserError: arrays of different lengths, no pairs, scores that are not finite, or a level outside (0, 1).
    """
    from scipy.stats import sem, t

    ours, theirs = _pairs(ours, theirs, level)
    gaps = ours - theirs
    mean, interval = float(gaps.mean()), None
    if len(gaps) > 1:
        half = float(t.ppf((1 + level) / 2, len(gaps) - 1) * sem(gaps))
        interval = mean - half, mean + half
    test = sign_test(gaps)
    return PairedDifference(mean, interval, len(gaps), test, test.p)


def paired_differences(family: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[PairedDifference]:
    """Return the `paired_difference` of each (ours, theirs), with p adjusted for their number by `holm`.

    Raises:
        UserError: as in `paired_difference`.
    """
    found = [paired_difference(ours, theirs) for ours, theirs in family]
    adjusted = holm(np.array([one.test.p for one in found])).tolist()
    return [replace(one, holm=p) for one, p in zip(found, adjusted, strict=True)]


@dataclass(frozen=True)
class RatioOfMeans:
    """Result of `ratio_of_means`; there is no interval for one pair, or if the interval is unbounded."""

    ratio: float
    interval: tuple[float, float] | None


def ratio_of_means(ours: np.ndarray, theirs: np.ndarray, *, level: float = 0.95) -> RatioOfMeans:
    """Return the mean of ``ours`` divided by the mean of ``theirs``, over the same pairs, and Fieller's interval.

    The interval contains the ratios r for which Student's test does not distinguish the mean of ``ours - r theirs``
    from 0. It is bounded if the same test distinguishes the mean of ``theirs`` from 0, and is not symmetric about the
    ratio. Source: Fieller 1954.

    Args:
        ours: [pairs].
        theirs: [pairs], in the same order.
        level: coverage of the interval, between 0 and 1.

    Raises:
        UserError: arrays of different lengths, no pairs, scores that are not finite, a mean of ``theirs`` of 0, or a
            level outside (0, 1).
    """
    from scipy.stats import t

    ours, theirs = _pairs(ours, theirs, level)
    top, bottom, n = float(ours.mean()), float(theirs.mean()), len(ours)
    if bottom == 0:
        raise UserError("a ratio to a mean of 0 is undefined")
    if n < 2:
        return RatioOfMeans(top / bottom, None)
    # variances of the means: q^2 var(top), q^2 cov, q^2 var(bottom); the ends are the roots of
    # (bottom^2 - w) r^2 - 2 (top bottom - v) r + (top^2 - u)
    q = float(t.ppf((1 + level) / 2, n - 1))
    (u, v), (_, w) = q**2 * np.cov(ours, theirs) / n
    a, b, c = bottom**2 - w, top * bottom - v, top**2 - u
    if a <= 0:
        return RatioOfMeans(top / bottom, None)
    root = float(np.sqrt(max(b**2 - a * c, 0.0)))
    return RatioOfMeans(top / bottom, (float((b - root) / a), float((b + root) / a)))


def _pairs(ours: np.ndarray, theirs: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Check and return two lists of one length, as floats.

    Raises:
        UserError: their shapes do not fit, or the level of an interval is outside (0, 1).
    """
    ours, theirs = _finite(ours), _finite(theirs)
    if ours.ndim != 1 or ours.shape != theirs.shape:
        raise UserError(f"pairs are two lists of one length, got shapes {list(ours.shape)} and {list(theirs.shape)}")
    if not 0 < level < 1:
        raise UserError(f"level={level} must lie between 0 and 1")
    return ours, theirs


def holm(p: np.ndarray) -> np.ndarray:
    """Return p values adjusted for their number, in the given order.

    The i-th smallest of n is multiplied by n - i (i from 0), raised to the one before it if that is larger, and capped
    at 1. Source: Holm 1979.

    Raises:
        UserError: values outside [0, 1].
    """
    p = _finite(p) if np.size(p) else np.zeros(0)
    if p.ndim != 1 or ((p < 0) | (p > 1)).any():
        raise UserError("p values must be a list of numbers between 0 and 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def probability_of_improvement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the probability that a run of ours scores above one of theirs; ties count half; mean over strata.

    This is the Mann-Whitney statistic divided by the number of pairs: 0.5 if there is no difference.
    Source: Agarwal et al. 2021 (arXiv 2108.13264), section 4.

    Args:
        ours: [strata, seeds].
        theirs: [strata, other seeds].

    Raises:
        UserError: arrays with different numbers of strata, or scores that are not finite.
    """
    from scipy.stats import mannwhitneyu

    ours, theirs = _finite(ours), _finite(theirs)
    if ours.ndim != 2 or theirs.ndim != 2 or len(ours) != len(theirs):
        raise UserError(f"scores are [strata, seeds], got shapes {list(ours.shape)} and {list(theirs.shape)}")
    above = mannwhitneyu(ours, theirs, axis=1, method="asymptotic").statistic
    return float(np.mean(above / (ours.shape[1] * theirs.shape[1])))


def collapse_rate(curves: np.ndarray, fraction: float = 0.5, *, at: Literal["last", "any"] = "last") -> float:
    """Return the share of runs that collapsed.

    Args:
        curves: [runs, points] of a score that is not negative and better when higher.
        fraction: a run has collapsed if it is below this fraction of its best value so far.
        at: ``last``: judge its last point; ``any``: judge all points, so that a run that recovered counts, too.

    Raises:
        UserError: curves that are not finite, or a fraction outside [0, 1].
    """
    curves = _finite(curves)
    if curves.ndim != 2 or not 0 <= fraction <= 1:
        raise UserError(f"curves must be [runs, points] and fraction={fraction} must lie between 0 and 1")
    fallen = curves < fraction * np.maximum.accumulate(curves, axis=1)
    return float((fallen[:, -1] if at == "last" else fallen.any(1)).mean())


def on_grid(x: np.ndarray, y: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return a curve at other x values, by linear interpolation between its points.

    Args:
        x: [points], increasing.
        y: [points].
        grid: [places], between the first and the last ``x``.

    Returns:
        [places].

    Raises:
        UserError: ``x`` does not increase, or a place lies outside the curve: there is no extrapolation.
    """
    x, y, grid = _finite(x), _finite(y), _finite(grid)
    if x.ndim != 1 or x.shape != y.shape or (np.diff(x) <= 0).any():
        raise UserError("a curve must be two lists of one length, x increasing")
    slack = 1e-9 * max(abs(x[0]), abs(x[-1]))
    if grid.min() < x[0] - slack or grid.max() > x[-1] + slack:
        raise UserError(f"the curve runs from {x[0]:g} to {x[-1]:g}, not from {grid.min():g} to {grid.max():g}")
    return np.interp(grid, x, y)


def mean_over_curve(x: np.ndarray, y: np.ndarray, low: float | None = None, high: float | None = None) -> float:
    """Return the mean height of a curve in a range: its area by the trapezoid rule divided by the width, in y's unit.

    Args:
        x: [points], increasing.
        y: [points].
        low: start of the range. None: the first x.
        high: end of the range. None: the last x.

    Raises:
        UserError: as in `on_grid`, or an empty range.
    """
    low, high = float(x[0]) if low is None else low, float(x[-1]) if high is None else high
    if not low < high:
        raise UserError(f"the range from {low:g} to {high:g} is empty")
    x = np.asarray(x, dtype=float)
    places = np.concatenate([[low], x[(x > low) & (x < high)], [high]])
    return float(np.trapezoid(on_grid(x, y, places), places) / (high - low))


def first_reach(x: np.ndarray, y: np.ndarray, threshold: float, *, stay: bool = False) -> float:
    """Return the first measured x at which a curve is at or above a threshold; infinity if it never is.

    There is no interpolation: only measured values count.

    Args:
        x: [points], increasing.
        y: [points].
        threshold: in y's unit.
        stay: return the first x after which the curve is never below the threshold again.
    """
    reached = _finite(y) >= threshold
    if stay:
        reached = np.logical_and.accumulate(reached[::-1])[::-1]
    return float(x[int(reached.argmax())]) if reached.any() else float("inf")


def _finite(values: np.ndarray) -> np.ndarray:
    """Return the values as floats.

    Raises:
        UserError: no values, or a value that is not finite.
    """
    values = np.asarray(values, dtype=float)
    if not values.size:
        raise UserError("there are no scores")
    if not np.isfinite(values).all():
        raise UserError("a score is not a finite number")
    return values
