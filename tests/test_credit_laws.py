"""Laws of every credit assigner: what must not change the credit, and what the credit must not change."""

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maths import LISTED, SAMPLED, SEEDS, evidence, on_actions, random_rule, rollout, some_rollouts
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
    TokenOnly,
    Turn,
    TurnSight,
    Uniform,
)

RANDOM = [GEAR, GEAR, Turn, TokenOnly, Placebo]  # with random options
COMPARING = [RLSD, CREST, TurnSight, PBSD, Uniform]  # these weigh nothing where teacher and policy agree
OTHERS = [EGRSD, GTPO, Oracle]


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
def test_masked_is_removed(rule, seed):
    if isinstance(rule, Placebo):
        rule = GEAR()  # a permutation is seeded by the places of the tokens
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
def test_neither_padding_nor_micro_batches_nor_order_matter(rule, seed, padding):
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
def test_signs_are_kept_and_credit_is_moved_not_made(rule, seed):
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
def test_placebo_permutes_within_the_rollout(seed):
    rows = some_rollouts(seed)
    e, options = evidence(rows), {"anchor_level": 0.5, "clip": 0.5}
    real, placebo = GEAR(**options)(e), Placebo(**options)(e)
    for a, b in zip(on_actions(real, e), on_actions(placebo, e), strict=True):
        assert sorted(a) == sorted(b)
    assert torch.equal(placebo.weights, Placebo(**options)(e).weights)
    assert torch.equal(placebo.token_advantages, torch.where(e.action_mask, placebo.weights * e.advantages[:, None], 0))
    assert (placebo.anchor == -1).all()


def test_placebo_does_move_weights_and_hears_its_seed():
    r = rollout([x / 8 for x in range(40)])
    e = evidence([r])
    orders = {tuple(Placebo(seed=s)(e).weights[0].tolist()) for s in range(5)}
    later = Placebo()(evidence([replace(r, version=1)])).weights[0].tolist()
    assert len(orders | {tuple(GEAR()(e).weights[0].tolist()), tuple(later)}) == 7


def test_shifting_both_models_changes_nothing():
    rows = some_rollouts(3)
    shifted = [replace(r, policy=[x - 2 for x in r.policy], teacher=[x - 2 for x in r.teacher]) for r in rows]
    assert torch.equal(GEAR()(evidence(rows)).weights, GEAR()(evidence(shifted)).weights)


@pytest.mark.parametrize("rule", [kind() for kind in dict.fromkeys([*RANDOM, *COMPARING, *OTHERS, SCGRPO])], ids=repr)
@pytest.mark.parametrize("advantage", [-1.0, 2.0])
@pytest.mark.parametrize("turns", [[-1, 0], [-1, 0, 0, -1, 1]])
def test_an_answer_of_a_stop_token_alone_is_praised_and_blamed_under_every_rule(rule, advantage, turns):
    n = len(turns)
    top = [[math.log(0.6), math.log(0.4)]] * n
    teacher = [[math.log(0.2), math.log(0.8)]] * n
    for d in (-3.0, 0.0, 3.0):
        stop = [turn >= 0 and turn not in turns[t + 1 :] for t, turn in enumerate(turns)]
        row = rollout([d] * n, turns=turns, stop=stop, advantage=advantage, policy_top=top, teacher_top=teacher)
        credit = rule(evidence([row, some_rollouts(0, vocabulary=2)[0]]))
        assert credit.token_advantages.isfinite().all()
        assert credit.token_advantages[0, n - 1].sign() == math.copysign(1, advantage)
