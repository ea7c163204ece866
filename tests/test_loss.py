"""The policy loss: hand-computed values, a reference loop, gradients, denominators, degenerate input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_rows import count, off_sampler, random_step, row
from reference_maths import evidence, some_rollouts
from torch import Tensor
from torch.testing import assert_close

from gear_lightning.credit import GEAR, Uniform
from gear_lightning.errors import UserError
from gear_lightning.loss import ClippedSurrogate, LossTerms, SamplerCorrection, clipped_surrogate, sampler_weights

KINDS = [{}, {"aggregation": "sequence_mean"}, {"aggregation": "constant", "constant_length": 7}]


def surrogate(ratios: list[float], advantages: list[float], **options) -> tuple[list[float], list[bool], list[float]]:
    """Return loss, clip flag and gradient per token at these ratios."""
    logprobs = torch.tensor([[math.log(r) for r in ratios]], requires_grad=True)
    options = {"clip_low": 0.2, "clip_high": 0.28, **options}
    loss, clipped = clipped_surrogate(logprobs, torch.zeros_like(logprobs), row(*advantages), **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    return loss[0].tolist(), clipped[0].tolist(), gradient[0].tolist()


def step(
    loss: ClippedSurrogate,
    logprobs: Tensor,
    old: Tensor,
    a: Tensor,
    mask: Tensor,
    sampler: Tensor | None = None,
    **n: int,
) -> LossTerms:
    """Return the loss; by default the sampler agrees with the trainer."""
    counts = {"step_tokens": int(mask.sum()), "step_rollouts": len(mask), **n}
    sampler = old if sampler is None else sampler
    return loss(logprobs, old, a, mask, sampler_logprobs=sampler, **{k: count(v) for k, v in counts.items()})


def test_golden_surrogate():
    # A = 2: -1.2 * 2; at 1.5 the upper bound 1.28: -2.56; at 0.5 the smaller, unbounded one: -1
    loss, clipped, gradient = surrogate([1.2, 1.5, 0.5], [2.0, 2.0, 2.0])
    assert loss == pytest.approx([-2.4, -2.56, -1.0])
    assert clipped == [False, True, False]
    assert gradient == pytest.approx([-2.4, 0, -1.0])  # of -r A in log r
    # A = -2: at 1.5 the larger, unbounded one: 3; at 0.5 the lower bound 0.8: 1.6
    loss, clipped, gradient = surrogate([0.9, 1.5, 0.5], [-2.0, -2.0, -2.0])
    assert loss == pytest.approx([1.8, 3.0, 1.6])
    assert clipped == [False, False, True]
    assert gradient == pytest.approx([1.8, 3.0, 0])


def test_golden_lower_and_upper_bounds_are_separate():
    ratios, plus, minus = [1.21, 0.79, 1.29, 0.71], [1.0] * 4, [-1.0] * 4
    assert surrogate(ratios, plus, clip_low=0.3, clip_high=0.2)[0] == pytest.approx([-1.2, -0.79, -1.2, -0.71])
    assert surrogate(ratios, minus, clip_low=0.3, clip_high=0.2)[0] == pytest.approx([1.21, 0.79, 1.29, 0.71])
    assert surrogate(ratios, minus, clip_low=0.2, clip_high=0.3)[0] == pytest.approx([1.21, 0.8, 1.29, 0.8])
    assert surrogate(ratios, minus, clip_low=0.2, clip_high=0.3)[1] == [False, True, False, True]
    assert surrogate(ratios, plus, clip_low=0.3, clip_high=0.2)[1] == [True, False, True, False]


def test_golden_dual_clip():
    # A = -2, cap 3 * 2 = 6: at ratio 2 still 4, at ratio 5 6 instead of 10; A = 2 is not capped
    loss, clipped, gradient = surrogate([2.0, 5.0, 0.5], [-2.0, -2.0, -2.0], dual_clip=3.0)
    assert loss == pytest.approx([4, 6, 1.6])
    assert clipped == [False, True, True]
    assert gradient == pytest.approx([4, 0, 0])
    assert surrogate([5.0], [2.0], dual_clip=3.0)[0] == surrogate([5.0], [2.0])[0]


def test_golden_aggregation():
    # ratio 1, so the losses are -A: rows -1 -2 (masked) and -6; the step has 5 tokens in 4 rollouts
    a, mask = torch.tensor([[1.0, 2, 9], [6, 9, 9]]), torch.tensor([[True, True, False], [True, False, False]])
    zero = torch.zeros(2, 3)
    expected = [-9 / 5, (-1.5 - 6) / 4, -9 / (4 * 7)]
    for options, value in zip(KINDS, expected, strict=True):
        terms = step(ClippedSurrogate(**options), zero, zero, a, mask, step_tokens=5, step_rollouts=4)
        assert terms.loss.item() == pytest.approx(value)
        assert terms.clipped.item() == 0


def test_golden_clipped_counts_action_tokens():
    logprobs, mask = row(1, 1, 1, -1, 0), torch.tensor([[True, False, True, True, True]])
    terms = step(ClippedSurrogate(), logprobs, torch.zeros(1, 5), row(1, 1, -1, -1, 1), mask)
    assert terms.clipped.item() == 2  # columns 0 and 3; column 1 is not an action token


def test_loss_equals_a_slow_loop():
    for seed in range(200):
        logprobs, old, a, mask = random_step(seed)
        dual = None if seed % 2 else 1.5
        tokens, rollouts = 40 + seed, 10
        per_row, clipped = [], 0
        for i in range(len(mask)):
            losses = []
            for t in mask[i].nonzero()[:, 0].tolist():
                r, adv = math.exp(logprobs[i, t].item() - old[i, t].item()), a[i, t].item()
                value = -min(r * adv, min(max(r, 0.8), 1.28) * adv)
                stopped = r > 1.28 if adv > 0 else r < 0.8
                if dual and adv < 0 and value > -dual * adv:
                    value, stopped = -dual * adv, True
                losses.append(value)
                clipped += stopped
            per_row.append(losses)
        total = math.fsum(math.fsum(x) for x in per_row)
        means = math.fsum(math.fsum(x) / len(x) for x in per_row if x)
        for options, value in zip(KINDS, [total / tokens, means / rollouts, total / (rollouts * 7)], strict=True):
            loss = ClippedSurrogate(dual_clip=dual, **options)
            terms = step(loss, logprobs, old, a, mask, step_tokens=tokens, step_rollouts=rollouts)
            assert terms.loss.item() == pytest.approx(value, abs=1e-6, rel=1e-5)
            assert terms.clipped.item() == clipped


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_gradient_at_ratio_one_is_minus_advantage_over_the_denominator(options, dual_clip):
    logprobs, _, a, mask = random_step(1)
    logprobs.requires_grad_()
    loss = ClippedSurrogate(dual_clip=dual_clip, **options)
    terms = step(loss, logprobs, logprobs.detach(), a, mask, step_tokens=50, step_rollouts=9)
    (gradient,) = torch.autograd.grad(terms.loss, logprobs)
    lengths = mask.sum(-1, keepdim=True).clamp_min(1)
    denominator = {"sequence_mean": lengths * 9, "constant": 9 * 7}.get(loss.aggregation, 50)
    assert_close(gradient, torch.where(mask, -a / denominator, 0))
    assert terms.clipped == 0


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.integers(1, 6), st.integers(0, 4))
def test_any_split_into_micro_batches_gives_the_same_loss_and_gradient(seed, options, size, padding):
    logprobs, old, a, mask = random_step(seed)
    loss, n = ClippedSurrogate(**options), {"step_tokens": max(int(mask.sum()), 1), "step_rollouts": len(mask)}
    logprobs.requires_grad_()
    whole = step(loss, logprobs, old, a, mask, **n)
    (gradient,) = torch.autograd.grad(whole.loss, logprobs)
    parts = []
    for i in range(0, len(mask), size):
        cut = [torch.nn.functional.pad(x[i : i + size], (0, padding)) for x in (logprobs, old, a, mask)]
        parts.append(step(loss, *cut, **n))
    total = torch.stack([p.loss for p in parts]).sum()
    assert_close(total, whole.loss, atol=1e-6, rtol=1e-5)
    assert_close(torch.autograd.grad(total, logprobs)[0], gradient)
    assert sum(p.clipped for p in parts) == whole.clipped


def test_golden_sampler_weights():
    # the trainer's probabilities are 0.5, 1, 1.5 and e^30 times the sampler's; the cap is 1.25
    old, sampler = row(math.log(0.5), 0, math.log(1.5), 30), torch.zeros(1, 4)
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    weights, truncated = sampler_weights(old, sampler, everywhere, None, SamplerCorrection(1.25))
    assert weights[0].tolist() == pytest.approx([0.5, 1, 1.25, 1.25])
    assert truncated[0].tolist() == [False, False, True, True]
    # at ratio 1 the loss of a token is -A: 0.5, 1, 1.25 times -2, and a fourth token that does not count
    mask = torch.tensor([[True, True, True, False]])
    terms = step(ClippedSurrogate(sampler_cap=1.25), old, old, row(2, 2, 2, 9), mask, sampler)
    assert terms.loss.item() == pytest.approx(-2 * 2.75 / 3)
    assert terms.sampler_ratio == pytest.approx(2.75)
    assert terms.sampler_truncated == 1


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("cap", [1.0, 1.3, 5.0])
def test_truncated_importance_sampling_equals_a_slow_loop(options, cap):
    for seed in range(60):
        logprobs, old, a, mask = random_step(seed)
        sampler, dual = off_sampler(seed, old), None if seed % 2 else 1.5
        per_row, ratios, cut = [], [], 0
        for i in range(len(mask)):
            losses = []
            for t in mask[i].nonzero()[:, 0].tolist():
                r, adv = math.exp(logprobs[i, t].item() - old[i, t].item()), a[i, t].item()
                value = -min(r * adv, min(max(r, 0.8), 1.28) * adv)
                if dual and adv < 0:
                    value = min(value, -dual * adv)
                rho = math.exp(old[i, t].item() - sampler[i, t].item())
                cut += rho > cap
                ratios.append(min(rho, cap))
                losses.append(min(rho, cap) * value)
            per_row.append(losses)
        means = math.fsum(math.fsum(x) / len(x) for x in per_row if x)
        total = math.fsum(math.fsum(x) for x in per_row)
        expected = {"sequence_mean": means / 10, "constant": total / 70}.get(options.get("aggregation"), total / 50)
        loss = ClippedSurrogate(dual_clip=dual, sampler_cap=cap, **options)
        terms = step(loss, logprobs, old, a, mask, sampler, step_tokens=50, step_rollouts=10)
        assert terms.loss.item() == pytest.approx(expected, abs=1e-6, rel=1e-5)
        assert terms.sampler_ratio.item() == pytest.approx(math.fsum(ratios), rel=1e-5)
        assert terms.sampler_truncated == cut


@pytest.mark.parametrize("options", KINDS)
def test_gradient_under_truncated_importance_sampling_is_the_plain_one_times_the_weight(options):
    logprobs, old, a, mask = random_step(3)
    sampler, counts = off_sampler(3, old), {"step_tokens": 50, "step_rollouts": 9}
    logprobs.requires_grad_()
    plain = step(ClippedSurrogate(**options), logprobs, old, a, mask, **counts)
    (expected,) = torch.autograd.grad(plain.loss, logprobs)
    terms = step(ClippedSurrogate(sampler_cap=1.5, **options), logprobs, old, a, mask, sampler, **counts)
    (gradient,) = torch.autograd.grad(terms.loss, logprobs)
    weight = (old - sampler).exp().clamp_max(1.5)
    assert (weight != 1).any()
    assert_close(gradient, expected * weight)
    assert not terms.sampler_ratio.requires_grad


def test_gradient_under_truncated_importance_sampling_equals_finite_differences():
    logprobs, old, a, mask = (x.double() if x.is_floating_point() else x for x in random_step(4))
    sampler = off_sampler(4, old.float()).double()
    loss = ClippedSurrogate(sampler_cap=1.5)

    def value(x: Tensor) -> Tensor:
        return step(loss, x, old, a, mask, sampler).loss

    assert torch.autograd.gradcheck(value, (logprobs.requires_grad_(),))


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([None, 3.0]), st.floats(1, 10))
def test_an_agreeing_sampler_leaves_the_loss_bitwise_unchanged(seed, options, dual_clip, cap):
    logprobs, old, a, mask = random_step(seed)
    logprobs.requires_grad_()
    plain = step(ClippedSurrogate(dual_clip=dual_clip, **options), logprobs, old, a, mask)
    terms = step(ClippedSurrogate(dual_clip=dual_clip, sampler_cap=cap, **options), logprobs, old, a, mask, old)
    assert torch.equal(terms.loss, plain.loss)
    assert torch.equal(*(torch.autograd.grad(x.loss, logprobs)[0] for x in (terms, plain)))
    assert terms.sampler_ratio == mask.sum()
    assert terms.sampler_truncated == 0
    assert plain.sampler_ratio is plain.sampler_truncated is None


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(1, 4), st.floats(0, 40))
def test_truncated_weights_are_bounded_grow_with_the_cap_and_ignore_masked_tokens(seed, cap, spread):
    logprobs, old, a, mask = random_step(seed)
    sampler = off_sampler(seed, old, spread)
    weights, truncated = sampler_weights(old, sampler, mask, None, SamplerCorrection(cap))
    assert (weights > 0).all()
    assert (weights <= cap).all()
    assert torch.equal(truncated, weights < torch.where(mask, old - sampler, 0).clamp(-20, 20).exp())
    assert (sampler_weights(old, sampler, mask, None, SamplerCorrection(cap + 1))[0] >= weights).all()
    loss = ClippedSurrogate(sampler_cap=cap)
    junk = torch.where(mask, sampler, -1e30)
    ours, theirs = step(loss, logprobs, old, a, mask, sampler), step(loss, logprobs, old, a, mask, junk)
    assert torch.equal(ours.loss, theirs.loss)
    assert ours.sampler_truncated == theirs.sampler_truncated


@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_split_gives_the_same_loss_under_truncated_importance_sampling(size):
    logprobs, old, a, mask = random_step(5)
    sampler, n = off_sampler(5, old), {"step_tokens": max(int(mask.sum()), 1), "step_rollouts": len(mask)}
    for options in KINDS:
        loss = ClippedSurrogate(sampler_cap=1.5, **options)
        whole = step(loss, logprobs, old, a, mask, sampler, **n)
        cuts = [slice(i, i + size) for i in range(0, len(mask), size)]
        parts = [step(loss, *(x[cut] for x in (logprobs, old, a, mask, sampler)), **n) for cut in cuts]
        assert_close(torch.stack([p.loss for p in parts]).sum(), whole.loss, atol=1e-6, rtol=1e-5)
        assert sum(p.sampler_truncated for p in parts) == whole.sampler_truncated


def test_golden_sampler_weights_of_turns_and_rollouts():
    # ratios 2, 2 | 0.25, 0.5 in two turns; the last token does not count
    old, sampler = row(math.log(2), math.log(2), math.log(0.25), math.log(0.5), 30), torch.zeros(1, 5)
    mask, turns = torch.tensor([[True] * 4 + [False]]), torch.tensor([[0, 0, 1, 1, -1]])

    def weights(**options) -> list[float]:
        found, _ = sampler_weights(old, sampler, mask, turns, SamplerCorrection(**options))
        return found[0, :4].tolist()

    assert weights(cap=10.0, level="turn") == pytest.approx([4, 4, 0.125, 0.125])
    assert weights(cap=3.0, level="turn") == pytest.approx([3, 3, 0.125, 0.125])
    assert weights(cap=10.0, level="sequence") == pytest.approx([0.5] * 4)
    assert weights(cap=1.5, outside="mask") == pytest.approx([0, 0, 0.25, 0.5])
    assert weights(cap=3.0, outside="mask", floor=0.3) == pytest.approx([2, 2, 0, 0.5])
    assert weights(cap=3.0, level="turn", outside="mask", floor=0.1) == pytest.approx([0, 0, 0.125, 0.125])


@settings(deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from(["token", "turn", "sequence"]), st.sampled_from(["truncate", "mask"]),
    st.floats(1, 5), st.floats(0, 0.99),
)  # fmt: skip
def test_sampler_weights_of_every_level_equal_a_slow_loop(seed, level, outside, cap, floor):
    _, old, _, mask = random_step(seed)
    sampler = off_sampler(seed, old, 0.3)
    turns = torch.randint(0, 3, mask.shape, generator=torch.Generator().manual_seed(seed)).sort(-1).values
    turns = torch.where(mask, turns, -1)
    correction = SamplerCorrection(cap, level, outside, floor if outside == "mask" else 0.0)
    weights, limited = sampler_weights(old, sampler, mask, turns, correction)
    for i, t in mask.nonzero().tolist():
        same = {"token": [t], "turn": (turns[i] == turns[i, t]).nonzero()[:, 0], "sequence": mask[i].nonzero()[:, 0]}
        total = math.fsum((old[i, s] - sampler[i, s]).item() for s in same[level])
        ratio = math.exp(min(max(total, -20.0), 20.0))
        if min(abs(ratio - cap), abs(ratio - correction.floor)) < 1e-4:
            continue  # rounding decides
        out = ratio > cap or ratio < correction.floor
        expected = (0.0 if outside == "mask" else cap) if out else ratio
        assert weights[i, t].item() == pytest.approx(expected, rel=1e-4)
        assert bool(limited[i, t]) == out


def test_a_masked_token_counts_only_in_the_denominator():
    old, sampler = row(math.log(4), 0), torch.zeros(1, 2)
    logprobs = old.clone().requires_grad_()
    loss = ClippedSurrogate(sampler_cap=2.0, sampler_outside="mask")
    terms = step(loss, logprobs, old, row(1, 1), torch.ones(1, 2, dtype=torch.bool), sampler)
    terms.loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([0, -0.5])
    assert terms.sampler_truncated == 1


def test_masked_tokens_have_no_effect():
    logprobs, old, a, mask = random_step(2)
    loss = ClippedSurrogate()
    junk = [torch.where(mask, x, y) for x, y in ((logprobs, 5.0), (old, -30.0), (a, 1e9))]
    assert torch.equal(step(loss, *junk, mask).loss, step(loss, logprobs, old, a, mask).loss)
    logprobs = junk[0].requires_grad_()
    step(loss, logprobs, junk[1], junk[2], mask).loss.backward()
    assert logprobs.grad is not None
    assert (logprobs.grad[~mask] == 0).all()


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("off_policy", [0.0, 0.5])
def test_weight_one_gives_grpo_bit_for_bit(options, off_policy):
    for seed in range(20):
        e = evidence(some_rollouts(seed))
        g = torch.Generator().manual_seed(seed)
        old = e.policy.logprobs + off_policy * torch.randn(e.policy.logprobs.shape, generator=g)
        # teacher = policy; kappa 0; decayed to 0; no teacher; plain GRPO by hand
        same = type(e)(**{**vars(e), "teacher": e.policy})
        late = type(e)(**{**vars(e), "policy_version": torch.full_like(e.policy_version, 9)})
        credits = (GEAR()(same), GEAR(kappa=0.0)(e), GEAR(mix_decay=9)(late), Uniform()(e))
        plain = e.advantages[:, None] * e.action_mask
        results = []
        for advantages in (*(c.token_advantages for c in credits), plain):
            logprobs = e.policy.logprobs.clone().requires_grad_()
            terms = step(ClippedSurrogate(**options), logprobs, old, advantages, e.action_mask)
            results.append((terms.loss.detach(), *torch.autograd.grad(terms.loss, logprobs)))
        for loss, gradient in results[:-1]:
            assert torch.equal(loss, results[-1][0])
            assert torch.equal(gradient, results[-1][1])


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("gap", [0.0, 25.0, 90.0, 1e4, -25.0, -90.0, -1e4])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_huge_log_ratios_give_finite_losses(options, dual_clip, gap, advantage):
    logprobs = torch.full((2, 3), gap, requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    a = torch.where(mask, advantage, 0.0)
    terms = step(ClippedSurrogate(dual_clip=dual_clip, **options), logprobs, torch.zeros(2, 3), a, mask)
    terms.loss.backward()
    assert terms.loss.isfinite()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
    if abs(gap) > 20:
        assert (logprobs.grad == 0).all()
        assert terms.clipped == (2 if advantage else 0)


@pytest.mark.parametrize("options", KINDS)
def test_a_loss_without_action_tokens_has_a_gradient_of_zero(options):
    # a rank without action tokens takes part in the step, even if the whole step has none
    logprobs = torch.zeros(1, 2, requires_grad=True)
    none = torch.zeros(1, 2, dtype=torch.bool)
    loss = ClippedSurrogate(**options)
    terms = step(loss, logprobs, torch.zeros(1, 2), torch.zeros(1, 2), none, step_tokens=0, step_rollouts=0)
    assert terms.loss.item() == terms.clipped.item() == 0
    terms.loss.backward()
    assert (logprobs.grad == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_low": 0.0}, r"clip_low=0.0 must lie in \(0, 1\]"),
        ({"clip_low": 1.5}, r"clip_low=1.5 must lie in \(0, 1\]"),
        ({"clip_high": 0.0}, "clip_high=0.0 be above 0"),
        ({"dual_clip": 1.0}, "dual_clip=1.0 must be above 1"),
        ({"clip_high": math.inf}, "clip_high=inf be above 0, and finite"),
        ({"dual_clip": math.nan}, "dual_clip=nan must be above 1 and finite"),
        ({"dual_clip": math.inf}, "dual_clip=inf must be above 1 and finite"),
        ({"sampler_cap": math.inf}, "sampler_cap=inf must be at least 1 and finite"),
        ({"sampler_cap": 0.9}, "sampler_cap=0.9 must be at least 1"),
        ({"sampler_cap": math.nan}, "sampler_cap=nan must be at least 1"),
        ({"sampler_level": "turn"}, "sampler_level=turn and .* do nothing without sampler_cap"),
        ({"sampler_outside": "mask"}, "sampler_outside=mask do nothing without sampler_cap"),
        ({"sampler_cap": 2.0, "sampler_floor": 0.5}, "sampler_floor=0.5 does nothing without .* sampler_outside=mask"),
        ({"sampler_cap": 2.0, "sampler_outside": "mask", "sampler_floor": 1.0}, "sampler_floor=1.0 must be at least 0"),
        ({"aggregation": "constant"}, "aggregation=constant and constant_length go together"),
        ({"constant_length": 5}, "aggregation=constant and constant_length go together"),
        ({"aggregation": "constant", "constant_length": 0}, "constant_length=0 must be at least 1 token"),
    ],
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(UserError, match=message):
        ClippedSurrogate(**options)
