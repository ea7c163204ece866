"""Invariants of every credit assigner: changes that must not affect credit, and sums that credit must not change."""

import math
import random
from dataclasses import replace

import pytest
import torch
from every_rule import BF16, FLOAT32, every_rule, knowing_noise, null_evidence, rule_classes
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_maths import (
    LISTED,
    SAMPLED,
    SEEDS,
    evidence,
    on_actions,
    random_rule,
    rollout,
    some_rollouts,
    with_turn_advantages,
)
from torch.testing import assert_close

from gear_lightning.credit import (
    CREST,
    EGRSD,
    GEAR,
    GTPO,
    PBSD,
    RLSD,
    SCGRPO,
    CreditAssigner,
    Oracle,
    Placebo,
    RoundingNoise,
    TokenOnly,
    Turn,
    TurnSight,
    Uniform,
)

RANDOM = [GEAR, GEAR, Turn, TokenOnly, Placebo]  # with random options
COMPARING = [RLSD, EGRSD, CREST, TurnSight, PBSD, Uniform]  # all weights are 1 if teacher and policy agree
OTHERS = [GTPO, Oracle]


@st.composite
def any_rule(draw, kinds=(*RANDOM, *COMPARING, *OTHERS)) -> CreditAssigner:
    rng = random.Random(draw(SEEDS))
    kind = draw(st.sampled_from(kinds))
    if kind not in RANDOM:
        return kind()
    return random_rule(rng, SAMPLED, kind, **({"segment_end": "none"} if kind is TokenOnly else {}))


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert_close(a, b, atol=1e-6, rtol=1e-5)


@settings(deadline=None)
@given(any_rule(), SEEDS)
def test_masked_tokens_can_be_removed(rule, seed):
    if isinstance(rule, Placebo):
        rule = GEAR()  # the seed of a permutation depends on token positions
    rows = some_rollouts(seed)
    whole, cut = evidence(rows), evidence([r.only(r.actions) for r in rows], padding=1)
    a, b = rule(whole), rule(cut)
    for i, r in enumerate(rows):
        n = len(r.actions)
        same(a.weights[i, r.actions], b.weights[i, :n])
        same(a.token_advantages[i, r.actions], b.token_advantages[i, :n])
        place = {t: j for j, t in enumerate(r.actions)} | {-1: -1}
        assert [place[t] for t in a.anchor[i, r.actions].tolist()] == b.anchor[i, :n].tolist()


@settings(deadline=None)
@given(any_rule(), SEEDS, st.integers(1, 9))
def test_padding_micro_batches_and_order_do_not_change_credit(rule, seed, padding):
    rows = some_rollouts(seed)
    width = max(len(r.turns) for r in rows)
    whole = rule(evidence(rows))
    padded = rule(evidence(rows, padding))
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    shuffled = rule(evidence([rows[i] for i in order]))
    for name in ("weights", "token_advantages", "divergence", "anchor"):
        full = getattr(whole, name)
        same(getattr(padded, name)[:, :width], full)
        same(getattr(shuffled, name), full[order])
        for i, r in enumerate(rows):
            same(getattr(rule(evidence([r])), name)[0], full[i, : len(r.turns)])


@settings(deadline=None)
@given(any_rule(), SEEDS)
def test_signs_and_the_sum_of_credit_are_preserved(rule, seed):
    e = evidence(some_rollouts(seed))
    credit = rule(e)
    given_sign = torch.where(e.action_mask, e.advantages.sign()[:, None], 0)
    assert torch.equal(credit.token_advantages.sign(), given_sign)
    assert (credit.weights >= 0).all()
    if getattr(rule, "normalise", None) == "mean":
        for w in on_actions(credit, e):
            if w:
                assert math.fsum(w) / len(w) == pytest.approx(1, abs=2e-6)
    if getattr(rule, "normalise", None) == "geometric":
        for w in on_actions(credit, e):
            assert math.fsum(map(math.log, w)) / max(len(w), 1) == pytest.approx(0, abs=1e-5)


@settings(deadline=None)
@given(any_rule((*RANDOM, *COMPARING)), SEEDS)
def test_teacher_equal_to_policy_gives_grpo_bit_for_bit(rule, seed):
    e = evidence(some_rollouts(seed))
    e = replace(e, teacher=e.policy)
    credit, uniform = rule(e), Uniform()(e)
    assert (credit.divergence == 0).all()
    assert (credit.weights == 1).all()
    assert torch.equal(credit.token_advantages, uniform.token_advantages)
    assert torch.equal(uniform.token_advantages, e.advantages[:, None] * e.action_mask)


@pytest.mark.parametrize("seed", range(40))
def test_teacher_equal_to_policy_gives_grpo_bit_for_bit_on_distributions(seed):
    e = evidence(some_rollouts(seed, vocabulary=8))
    e = replace(e, teacher=e.policy)
    credit = random_rule(random.Random(seed), LISTED)(e)
    assert (credit.divergence == 0).all()
    assert torch.equal(credit.token_advantages, Uniform()(e).token_advantages)


@settings(deadline=None)
@given(SEEDS)
def test_placebo_permutes_weights_within_the_rollout(seed):
    rows = some_rollouts(seed)
    e, options = evidence(rows), {"anchor_level": 0.5, "clip": 0.5}
    real, placebo = GEAR(**options)(e), Placebo(**options)(e)
    for a, b in zip(on_actions(real, e), on_actions(placebo, e), strict=True):
        assert sorted(a) == sorted(b)
    assert torch.equal(placebo.weights, Placebo(**options)(e).weights)
    assert torch.equal(placebo.token_advantages, torch.where(e.action_mask, placebo.weights * e.advantages[:, None], 0))
    assert (placebo.anchor == -1).all()


def test_placebo_moves_weights_and_depends_on_its_seed():
    r = rollout([x / 8 for x in range(40)])
    e = evidence([r])
    orders = {tuple(Placebo(seed=s)(e).weights[0].tolist()) for s in range(5)}
    later = Placebo()(evidence([replace(r, version=1)])).weights[0].tolist()
    assert len(orders | {tuple(GEAR()(e).weights[0].tolist()), tuple(later)}) == 7


def test_shifting_both_models_does_not_change_credit():
    rows = some_rollouts(3)
    shifted = [replace(r, policy=[x - 2 for x in r.policy], teacher=[x - 2 for x in r.teacher]) for r in rows]
    assert torch.equal(GEAR()(evidence(rows)).weights, GEAR()(evidence(shifted)).weights)


# a teacher without information ----------------------------------------------------------------------------------------

RULES = every_rule()
TEACHERS = [rule for rule in RULES if rule.needs_teacher]
# largest mean distance of weights from 1 under rounding alone, and of their mean; with its default GEAR keeps a
# signal's size: exp(0.026) on average in bf16-mixed
NULL = {FLOAT32: (0.005, 1e-3), BF16: (0.04, 0.02)}


def test_all_rules_are_found():
    known = {CREST, EGRSD, GEAR, GTPO, PBSD, RLSD, SCGRPO, Oracle, Placebo, TokenOnly, Turn, TurnSight, Uniform}
    assert known <= set(rule_classes())
    assert {type(rule) for rule in TEACHERS} == {kind for kind in rule_classes() if kind.needs_teacher}
    assert {(r.divergence, r.scale, r.sign_rule) for r in TEACHERS if type(r) is GEAR} >= {
        ("reverse_kl", "saturate", "symmetric"),
        ("k1", "zscore", "sign_aware"),
        ("k3", "zscore", "negatives_only"),
    }


def far_from_one(rule: CreditAssigner, size: float, **options) -> tuple[float, float]:
    """Return the mean distance of weights from 1 and that of the mean weight from 1, under rounding alone."""
    weights = rule(knowing_noise(rule, null_evidence(size, **options))).weights
    return (weights - 1).abs().mean().item(), abs(weights.mean().item() - 1)


@pytest.mark.parametrize("size", [FLOAT32, BF16], ids=["float32", "bf16-mixed"])
@pytest.mark.parametrize("both_signs", [False, True], ids=["rollouts", "turns"])
def test_no_rule_turns_rounding_into_credit(size, both_signs):
    each, mean = NULL[size]
    for rule in TEACHERS:
        found = far_from_one(rule, size, turns=5 if both_signs else 2, both_signs=both_signs)
        assert found[0] <= each, (rule, found)
        assert found[1] <= mean, (rule, found)


def test_rules_turn_rounding_into_credit_without_a_noise_floor():
    """The test above can fail: for rules that remove a signal's size and do not know the rounding noise."""
    for rule in (GEAR(scale="zscore"), TurnSight(), GEAR(divergence="reverse_kl", sign_rule="symmetric"), PBSD()):
        assert (rule(null_evidence(BF16)).weights - 1).abs().mean() > 0.1, rule


def test_rules_without_a_teacher_ignore_teacher_statistics():
    e = null_evidence(BF16)
    for rule in set(RULES) - set(TEACHERS):
        assert torch.equal(rule(e).weights, rule(replace(e, teacher=None)).weights), rule


def test_the_noise_floor_does_not_change_signals_far_above_it():
    for both_signs in (False, True):
        e = null_evidence(FLOAT32, says=1.0, both_signs=both_signs)
        for rule in TEACHERS:
            noise = knowing_noise(rule, null_evidence(FLOAT32)).noise
            told, untold = rule(replace(e, noise=noise)).weights, rule(e).weights
            assert (told - untold).abs().max() <= 1e-3, rule


@pytest.mark.parametrize(
    "rule",
    [
        TurnSight(),
        PBSD(),
        CREST(),
        SCGRPO(),
        TokenOnly(scale="zscore"),
        TokenOnly("reverse_kl", sign_rule="symmetric"),
        Turn(scale="zscore"),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_weights_change_continuously_as_the_signal_exceeds_the_noise(rule):
    e = null_evidence(0.0, says=0.5, rollouts=4)
    noise = RoundingNoise(0.5, 0.5)
    sizes, before = [1.04**i for i in range(-120, 60)], None
    for size in sizes:
        gap = size * (e.teacher.logprobs - e.policy.logprobs)
        listed = e.policy.top_logprobs + size * (e.teacher.top_logprobs - e.policy.top_logprobs)
        teacher = replace(e.teacher, logprobs=e.policy.logprobs + gap, top_logprobs=listed.log_softmax(-1))
        weights = rule(replace(e, teacher=teacher, noise=noise)).weights
        if before is None:
            assert (weights - 1).abs().max() < 1e-2
        else:
            assert (weights - before).abs().max() < 0.15
        before = weights
    assert (before - 1).abs().max() > 0.05


# positive and negative advantages -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(any_rule(RANDOM), SEEDS)
def test_sums_of_positive_and_negative_advantages_are_preserved(rule, seed):
    rng = random.Random(seed)
    e = evidence([with_turn_advantages(rng, r) for r in some_rollouts(seed)])
    rule = replace(rule, normalise="mean")
    given_ones = torch.where(e.action_mask, e.base_advantages, 0)
    for side in (given_ones.clamp_min(0), given_ones.clamp_max(0)):
        kept = torch.where(side != 0, rule(e).token_advantages, 0).double().sum(-1)
        assert_close(kept, side.double().sum(-1), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "rule",
    [
        *(TokenOnly(scale=scale) for scale in ("none", "zscore")),
        *(TokenOnly("reverse_kl", scale=scale, sign_rule="symmetric") for scale in ("none", "zscore", "saturate")),
        TokenOnly("k3", sign_rule="symmetric", normalise="none"),
        Turn(),
        Turn(scale="zscore", normalise="geometric"),
        Placebo(segment_end="none"),
        TurnSight(),
        SCGRPO(),
        GTPO(),
    ],
    ids=str,
)
def test_tokens_with_negative_advantages_do_not_affect_positive_ones(rule):
    e = null_evidence(BF16, says=0.5, turns=5, both_signs=True)
    other = null_evidence(BF16, says=2.0, turns=5, seed=1)
    blamed = e.base_advantages < 0

    def mixed(ours, theirs):
        return torch.where(blamed[..., None] if ours.dim() == 3 else blamed, theirs, ours)

    teacher = replace(
        e.teacher,
        logprobs=mixed(e.teacher.logprobs, other.teacher.logprobs),
        top_logprobs=mixed(e.teacher.top_logprobs, other.teacher.top_logprobs),
    )
    policy = replace(e.policy, entropy=mixed(e.policy.entropy, other.policy.entropy))
    changed = rule(replace(e, teacher=teacher, policy=policy)).weights
    assert torch.equal(changed[~blamed], rule(e).weights[~blamed])
    assert not torch.equal(changed[blamed], rule(e).weights[blamed])


def test_placebo_permutes_weights_within_each_sign():
    e = null_evidence(BF16, says=1.0, turns=5, both_signs=True)
    e = replace(e, turn_advantages=e.turn_advantages.sign())
    real, placebo = GEAR()(e).weights, Placebo()(e).weights
    for side in (e.base_advantages > 0, e.base_advantages < 0):
        for row in range(len(real)):
            assert sorted(real[row, side[row]].tolist()) == sorted(placebo[row, side[row]].tolist())
    assert not torch.equal(real, placebo)


@pytest.mark.parametrize("rule", [kind() for kind in dict.fromkeys([*RANDOM, *COMPARING, *OTHERS, SCGRPO])], ids=repr)
@pytest.mark.parametrize("advantage", [-1.0, 2.0])
@pytest.mark.parametrize("turns", [[-1, 0], [-1, 0, 0, -1, 1]])
def test_a_response_of_only_a_stop_token_keeps_its_advantage_under_every_rule(rule, advantage, turns):
    n = len(turns)
    top = [[math.log(0.6), math.log(0.4)]] * n
    teacher = [[math.log(0.2), math.log(0.8)]] * n
    for d in (-3.0, 0.0, 3.0):
        stop = [turn >= 0 and turn not in turns[t + 1 :] for t, turn in enumerate(turns)]
        row = rollout([d] * n, turns=turns, stop=stop, advantage=advantage, policy_top=top, teacher_top=teacher)
        credit = rule(evidence([row, some_rollouts(0, vocabulary=2)[0]]))
        assert credit.token_advantages.isfinite().all()
        assert credit.token_advantages[0, n - 1].sign() == math.copysign(1, advantage)
