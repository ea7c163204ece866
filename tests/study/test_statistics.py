"""Statistics against hand-computed values, independent references and known distributions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gear_lightning.errors import UserError
from gear_lightning.study.statistics import (
    bootstrap_interval,
    collapse_rate,
    first_reach,
    holm,
    interquartile_mean,
    iqm_statistic,
    mean_over_curve,
    on_grid,
    paired_difference,
    probability_of_improvement,
    ratio_of_means,
    sign_test,
)

pytest.importorskip("scipy")
NUMBERS = st.floats(-5, 5, allow_nan=False, width=32)
SMALL = st.lists(st.integers(0, 4), min_size=1, max_size=7)  # small integers tie often


def test_interquartile_mean_removes_a_quarter_at_each_end():
    assert interquartile_mean(np.array([8.0, 1, 2, 3, 4, 100, -50, 5])) == 3.5  # (2 + 3 + 4 + 5) / 4
    assert interquartile_mean(np.array([[1.0, 2], [3, 100]])) == 2.5  # (2 + 3) / 2
    assert interquartile_mean(np.array([1.0, 2, 6])) == 3.0  # too few to remove any: the mean
    # of five, int(1.25) = 1 is removed at each end
    assert interquartile_mean(np.array([0.0, 3, 4, 5, 9])) == 4.0


def test_sign_test_by_hand():
    # 4 up, 1 down: P(at least 4 or at most 1 of 5) = 2 (5 + 1) / 32 = 0.375; the tie is dropped
    found = sign_test(np.array([1.0, 2, 0.5, 3, -1, 0]))
    assert (found.wins, found.losses, found.ties) == (4, 1, 1)
    assert found.p == pytest.approx(0.375)
    assert sign_test(np.full(5, 1.0)).p == pytest.approx(0.0625)  # 2 / 2^5
    assert sign_test(np.zeros(3)).p == 1.0


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=10))
@settings(max_examples=50, deadline=None)
def test_sign_test_equals_an_enumeration_of_all_signs(gaps):
    found, n = sign_test(np.array(gaps)), sum(g != 0 for g in gaps)
    extreme = abs(found.wins - found.losses)
    worse = sum(abs(sum(signs)) >= extreme for signs in itertools.product((-1, 1), repeat=n))
    assert found.p == pytest.approx(worse / 2**n)
    assert sign_test(-np.array(gaps)).p == found.p


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.5: times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.5
    assert holm(np.array([0.03, 0.01, 0.5, 0.02])) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    # 0.01 x 3 = 0.03; 0.04 x 2 = 0.08; 0.045 x 1 = 0.045, raised to the one before it
    assert holm(np.array([0.01, 0.04, 0.045])) == pytest.approx([0.03, 0.08, 0.08])
    assert holm(np.array([0.6, 0.7])) == pytest.approx([1.0, 1.0])
    assert holm(np.array([])).shape == (0,)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_holm_rejects_the_same_as_its_step_down_rule(p):
    adjusted, level, still = holm(np.array(p)), 0.05, True
    assert (adjusted >= np.array(p) - 1e-12).all()
    for rank, place in enumerate(np.argsort(p, kind="stable")):
        scaled = p[place] * (len(p) - rank)
        if abs(scaled - level) < 1e-9:
            return
        still = still and scaled <= level
        assert (adjusted[place] <= level) == still


def test_paired_difference_by_hand():
    found = paired_difference(np.array([0.8, 0.7, 0.9]), np.array([0.6, 0.7, 0.8]))
    assert found.mean == pytest.approx(0.1)  # (0.2 + 0 + 0.1) / 3
    assert (found.pairs, found.test.wins, found.test.losses, found.test.ties) == (3, 2, 0, 1)
    # s = 0.1, s / sqrt(3) = 0.057735, and t(0.975, 2) = 4.302653
    assert found.interval == pytest.approx((0.1 - 0.248414, 0.1 + 0.248414), abs=1e-6)
    alone = paired_difference(np.array([1.0]), np.array([0.5]))
    assert (alone.mean, alone.interval) == (0.5, None)


@pytest.mark.parametrize("pairs", [3, 5, 10])
def test_the_interval_of_few_pairs_has_its_nominal_coverage(pairs):
    rng = np.random.default_rng(7)
    found = [paired_difference(rng.normal(2, 1, pairs), np.zeros(pairs)).interval for _ in range(1000)]
    # 1000 trials have a standard error of 0.7 points
    assert 0.93 <= np.mean([low <= 2 <= high for low, high in filter(None, found)]) <= 0.97


def test_ratio_of_means_by_hand():
    # means 2 and 4; t(0.975, 2) = 4.302653, t^2 / 3 = 6.170940 times variance 1, covariance 0.5 and variance 1
    found = ratio_of_means(np.array([1.0, 2, 3]), np.array([4.0, 3, 5]))
    assert found.ratio == 0.5
    a, b, c = 16 - 6.170940, 8 - 3.085470, 4 - 6.170940  # b^2 - a c = 24.1526 + 21.3383 = 45.4909, its root 6.744692
    assert found.interval == pytest.approx(((b - 6.744692) / a, (b + 6.744692) / a), abs=1e-5)
    assert b**2 - a * c == pytest.approx(6.744692**2, abs=1e-4)
    twice = ratio_of_means(np.array([6.0, 6.4, 7]), np.array([3.0, 3.2, 3.5]))
    assert (twice.ratio, twice.interval) == (pytest.approx(2), pytest.approx((2, 2)))
    assert ratio_of_means(np.array([1.0]), np.array([2.0])).interval is None


def test_a_ratio_to_a_mean_that_could_be_0_has_no_bounds():
    rng = np.random.default_rng(0)
    theirs = rng.normal(0.1, 1, 8)
    low, high = paired_difference(theirs, np.zeros(8)).interval
    assert low < 0 < high
    assert ratio_of_means(rng.normal(1, 1, 8), theirs).interval is None


@given(st.lists(st.tuples(NUMBERS, st.floats(2, 3)), min_size=3, max_size=10))
@settings(max_examples=50, deadline=None)
def test_the_ends_of_the_ratios_interval_have_p_of_0_05_in_students_test(pairs):
    """Reference: scipy's one-sample t-test of ours - r theirs at each end."""
    from scipy.stats import ttest_1samp

    ours, theirs = (np.array(x) for x in zip(*pairs, strict=True))
    found = ratio_of_means(ours, theirs)
    if found.interval is None or np.ptp(ours / theirs) < 1e-3:
        return
    assert found.interval[0] <= found.ratio <= found.interval[1]
    for end in found.interval:
        assert ttest_1samp(ours - end * theirs, 0).pvalue == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize("together", [0.0, 0.9])
def test_the_interval_of_a_ratio_has_its_nominal_coverage(together):
    """10 pairs with means 1.4 and 2, with correlated or independent errors."""
    rng, covered = np.random.default_rng(3), []
    for _ in range(1000):
        shared = rng.normal(0, 1, 10)
        ours, theirs = (
            mean + together**0.5 * shared + (1 - together) ** 0.5 * rng.normal(0, 1, 10) for mean in (1.4, 2.0)
        )
        if (interval := ratio_of_means(ours, theirs).interval) is not None:
            covered.append(interval[0] <= 0.7 <= interval[1])
    assert len(covered) > 950
    assert 0.93 <= np.mean(covered) <= 0.97  # 1000 trials have a standard error of 0.7 points


def test_equal_differences_have_an_interval_without_width():
    assert paired_difference(np.ones(4), np.zeros(4)).interval == (1.0, 1.0)


def test_pairing_removes_a_seeds_effect_on_both_arms():
    rng = np.random.default_rng(0)
    luck = rng.normal(0, 1, 20)
    found = paired_difference(luck + 0.1 + rng.normal(0, 0.01, 20), luck)
    assert found.interval == pytest.approx((0.1, 0.1), abs=0.02)


def test_probability_of_improvement_is_a_mean_over_strata():
    # first task: 1 of 1; second: 0 of 1; the seeds of other tasks are not compared
    assert probability_of_improvement(np.array([[9.0, 9.0], [1, 1]]), np.array([[8.0, 8.0], [2, 2]])) == 0.5


def test_collapse_rate_by_hand():
    curves = np.array([
        [0.2, 0.8, 0.7],  # does not collapse
        [0.2, 0.8, 0.39],  # below half of 0.8 at the end
        [0.2, 0.8, 0.4],  # at half, not below
        [0.8, 0.1, 0.8],  # recovered
    ])  # fmt: skip
    assert collapse_rate(curves) == 0.25
    assert collapse_rate(curves, at="any") == 0.5
    assert collapse_rate(curves, 0.9) == 0.75  # 0.7 < 0.72, 0.39 and 0.4
    assert collapse_rate(np.zeros((2, 3))) == 0.0, "a run that is always at 0 has not collapsed"


def test_mean_over_curve_by_hand():
    x, y = np.array([0.0, 1, 3]), np.array([0.0, 2, 2])
    assert mean_over_curve(x, y) == pytest.approx(5 / 3)  # (1 x 1 + 2 x 2) / 3
    assert mean_over_curve(x, y, 0.5, 2) == pytest.approx(2.75 / 1.5)  # (1 + 2) / 2 x 0.5 = 0.75, and 2 x 1
    with pytest.raises(UserError, match="empty"):
        mean_over_curve(x, y, 2, 2)
    with pytest.raises(UserError, match="from 0 to 3"):
        mean_over_curve(x, y, 0, 4)


@given(st.lists(st.tuples(st.floats(0.01, 5), NUMBERS), min_size=2, max_size=8), NUMBERS)
@settings(max_examples=100, deadline=None)
def test_mean_over_curve_is_within_its_range_and_invariant_to_added_points(points, shift):
    x, y = np.cumsum([gap for gap, _ in points]), np.array([height for _, height in points])
    mean = mean_over_curve(x, y)
    assert y.min() - 1e-9 <= mean <= y.max() + 1e-9
    assert mean_over_curve(x, y + shift) == pytest.approx(mean + shift, abs=1e-9)
    between = np.sort(np.concatenate([x, (x[1:] + x[:-1]) / 2]))
    assert mean_over_curve(between, on_grid(x, y, between)) == pytest.approx(mean, abs=1e-9)


def test_first_reach_is_a_measured_point():
    x, y = np.array([0.0, 10, 20, 30]), np.array([0.1, 0.8, 0.7, 0.9])
    assert first_reach(x, y, 0.8) == 10
    assert first_reach(x, y, 0.8, stay=True) == 30
    assert first_reach(x, y, 0.75) == 10, "not 9.3, between two measurements"
    assert first_reach(x, y, 0.95) == math.inf
    assert first_reach(x, y, 0.05, stay=True) == 0


def test_the_bootstrap_of_one_stratum_equals_scipys():
    from scipy.stats import bootstrap

    scores = np.random.default_rng(1).normal(0, 1, 12)
    theirs = bootstrap((scores,), np.mean, method="percentile", n_resamples=20000, rng=2).confidence_interval
    low, high = bootstrap_interval(scores[None], resamples=20000)
    assert low == pytest.approx(theirs.low, abs=0.02)
    assert high == pytest.approx(theirs.high, abs=0.02)


def test_strata_are_not_mixed():
    """Two tasks with constant scores: no draw can change the mean, although the tasks differ greatly."""
    scores = np.array([[0.0, 0, 0], [1, 1, 1]])
    assert bootstrap_interval(scores) == (0.5, 0.5)
    low, high = bootstrap_interval(scores.reshape(1, 6))
    assert low < 0.5 < high


def test_strata_are_drawn_independently():
    """The mean of 16 equal tasks varies a quarter as much as that of one; with the same seeds in all, equally much."""
    one = np.random.default_rng(5).normal(0, 1, (1, 20))
    widths = [float(np.subtract(*bootstrap_interval(s)[::-1])) for s in (one, np.repeat(one, 16, axis=0))]
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.1)


def test_the_same_seeds_in_all_strata_are_drawn_together():
    """The mean of 16 copies of a task varies as much as that of one, and a stratum keeps its own scores."""
    one = np.random.default_rng(5).normal(0, 1, (1, 20))
    copies = np.repeat(one, 16, axis=0)
    assert bootstrap_interval(copies, together=True) == pytest.approx(bootstrap_interval(one, together=True))
    assert bootstrap_interval(np.concatenate([one, -one]), together=True) == pytest.approx((0, 0))


def test_the_interquartile_mean_is_computed_for_every_draw():
    drawn = np.random.default_rng(6).normal(0, 1, (5, 2, 6))
    assert iqm_statistic(drawn) == pytest.approx([interquartile_mean(scores) for scores in drawn])


def test_curves_are_resampled_as_a_whole():
    """Two seeds have mirrored curves: the interval of their mean is symmetric at every point."""
    curves = np.array([[[0.0, 1.0, 0.2], [1.0, 0.0, 0.8]]])
    low, high = bootstrap_interval(curves)
    assert low == pytest.approx([0, 0, 0.2])
    assert high == pytest.approx([1, 1, 0.8])


def test_the_interval_is_reproducible_and_narrows_with_more_seeds():
    rng = np.random.default_rng(3)
    few, many = rng.normal(0, 1, (1, 10)), rng.normal(0, 1, (1, 1000))
    assert bootstrap_interval(few) == bootstrap_interval(few)
    assert bootstrap_interval(few, seed=1) != bootstrap_interval(few)
    width = [float(high - low) for low, high in (bootstrap_interval(few), bootstrap_interval(many))]
    assert width[1] == pytest.approx(2 * 1.96 / math.sqrt(1000), rel=0.1)
    assert width[0] > 5 * width[1]


@pytest.mark.parametrize("statistic", [None, iqm_statistic])
def test_the_interval_covers_a_known_truth(statistic):
    """95 % intervals of 20 seeds in 3 tasks of a known mean (and, by symmetry, interquartile mean) of 2."""
    rng, covered = np.random.default_rng(4), 0
    options = {} if statistic is None else {"statistic": statistic}
    for case in range(200):
        low, high = bootstrap_interval(rng.normal(2, 1, (3, 20)), resamples=400, seed=case, **options)
        covered += bool(low <= 2 <= high)
    # percentile bootstraps cover slightly less than their level; 200 trials have a standard error of 1.5 points
    assert 0.89 <= covered / 200 <= 0.98


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda: bootstrap_interval(np.array([[1.0]])), "2 seeds"),
        (lambda: bootstrap_interval(np.array([[1.0, 2]]), level=95), "level"),
        (lambda: interquartile_mean(np.array([])), "no scores"),
        (lambda: interquartile_mean(np.array([1.0, np.nan])), "finite"),
        (lambda: paired_difference(np.array([1.0]), np.array([1.0, 2])), "one length"),
        (lambda: paired_difference(np.array([1.0, 2]), np.array([1.0, 2]), level=1.0), "level"),
        (lambda: ratio_of_means(np.array([1.0, 2]), np.array([1.0])), "one length"),
        (lambda: ratio_of_means(np.array([1.0, 2]), np.array([1.0, -1])), "mean of 0"),
        (lambda: probability_of_improvement(np.ones((2, 3)), np.ones((1, 3))), "strata"),
        (lambda: holm(np.array([0.2, 1.2])), "between 0 and 1"),
        (lambda: collapse_rate(np.ones((1, 3)), 2.0), "fraction"),
        (lambda: on_grid(np.array([0.0, 0]), np.array([1.0, 2]), np.array([0.0])), "increasing"),
    ],
)
def test_invalid_input_is_reported(wrong, match):
    with pytest.raises(UserError, match=match):
        wrong()
