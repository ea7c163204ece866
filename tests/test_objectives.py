"""GSPO and CISPO: hand-computed values and gradients, a slow reference, micro-batches, masks, options, a run."""

import csv
import math

import pytest
import torch
from every_rule import watched
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_rows import count, off_sampler, random_step, row
from tiny_runs import data, module
from torch import Tensor
from torch.testing import assert_close

from gear_lightning.credit import Uniform
from gear_lightning.errors import UserError
from gear_lightning.loss import CISPO, GSPO, ClippedSurrogate, LossTerms, PolicyLoss, TokenLoss

WIDE = {"clip_low": 0.2, "clip_high": 0.28}
KINDS = [
    {"aggregation": "token_mean"},
    {"aggregation": "sequence_mean"},
    {"aggregation": "constant", "constant_length": 7},
]
RULES: list[tuple[type[TokenLoss], dict]] = [
    (GSPO, WIDE),
    (GSPO, {"clip_low": 0.05, "clip_high": 0.02}),
    (CISPO, {"clip_high": 0.28}),
    (CISPO, WIDE),
]


def run(loss: PolicyLoss, logprobs: Tensor, old: Tensor, a: Tensor, mask: Tensor, sampler=None, **n: int) -> LossTerms:
    """Return the loss; by default the sampler agrees with the trainer."""
    n = {"step_tokens": int(mask.sum()), "step_rollouts": len(mask), **n}
    sampler = old if sampler is None else sampler
    return loss(logprobs, old, a, mask, sampler_logprobs=sampler, **{k: count(v) for k, v in n.items()})


def solved(loss: PolicyLoss, logprobs: Tensor, *rest: Tensor, **n: int) -> tuple[float, list[list[float]], float]:
    """Return loss, gradient per token and number of clipped tokens."""
    logprobs = logprobs.clone().requires_grad_()
    terms = run(loss, logprobs, *rest, **n)
    (gradient,) = torch.autograd.grad(terms.loss, logprobs)
    return terms.loss.item(), gradient.tolist(), terms.clipped.item()


# hand-computed --------------------------------------------------------------------------------------------------------


def test_golden_gspo():
    # rollout 1: token ratios 2, 1 and a masked 100: s = sqrt(2) = 1.41421, above 1.28
    #   A = 1: -min(s, 1.28) = -1.28, clipped; A = -1: -min(-s, -1.28) = 1.41421, gradient -s A = 1.41421
    # rollout 2: ratios 1/2, 1/8, 1/2 and A = 3, -1, 1: s = 2^(-5/3) = 0.31498, below 0.8
    #   3: -0.94494, gradient the same; -1: -min(-s, -0.8) = 0.8, clipped; 1: -0.31498
    logprobs = torch.tensor([[2, 1, 100], [0.5, 0.125, 0.5]]).log() - 2
    old, a = torch.full((2, 3), -2.0), torch.tensor([[1.0, -1, 5], [3, -1, 1]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    value, gradient, clipped = solved(GSPO(**WIDE), logprobs, old, a, mask)
    # the mean over a rollout's tokens, then over the two rollouts
    first, second = (-1.28 + 1.41421) / 2, (-0.94494 + 0.8 - 0.31498) / 3
    assert value == pytest.approx((first + second) / 2, abs=1e-5)
    assert gradient[0] == pytest.approx([0, 1.41421 / 4, 0], abs=1e-5)
    assert gradient[1] == pytest.approx([-0.94494 / 6, 0, -0.31498 / 6], abs=1e-5)
    assert clipped == 2


def test_golden_gspo_bounds_of_the_paper():
    # two tokens whose mean log-ratios are 3.5e-4, 4.5e-4, -2.5e-4 and -3.5e-4
    means = torch.tensor([3.5e-4, 4.5e-4, -2.5e-4, -3.5e-4])[:, None]
    logprobs = torch.cat([means + 0.5, means - 0.5], 1)
    mask = torch.ones(4, 2, dtype=torch.bool)
    for advantage, stopped in ((1.0, [False, True, False, False]), (-1.0, [False, False, False, True])):
        _, gradient, clipped = solved(GSPO(), logprobs, torch.zeros(4, 2), torch.full((4, 2), advantage), mask)
        assert [g == [0, 0] for g in gradient] == stopped
        assert clipped == 2


def test_golden_cispo():
    # p = 0.5, 0.5, 0.25, 0.8 with ratios 2, 0.5, 1, 8; A = 1, -2, 3, 9; upper bound 1.28, no lower bound:
    # -w A log p = -1.28 * 1 * -0.69315 = 0.88723; 0.5 * -2 * 0.69315 = -0.69315; 3 * 1.38629 = 4.15888; the last masked
    logprobs, mask = row(0.5, 0.5, 0.25, 0.8).log(), torch.tensor([[True, True, True, False]])
    old, a = logprobs - row(2, 0.5, 1, 8).log(), row(1, -2, 3, 9)
    value, gradient, clipped = solved(CISPO(clip_high=0.28), logprobs, old, a, mask)
    assert value == pytest.approx((0.88723 - 0.69315 + 4.15888) / 3, abs=1e-5)
    assert gradient[0] == pytest.approx([-1.28 / 3, 1 / 3, -1, 0])  # -w A / 3 tokens, also where w was clipped
    assert clipped == 1
    # with a lower bound of 0.8 the second token has a larger weight: 0.8 * -2 * 0.69315
    value, gradient, clipped = solved(CISPO(clip_low=0.2, clip_high=0.28), logprobs, old, a, mask)
    assert value == pytest.approx((0.88723 - 1.10904 + 4.15888) / 3, abs=1e-5)
    assert gradient[0] == pytest.approx([-1.28 / 3, 1.6 / 3, -1, 0])
    assert clipped == 2


def test_cispo_keeps_the_gradient_that_the_surrogate_clips():
    logprobs, old, a, mask = row(-1.0), row(-3.0), row(1.0), torch.tensor([[True]])
    assert solved(ClippedSurrogate(), logprobs, old, a, mask)[1] == [[0]]
    assert solved(CISPO(), logprobs, old, a, mask)[1] == [[-5]]  # r = e^2 = 7.4, clipped to 1 + 4


# a slow reference -----------------------------------------------------------------------------------------------------


def slow(kind, low, high, logprobs, old, a, mask, weights) -> tuple[list[list[float]], list[list[float]], int]:
    """Return losses and gradients of the tokens that count, row by row, and the number of clipped tokens."""
    losses, gradients, clipped = [], [], 0
    for i in range(len(mask)):
        places = mask[i].nonzero()[:, 0].tolist()
        gaps = [logprobs[i, t].item() - old[i, t].item() for t in places]
        one_row, slope = [], []
        for t, gap in zip(places, gaps, strict=True):
            adv, w = a[i, t].item(), weights[i, t].item()
            if kind is GSPO:
                s = math.exp(math.fsum(gaps) / len(gaps))
                bound = min(max(s, 1 - low), 1 + high)
                stopped = s * adv > bound * adv
                one_row.append(-w * min(s * adv, bound * adv))
                slope.append(0.0 if stopped else -w * s * adv)
            else:
                r = math.exp(gap)
                bound = min(r, 1 + high) if low is None else min(max(r, 1 - low), 1 + high)
                stopped = bound != r
                one_row.append(-w * bound * adv * logprobs[i, t].item())
                slope.append(-w * bound * adv)
            clipped += stopped
        losses.append(one_row)
        gradients.append(slope)
    return losses, gradients, clipped


@pytest.mark.parametrize(("kind", "bounds"), RULES)
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("cap", [None, 1.3])
def test_losses_equal_a_slow_loop(kind, bounds, options, cap):
    for seed in range(40):
        logprobs, old, a, mask = random_step(seed)
        sampler = off_sampler(seed, old)
        weights = torch.ones_like(old) if cap is None else (old - sampler).exp().clamp_max(cap)
        loss = kind(sampler_cap=cap, **bounds, **options)
        losses, slopes, clipped = slow(kind, loss.clip_low, loss.clip_high, logprobs, old, a, mask, weights)
        lengths = [{"token_mean": 50, "sequence_mean": 10 * len(x), "constant": 70}[loss.aggregation] for x in losses]
        value = math.fsum(v / n for x, n in zip(losses, lengths, strict=True) for v in x)
        got, gradient, count_clipped = solved(loss, logprobs, old, a, mask, sampler, step_tokens=50, step_rollouts=10)
        assert got == pytest.approx(value, abs=2e-6, rel=1e-5)
        assert count_clipped == clipped
        for i, (x, n) in enumerate(zip(slopes, lengths, strict=True)):
            row_gradient = torch.tensor(gradient[i])
            assert row_gradient[mask[i]].tolist() == pytest.approx([v / n for v in x], abs=2e-6, rel=1e-5)
            assert (row_gradient[~mask[i]] == 0).all()


def test_gspos_token_form_has_the_gradient_of_the_sequence_form():
    """Finite differences in double precision: all log-probs of a rollout change together, with one advantage."""
    logprobs, old, _, mask = (x.double() if x.is_floating_point() else x for x in random_step(7))
    a = torch.full_like(old, 0.7)
    loss = GSPO(clip_low=0.99, clip_high=50.0)
    _, gradient, _ = solved(loss, logprobs, old, a, mask)
    for i in range(1, len(mask)):
        if not mask[i].any():
            continue
        step = torch.zeros_like(logprobs)
        step[i] = 1e-5
        up, down = (run(loss, logprobs + d, old, a, mask).loss.item() for d in (step, -step))
        assert sum(gradient[i]) == pytest.approx((up - down) / 2e-5, rel=1e-6)


# invariants -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
def test_at_ratio_one_every_objective_has_the_same_gradient(options):
    """-A divided by the denominator: in the first inner epoch only the aggregation makes a difference."""
    logprobs, _, a, mask = random_step(1)
    counts = {"step_tokens": 50, "step_rollouts": 9}
    denominator = {
        "token_mean": torch.tensor(50),
        "sequence_mean": mask.sum(-1, keepdim=True).clamp_min(1) * 9,
        "constant": torch.tensor(9 * 7),
    }[options["aggregation"]]
    for kind in (ClippedSurrogate, GSPO, CISPO):
        _, gradient, clipped = solved(kind(**options), logprobs, logprobs, a, mask, **counts)
        assert_close(torch.tensor(gradient), torch.where(mask, -a / denominator, 0))
        assert clipped == 0


def test_gspo_of_one_token_is_the_clipped_surrogate():
    for seed in range(20):
        logprobs, old, a, _ = random_step(seed)
        mask = torch.nn.functional.one_hot(torch.arange(len(a)), a.shape[1]).bool()
        kinds = GSPO(**WIDE), ClippedSurrogate(aggregation="sequence_mean", **WIDE)
        (value, gradient, clipped), (plain, plain_gradient, plain_clipped) = (
            solved(kind, logprobs, old, a, mask) for kind in kinds
        )
        assert value == pytest.approx(plain, abs=1e-6)
        assert_close(torch.tensor(gradient), torch.tensor(plain_gradient))
        assert clipped == plain_clipped


def test_defaults_are_those_of_the_papers():
    assert (GSPO().clip_low, GSPO().clip_high, GSPO().aggregation) == (3e-4, 4e-4, "sequence_mean")
    assert (CISPO().clip_low, CISPO().clip_high, CISPO().aggregation) == (None, 4.0, "token_mean")


@settings(deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from(RULES), st.sampled_from(KINDS), st.integers(1, 6), st.integers(0, 4),
    st.sampled_from([None, 1.5]),
)  # fmt: skip
def test_any_split_into_micro_batches_gives_the_same_loss_and_gradient(seed, rule, options, size, padding, cap):
    logprobs, old, a, mask = random_step(seed)
    sampler = off_sampler(seed, old)
    kind, bounds = rule
    loss = kind(sampler_cap=cap, **bounds, **options)
    n = {"step_tokens": max(int(mask.sum()), 1), "step_rollouts": len(mask)}
    logprobs.requires_grad_()
    whole = run(loss, logprobs, old, a, mask, sampler, **n)
    (gradient,) = torch.autograd.grad(whole.loss, logprobs)
    parts = []
    for i in range(0, len(mask), size):
        cut = [torch.nn.functional.pad(x[i : i + size], (0, padding)) for x in (logprobs, old, a, mask, sampler)]
        parts.append(run(loss, *cut, **n))
    total = torch.stack([p.loss for p in parts]).sum()
    assert_close(total, whole.loss, atol=2e-6, rtol=1e-5)
    assert_close(torch.autograd.grad(total, logprobs)[0], gradient)
    assert sum(p.clipped for p in parts) == whole.clipped


@pytest.mark.parametrize(("kind", "bounds"), RULES)
def test_masked_tokens_have_no_effect_and_no_gradient(kind, bounds):
    logprobs, old, a, mask = random_step(2)
    loss = kind(sampler_cap=2.0, **bounds)
    junk = [torch.where(mask, x, y) for x, y in ((logprobs, 5.0), (old, -3e4), (a, 1e9))]
    assert torch.equal(run(loss, *junk, mask).loss, run(loss, logprobs, old, a, mask).loss)
    _, gradient, _ = solved(loss, *junk, mask)
    assert (torch.tensor(gradient)[~mask] == 0).all()
    assert (torch.tensor(gradient)[mask] != 0).any()


@pytest.mark.parametrize("kind", [GSPO, CISPO])
@pytest.mark.parametrize("gap", [25.0, 90.0, 1e4, -25.0, -90.0, -1e4])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_huge_log_ratios_give_finite_losses(kind, gap, advantage):
    mask = torch.tensor([[True, True, False], [False, False, False]])
    a = torch.where(mask, advantage, 0.0)
    value, gradient, _ = solved(kind(), torch.full((2, 3), gap), torch.zeros(2, 3), a, mask)
    assert math.isfinite(value)
    assert torch.tensor(gradient).isfinite().all()


@pytest.mark.parametrize("kind", [GSPO, CISPO])
def test_a_loss_without_action_tokens_has_a_gradient_of_zero(kind):
    none = torch.zeros(1, 2, dtype=torch.bool)
    empty = torch.zeros(1, 2)
    value, gradient, clipped = solved(kind(), empty, empty, empty, none, step_tokens=0, step_rollouts=0)
    assert value == clipped == 0
    assert gradient == [[0, 0]]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (GSPO, {"clip_low": 0.0}, r"GSPO: clip_low=0.0 must lie in \(0, 1\]"),
        (GSPO, {"clip_high": -1.0}, "clip_high=-1.0 be above 0"),
        (GSPO, {"aggregation": "constant"}, "aggregation=constant and constant_length go together"),
        (CISPO, {"clip_low": 1.5}, r"CISPO: clip_low=1.5 must lie in \(0, 1\]"),
        (CISPO, {"clip_high": 0.0}, "clip_high=0.0 be above 0"),
        (CISPO, {"clip_high": math.inf}, "clip_high=inf be above 0, and finite"),
        (CISPO, {"constant_length": 5}, "aggregation=constant and constant_length go together"),
        (CISPO, {"sampler_cap": 0.5}, "sampler_cap=0.5 must be at least 1"),
    ],
)
def test_invalid_options_are_rejected(kind, options, message):
    with pytest.raises(UserError, match=message):
        kind(**options)


# a run ----------------------------------------------------------------------------------------------------------------


def trained(run_folder, objective: PolicyLoss, **options):
    watch = watched(run_folder, module(Uniform(), objective=objective), data(**options), max_epochs=2)
    with (run_folder / "metrics.csv").open() as file:
        return watch.weights, [float(r["train/clip_fraction"]) for r in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("objective", "aggregation"), [(GSPO(), "sequence_mean"), (CISPO(clip_high=0.01), "token_mean")]
)
def test_a_run_differs_from_the_clipped_surrogate_from_the_second_inner_epoch_on(tmp_path, objective, aggregation):
    ours, clipped = trained(tmp_path / "a", objective, inner_epochs=2)
    plain, _ = trained(tmp_path / "b", ClippedSurrogate(aggregation=aggregation), inner_epochs=2)
    for mine, other in zip(ours[1], plain[1], strict=True):  # after the first optimizer step
        assert_close(mine, other, atol=1e-5, rtol=1e-4)
    assert any(not torch.allclose(m, o, atol=1e-4) for m, o in zip(ours[2], plain[2], strict=True))
    assert all(0 < c < 1 for c in clipped), "half of the tokens are in the first inner epoch, where none is clipped"
