"""Group advantages: hand-computed values, a reference implementation, invariances, and groups without a signal."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from gear_lightning.advantage import GRPO, DrGRPO, GroupAdvantage, LeaveOneOut, has_spread
from gear_lightning.errors import UserError

RULES = [GRPO(), DrGRPO(), LeaveOneOut()]
# on a grid, so that shifting and scaling is exact
REWARDS = st.lists(st.integers(-64, 64).map(lambda n: n / 16), min_size=2, max_size=16)


def group(*rewards: float) -> torch.Tensor:
    return torch.tensor(rewards, dtype=torch.float32)


def test_golden_grpo():
    # mean 0.25, deviations 0.75 and -0.25 (three times); variance (0.5625 + 3 * 0.0625) / 3 = 0.25, std 0.5
    assert_close(GRPO()(group(1, 0, 0, 0)), group(1.5, -0.5, -0.5, -0.5), atol=4e-6, rtol=0)
    assert_close(GRPO(eps=0.5)(group(1, 0, 0, 0)), group(0.75, -0.25, -0.25, -0.25))  # 0.5 + 0.5 = 1


def test_golden_dr_grpo():
    assert DrGRPO()(group(1, 0, 0, 0)).tolist() == [0.75, -0.25, -0.25, -0.25]
    assert DrGRPO()(group(3, 1)).tolist() == [1, -1]


def test_golden_leave_one_out():
    # means of the others: 0, 1/3; of 1 2 6: 4, 3.5, 1.5
    assert_close(LeaveOneOut()(group(1, 0, 0, 0)), group(1, -1 / 3, -1 / 3, -1 / 3))
    assert_close(LeaveOneOut()(group(1, 2, 6)), group(-3, -1.5, 4.5))


@settings(deadline=None)
@given(REWARDS)
def test_advantages_equal_a_plain_python_reference(rewards):
    got = [rule(group(*rewards)) for rule in RULES]
    n, mean, std = len(rewards), statistics.fmean(rewards), statistics.stdev(rewards)
    if std == 0:
        assert all((a == 0).all() for a in got)
        return
    oracles = (
        [(r - mean) / (std + 1e-6) for r in rewards],
        [r - mean for r in rewards],
        [r - (math.fsum(rewards) - r) / (n - 1) for r in rewards],
    )
    for a, oracle in zip(got, oracles, strict=True):
        assert_close(a, group(*oracle), atol=3e-6, rtol=1e-5)


@settings(deadline=None)
@given(REWARDS, st.randoms(use_true_random=False), st.integers(-5, 5))
def test_advantages_satisfy_their_invariances(rewards, rng, shift):
    order = rng.sample(range(len(rewards)), len(rewards))
    r = group(*rewards)
    for rule in RULES:
        a = rule(r)
        assert_close(rule(r[order]), a[order], atol=3e-6, rtol=1e-5)
        assert_close(rule(r + shift), a, atol=3e-6, rtol=1e-5)  # the baseline removes a constant
        assert_close(rule(-r), -a, atol=3e-6, rtol=1e-5)
        assert a.double().sum().item() == pytest.approx(0, abs=1e-4)
        best, worst = r.argmax(), r.argmin()
        assert a[best] >= 0 >= a[worst]
        assert (a[best] > 0) == has_spread(r)
    assert_close(LeaveOneOut()(r), DrGRPO()(r) * len(rewards) / (len(rewards) - 1), atol=3e-6, rtol=1e-5)


def test_only_grpo_is_invariant_to_scale():
    r = group(1, 0, 0.5, 0)
    assert_close(GRPO()(8 * r), GRPO()(r), atol=1e-5, rtol=0)
    assert_close(DrGRPO()(8 * r), 8 * DrGRPO()(r))
    assert_close(LeaveOneOut()(8 * r), 8 * LeaveOneOut()(r))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, 1e-8, 3.7e7, -0.7])
@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 11, 64])
def test_equal_rewards_give_exactly_zero(rule, value, n):
    assert rule(torch.full((n,), value)).tolist() == [0.0] * n


def test_the_standard_deviation_of_equal_rewards_need_not_be_zero():
    # the reason to compare for equality: the standard deviation of equal floats need not be 0
    noisy = [n for n in range(2, 40) if torch.full((n,), 0.1).std() > 0]
    assert noisy
    for n in noisy:
        assert not has_spread(torch.full((n,), 0.1))
        assert (GRPO(eps=0.0)(torch.full((n,), 0.1)) == 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_advantages_of_degenerate_groups_are_finite(rule):
    assert rule(group()).tolist() == []
    assert rule(group(5)).tolist() == [0]
    for rewards in ((1, 1 + 2e-7), (1e-20, 0), (3e7, -3e7, 0)):
        assert rule(group(*rewards)).isfinite().all()
    assert has_spread(group(1, 1 + 2e-7))


@pytest.mark.parametrize("rule", RULES)
def test_too_small_groups_are_rejected(rule):
    rule.check_group_size(2)
    with pytest.raises(UserError, match=f"group_size=1: {type(rule).__name__} needs rollouts to compare; use at least"):
        rule.check_group_size(1)


def test_a_custom_rule_can_be_used():
    class Raw(GroupAdvantage):
        min_group = 1

        def __call__(self, rewards):
            return rewards

    Raw().check_group_size(1)
    assert Raw()(group(2)).tolist() == [2]
