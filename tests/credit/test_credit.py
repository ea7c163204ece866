"""Credit assigners: worked examples, the slow reference on random rollouts, edge cases, rejected options."""

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_maths import (
    LISTED,
    SAMPLED,
    SEEDS,
    Rollout,
    evidence,
    on_actions,
    random_rule,
    rollout,
    slow_credit,
    some_noise,
    some_rollouts,
    with_turn_advantages,
)
from torch.testing import assert_close

from gear_lightning.batch import TokenStats, collate
from gear_lightning.credit import (
    CREST,
    EGRSD,
    GEAR,
    GTPO,
    PBSD,
    RLSD,
    SCGRPO,
    Evidence,
    Oracle,
    Placebo,
    RoundingNoise,
    TokenOnly,
    Turn,
    TurnSight,
    Uniform,
    mixing,
)
from gear_lightning.errors import UserError

# hand-computed --------------------------------------------------------------------------------------------------------

# two turns (columns 1-4 and 7-8); the observation (5, 6) and the prompt (0) contain large numbers to ignore
EXAMPLE = Rollout(
    turns=[-1, 0, 0, 0, 0, -1, -1, 1, 1],
    policy=[9, -1, -1, -1, -1, 9, 9, -1, -1],
    teacher=[0, -1, -2, -1.25, -1, -9, 0, -1.5, -1],
    entropy=[9, 0, 1, 0, 2, 9, 9, 0, 0],
    advantage=-2.0,
)
EXAMPLE_RULE = GEAR(anchor_level=0.7, clip=0.99)


def test_golden_example():
    # k1: 0, 1, 0.25, 0 | 0.5, 0. Quantile 0.7 of 0 0 0 .25 .5 1: place 3.5 -> 0.375, so the floor 0.5 decides: anchors
    # at columns 2 and 7. Entropy quantile 0.8 of 0 0 0 0 1 2: place 4 -> 1: the token at column 4 closes. Column 3 is
    # in the segment and carries 1 instead of 0.25; column 8 carries 0.5. A < 0, so the weights are exp(c):
    # 1, 2.718 -> 1.99, 1.99, 1 | 1.648721, 1.648721; their mean is 9.277443 / 6 = 1.546240
    e = evidence([EXAMPLE])
    credit = EXAMPLE_RULE(e)
    assert credit.anchor.tolist() == [[-1, -1, 2, 2, -1, -1, -1, 7, 7]]
    assert credit.divergence.tolist() == [[0, 0, 1, 0.25, 0, 0, 0, 0.5, 0]]
    actions = torch.tensor([1, 1.99, 1.99, 1, 1.648721, 1.648721]) / 1.546240
    assert_close(credit.weights[e.action_mask], actions, atol=1e-6, rtol=0)
    assert (credit.weights[~e.action_mask] == 1).all()
    assert_close(credit.token_advantages[e.action_mask], -2 * actions, atol=2e-6, rtol=0)
    assert (credit.token_advantages[~e.action_mask] == 0).all()


def test_golden_example_segment_mean():
    # segment means (1 + 0.25) / 2 = 0.625 and (0.5 + 0) / 2 = 0.25; not normalized: exp
    rule = replace(EXAMPLE_RULE, segment_value="mean", normalise="none")
    expected = [1, math.exp(0.625), math.exp(0.625), 1, math.exp(0.25), math.exp(0.25)]
    e = evidence([EXAMPLE])
    assert on_actions(rule(e), e)[0] == pytest.approx(expected)


def test_golden_exclusions():
    d = [1.0, 2.0, 3.0, 4.0]
    stop = [False, True, False, True]
    e = evidence([rollout(d, stop=stop)])
    assert GEAR().measure(e).tolist() == [[1, 0, 3, 0]]
    assert GEAR(exclude_stop=False).measure(e).tolist() == [[1, 2, 3, 4]]
    assert GEAR(exclude_stop=False, exclude_tail=3).measure(e).tolist() == [[1, 0, 0, 0]]
    spread = rollout([1, 9, 3, 9, 5], turns=[0, -1, 0, -1, 1])  # the tail counts action tokens
    assert GEAR(exclude_tail=2).measure(evidence([spread])).tolist() == [[1, 0, 0, 0, 0]]


def test_golden_entropy_sources():
    # one anchor at 0; 0.8 quantile of three values: place 1.6. policy 0 0 1 -> 0.6, closes at column 2;
    # teacher 0 1 1 -> 1: at 1; surprisal -log p_S = 1 - d = -8, 1, 1 -> 1: at 1
    r = rollout([9, 0, 0], entropy=[0, 0, 1], teacher_entropy=[0, 1, 1])
    for source, anchors in (("policy", [0, 0, -1]), ("teacher", [0, -1, -1]), ("surprisal", [0, -1, -1])):
        assert GEAR(entropy=source)(evidence([r])).anchor.tolist() == [anchors]
    r = rollout([9, 0, 2], entropy=[0, 1, 1], teacher_entropy=[0, 1, 1])  # surprisal -8, 1, -1: 0.8 quantile 0.2
    assert GEAR(entropy="surprisal", anchor_level=1.0)(evidence([r])).anchor.tolist() == [[0, -1, -1]]
    r = rollout([9, 2, 0], entropy=[0, 1, 1], teacher_entropy=[0, 1, 1])  # surprisal -8, -1, 1
    assert GEAR(entropy="surprisal", anchor_level=1.0)(evidence([r])).anchor.tolist() == [[0, 0, -1]]


def test_golden_defaults():
    k1, listed = GEAR(), GEAR(divergence="reverse_kl", sign_rule="symmetric")
    assert (k1.level, k1.floor, k1.top_k, k1.signed) == (0.95, 0.5, 0, True)
    assert (listed.level, listed.floor, listed.top_k, listed.signed) == (0.95, 0.05, 100, False)
    assert (k1.entropy_quantile, k1.segment_max, k1.kappa, k1.clip, k1.mix) == (0.8, 128, 1.0, 0.9, 1.0)
    assert (k1.segment_end, k1.sign_rule, k1.normalise, k1.exclude_stop) == ("entropy_high", "sign_aware", "mean", True)
    levels = {rule: GEAR(anchor_rule=rule).level for rule in ("absolute", "zscore", "rise")}
    assert levels == {"absolute": 0, "zscore": 2, "rise": 16}
    assert GEAR(anchor_floor=0.0).floor == GEAR(anchor_level=0.0).level == 0
    assert [rule.top_k for rule in (Uniform(), RLSD(), SCGRPO(), GEAR(divergence="k1"))] == [0, 0, 100, 0]
    assert [rule.needs_teacher for rule in (Uniform(), RLSD(), SCGRPO(), GEAR())] == [False, True, True, True]


def test_golden_unsigned_default():
    # section 2.1, step 6: phi = c / (c + P75), w = clip(1 + phi - mean phi); for k3 of k1 = 0, 0, 0, log 2:
    # c = 0 0 0 0.193147 (an anchor; segments off), P75: place 2.25 -> 0.048287, phi = 0.8, mean 0.2
    e = evidence([rollout([0, 0, 0, math.log(2)])])
    rule = GEAR(divergence="k3", sign_rule="symmetric", segment_end="none", normalise="none")
    assert_close(rule(e).weights, torch.tensor([[0.8, 0.8, 0.8, 1.6]]), atol=1e-5, rtol=0)


def test_golden_mixing():
    version = torch.tensor([0, 5, 10, 15])
    assert_close(mixing(0.8, 10, version), torch.tensor([[0.8], [0.4], [0], [0]]))
    assert_close(mixing(0.8, None, version), torch.full((4, 1), 0.8))
    # c = log 1.5 in one of two tokens, A < 0: weights 1.5 and 1; half of it: 1.25 and 1; half decayed: 1.125 and 1
    r = rollout([math.log(1.5), 0], advantage=-1.0, version=5)
    e = evidence([r])
    assert_close(GEAR(mix=0.5, normalise="none", segment_end="none")(e).weights, torch.tensor([[1.25, 1]]))
    decayed = GEAR(mix=0.5, mix_decay=10, normalise="none", segment_end="none")
    assert_close(decayed(e).weights, torch.tensor([[1.125, 1]]))


def test_golden_turn():
    # turn means of k1: (0 + 1 + 0.25 + 0) / 4 = 0.3125 and 0.25; A < 0: exp; the anchor is the turn's first token
    e = evidence([EXAMPLE])
    credit = Turn(normalise="none")(e)
    a, b = math.exp(0.3125), math.exp(0.25)
    assert on_actions(credit, e)[0] == pytest.approx([a, a, a, a, b, b])
    assert credit.anchor.tolist() == [[-1, 1, 1, 1, 1, -1, -1, 7, 7]]


def test_golden_rlsd():
    # A = 2, log p_T - log p_S = -0.1, 0.1, 1: exp = 0.904837, 1.105171, 2.718 -> 1.2; halved towards 1, times 2
    r = rollout([0.1, -0.1, -1], advantage=2.0)
    credit = RLSD()(evidence([r]))
    assert_close(credit.token_advantages, torch.tensor([[1.904837, 2.105171, 2.2]]), atol=1e-6, rtol=0)
    # A = -2: exp(0.1) = 1.105171, exp(-0.1) = 0.904837, exp(-1) -> 0.8
    credit = RLSD()(evidence([replace(r, advantage=-2.0)]))
    assert_close(credit.token_advantages, torch.tensor([[-2.105171, -1.904837, -1.8]]), atol=1e-6, rtol=0)


def test_golden_scgrpo():
    # D = 0, 1, 3, 4, 4 on actions: P75 is 4; weights 0, 1/5, 3/7, 1/2, 1/2 for either sign
    e = evidence([rollout([0] * 6, turns=[0, 0, -1, 0, 0, 1], advantage=-2.0)])
    e = replace(e, divergence=torch.tensor([[0, 1, 99, 3, 4, 4.0]]))
    credit = SCGRPO()(e)
    assert_close(credit.weights, torch.tensor([[0, 0.2, 1, 3 / 7, 0.5, 0.5]]))
    assert_close(credit.token_advantages, torch.tensor([[0, -0.4, 0, -6 / 7, -1, -1]]))
    assert credit.divergence.tolist() == [[0, 1, 0, 3, 4, 4]]


# against the slow reference -------------------------------------------------------------------------------------------


def check_against_reference(
    rule: GEAR, rows: list[Rollout], padding: int, noise: RoundingNoise = RoundingNoise()
) -> None:
    e = evidence(rows, padding, noise)
    credit = rule(e)
    for i, r in enumerate(rows):
        weights, divergence, anchors = slow_credit(rule, r, noise)
        where = r.actions
        assert credit.anchor[i, where].tolist() == anchors, (rule, r)
        assert_close(credit.divergence[i, where], torch.tensor(divergence), atol=3e-6, rtol=1e-6)
        assert_close(credit.weights[i, where], torch.tensor(weights), atol=2e-6, rtol=1e-5)
    outside = ~e.action_mask
    assert (credit.weights[outside] == 1).all()
    assert (credit.anchor[outside] == -1).all()
    assert (credit.divergence[outside] == 0).all()
    assert (credit.token_advantages[outside] == 0).all()
    assert torch.equal(credit.token_advantages, torch.where(outside, 0, credit.weights * e.base_advantages))


def some_turns(rng: random.Random, rows: list[Rollout]) -> list[Rollout]:
    """Return the rollouts; in half of all calls with advantages for each turn, of both signs."""
    return [with_turn_advantages(rng, r) for r in rows] if rng.random() < 0.5 else rows


@pytest.mark.parametrize("seed", range(6))
def test_sampled_divergences_match_the_slow_reference(seed):
    rng = random.Random(seed)
    for case in range(300):
        rule = random_rule(rng, SAMPLED)
        rows = some_turns(rng, some_rollouts(1000 * seed + case, n=rng.randint(1, 5)))
        check_against_reference(rule, rows, padding=rng.randint(0, 3), noise=some_noise(rng))


@pytest.mark.parametrize("seed", range(3))
def test_distribution_divergences_match_the_slow_reference(seed):
    rng = random.Random(100 + seed)
    for case in range(60):
        rule = random_rule(rng, LISTED)
        rows = some_turns(rng, some_rollouts(1000 * seed + case, n=2, vocabulary=8))
        check_against_reference(rule, rows, padding=rng.randint(0, 3), noise=some_noise(rng))


def test_defaults_match_the_slow_reference():
    for seed in range(150):
        check_against_reference(GEAR(), some_rollouts(seed), padding=seed % 3)


@pytest.mark.parametrize("seed", range(2))
def test_token_only_and_turn_match_the_reference(seed):
    rng = random.Random(seed)
    for case in range(60):
        rows = some_rollouts(case + 500 * seed, n=3)
        check_against_reference(random_rule(rng, SAMPLED, TokenOnly, segment_end="none"), rows, padding=1)
        rule = random_rule(rng, SAMPLED, Turn, scale="none", normalise="none", mix_decay=None, mix=1.0)
        e, credit = evidence(rows), rule(evidence(rows))
        for i, r in enumerate(rows):
            per_turn = {k: [t for t in r.actions if r.turns[t] == k] for k in set(r.turns) - {-1}}
            for columns in per_turn.values():
                assert set(credit.anchor[i, columns].tolist()) == {columns[0]}
                assert len(set(credit.weights[i, columns].tolist())) == 1
            if rule.sign_rule == "reversed_on_correct":
                for columns in per_turn.values():
                    w = math.exp(min(rule.kappa * rule.measure(e)[i, columns].double().mean().item(), 99))
                    w = min(max(w, 1.0 if rule.direction_gate else 1 - rule.clip), 1 + rule.clip)
                    assert credit.weights[i, columns[0]].item() == pytest.approx(w, rel=1e-4)


@settings(deadline=None)
@given(SEEDS, st.sampled_from([None, 1, 7, 100]), st.floats(0, 1), st.floats(0, 1))
def test_rlsd_matches_its_formula(seed, decay, mix, clip):
    rows = some_rollouts(seed)
    credit = RLSD(mix=mix, clip=clip, mix_decay=decay)(evidence(rows))
    for i, r in enumerate(rows):
        share = mix if decay is None else mix * max(0.0, 1 - r.version / decay)
        for t in r.actions:
            sign = (r.advantage > 0) - (r.advantage < 0)
            w = min(max(math.exp(sign * (r.teacher[t] - r.policy[t])), 1 - clip), 1 + clip)
            expected = r.advantage * ((1 - share) + share * w)
            assert credit.token_advantages[i, t].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_scgrpo_matches_its_formula(seed):
    rows = some_rollouts(seed, n=3, vocabulary=8)
    credit = SCGRPO(top_k_tokens=8)(evidence(rows))
    for i, r in enumerate(rows):
        s, t = (torch.distributions.Categorical(logits=torch.tensor(x).double()) for x in (r.policy_top, r.teacher_top))
        d = torch.distributions.kl_divergence(t, s)[r.actions]
        if r.actions and r.solved == 1:
            assert (credit.weights[i] == 1).all()
        elif r.actions:
            c = max(torch.quantile(d, 0.75).item(), 1e-4)
            assert_close(credit.weights[i, r.actions].double(), d / (d + c), atol=1e-4, rtol=1e-4)


# evidence, degenerate cases, rejected options -------------------------------------------------------------------------


def test_evidence_of_a_batch_is_detached():
    batch = collate([], step_tokens=0, step_rollouts=0, temperature=1.0)
    stats = TokenStats(torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 2))
    e = Evidence.of(batch, stats, stats)
    assert not e.policy.logprobs.requires_grad
    assert e.action_mask is batch.action_mask
    credit = GEAR()(replace(e, teacher=TokenStats(torch.zeros(1, 2), torch.zeros(1, 2))))
    assert not credit.weights.requires_grad
    assert not credit.token_advantages.requires_grad


def test_a_recorded_divergence_replaces_distributions():
    e = evidence([rollout([0, 0, 0, 0])])
    e = replace(e, divergence=torch.tensor([[0.0, 1, 0, 0]]), teacher=None)
    credit = GEAR(divergence="reverse_kl", sign_rule="symmetric")(e)
    assert credit.divergence.tolist() == [[0, 1, 0, 0]]
    with pytest.raises(UserError, match="GEAR needs the teacher's log-probs, and these rollouts have none"):
        GEAR()(e)


@pytest.mark.parametrize(
    "cls", [GEAR, Turn, TokenOnly, Placebo, RLSD, Uniform, EGRSD, CREST, GTPO, TurnSight, PBSD, Oracle]
)
@pytest.mark.parametrize("d", [[], [0.0], [1e30], [-1e30], [1e4] * 5 + [-1e4] * 5])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_degenerate_rollouts_have_finite_weights(cls, d, advantage):
    full, empty = rollout(d, advantage=advantage), Rollout([-1, -1], [0.0] * 2, [0.0] * 2, [0.0] * 2)
    credit = cls()(evidence([full, empty]))
    assert credit.weights.isfinite().all()
    assert credit.token_advantages.isfinite().all()
    if len(d) == 1 and cls not in (RLSD, EGRSD, CREST, PBSD):
        assert credit.weights[0, 0] == 1  # a single token keeps all credit


@pytest.mark.parametrize("seed", range(30))
def test_extreme_options_give_finite_weights(seed):
    rng = random.Random(seed)
    e = evidence(some_rollouts(seed))
    for extreme in ({"kappa": 1e6}, {"clip": 1.0, "kappa": 100.0, "normalise": "mean"}, {"divergence_limit": 1e-6}):
        credit = random_rule(rng, SAMPLED, **extreme)(e)
        assert credit.weights.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GEAR(divergence="k3"), "k3 has no sign .* use sign_rule=symmetric, or divergence=k1"),
        (lambda: GEAR(scale="saturate"), "never negative; k1 is signed"),
        (lambda: GEAR(clip=1.1), r"clip=1.1 is outside \[0, 1\]"),
        (lambda: GEAR(clip=float("nan")), "clip=nan is outside"),
        (lambda: GEAR(mix=-0.1), r"mix=-0.1 is outside \[0, 1\]"),
        (lambda: GEAR(entropy_quantile=2.0), r"entropy_quantile=2.0 is outside \[0, 1\]"),
        (lambda: GEAR(kappa=-1.0), "GEAR: kappa=-1.0 must be at least 0, and finite"),
        (lambda: GEAR(kappa=math.inf), "kappa=inf must be at least 0, and finite"),
        (lambda: GEAR(divergence_limit=-1.0), "divergence_limit=-1.0 must be above 0, and finite"),
        (lambda: GEAR(divergence_limit=0.0), "divergence_limit=0.0 must be above 0"),
        (lambda: GEAR(divergence_limit=math.inf), "divergence_limit=inf must be above 0, and finite"),
        (lambda: GEAR(exclude_tail=-1), "exclude_tail=-1 must be at least 0"),
        (lambda: GEAR(segment_max=0), "segment_max=0 must be at least 1"),
        (lambda: GEAR("jsd", sign_rule="symmetric", divergence_top_k=0), "divergence_top_k=0 must be at least 1"),
        (lambda: GEAR(divergence_top_k=10), "divergence_top_k does nothing with divergence=k1"),
        (lambda: GEAR("jsd", sign_rule="symmetric", divergence_limit=1.0), "divergence_limit does nothing with"),
        (lambda: GEAR(segment_end="turn", entropy_quantile=0.5), "entropy_quantile does nothing with segment_end=turn"),
        (lambda: GEAR(mix_decay=0), "mix_decay=0 must be at least 1"),
        (lambda: GEAR(anchor_level=2.0), "anchor_level=2.0 is not a quantile"),
        (lambda: GEAR(anchor_rule="rise", anchor_level=0.0), "anchor_level=0.0 must be a whole number of tokens"),
        (lambda: GEAR(anchor_rule="rise", anchor_level=2.5), "anchor_level=2.5 must be a whole number of tokens"),
        (lambda: GEAR(anchor_rule="rise", anchor_level=math.inf), "anchor_level=inf must be a whole number of tokens"),
        (lambda: GEAR(anchor_rule="rise", anchor_level=math.nan), "anchor_level=nan must be a whole number of tokens"),
        (lambda: GEAR(anchor_rule="zscore", anchor_level=math.nan), "anchor_level=nan must be finite"),
        (lambda: GEAR(anchor_rule="zscore", anchor_level=-math.inf), "anchor_level=-inf must be finite"),
        (lambda: GEAR(anchor_rule="absolute", anchor_level=7.0), "anchor_level does nothing with anchor_rule=absolute"),
        (lambda: GEAR(anchor_floor=math.nan), "GEAR: anchor_floor=nan must be at least 0, and finite"),
        (lambda: GEAR(anchor_floor=-5.0), "anchor_floor=-5.0 must be at least 0"),
        (lambda: GEAR(anchor_floor=math.inf), "anchor_floor=inf must be at least 0, and finite"),
        (lambda: GEAR(normalise="geometric", clip=1.0), "no geometric mean; use clip below 1"),
        (lambda: TokenOnly(segment_end="turn"), "TokenOnly has no segments; use GEAR with segment_end"),
        (lambda: TokenOnly(clip=2.0), "TokenOnly: clip=2.0 is outside"),
        (lambda: RLSD(mix=1.5), r"RLSD: mix=1.5 and clip=0.2 must lie in \[0, 1\]"),
        (lambda: RLSD(mix_decay=0), "RLSD: mix_decay=0 must be at least 1"),
        (lambda: SCGRPO(top_k_tokens=0), "SCGRPO: top_k_tokens=0 must be at least 1"),
    ],
)
def test_invalid_options_are_rejected(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    "rule", [GEAR(), Turn(), TokenOnly(), Placebo(), RLSD(), SCGRPO(), EGRSD(), CREST(), TurnSight(), PBSD()], ids=repr
)
def test_a_missing_teacher_is_reported(rule):
    e = replace(evidence([rollout([0, 1])]), teacher=None)
    with pytest.raises(UserError, match=f"{type(rule).__name__} needs the teacher's log-probs"):
        rule(e)
    assert Uniform()(e).weights.tolist() == [[1, 1]]


@pytest.mark.parametrize("rule", [GEAR(clip=0.2), GEAR(clip=0.2, mix=0.5), GEAR(clip=0.2, normalise="none"), RLSD()])
def test_tokens_at_the_clip_are_marked(rule):
    policy = torch.tensor([[0.0, -0.1, -0.1, -3.0, -0.1]])
    teacher = torch.tensor([[0.0, -0.1, -3.0, -0.1, -0.2]])  # prompt, equal, departure, reverse departure, small
    mask = torch.tensor([[False, True, True, True, True]])
    off = torch.zeros_like(mask)
    stats = [TokenStats(x, torch.zeros_like(x)) for x in (policy, teacher)]
    e = Evidence(
        torch.tensor([-1.0]), mask, torch.zeros_like(mask, dtype=torch.long) - ~mask * 1, off, torch.tensor([0]), *stats
    )
    assert rule(e).clipped.tolist() == [[False, False, True, True, False]]
    assert not rule(replace(e, privileged=torch.tensor([False]))).clipped.any()
