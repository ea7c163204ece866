"""Credit rules of other papers, and the oracle: worked examples, slow references, invariants, rejected options."""

import math
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_maths import (
    SEEDS,
    Rollout,
    evidence,
    in_float64,
    on_actions,
    rollout,
    some_noise,
    some_rollouts,
    with_turn_advantages,
)
from reference_rules import SLOW, gap
from scripted_policy import CHAT, Scripted
from tiny_runs import data, generation, module, trainer
from torch.testing import assert_close

from gear_lightning.batch import TokenStats, collate
from gear_lightning.credit import (
    CREST,
    EGRSD,
    GTPO,
    PBSD,
    RLSD,
    SCGRPO,
    CreditAssigner,
    Evidence,
    Oracle,
    RoundingNoise,
    TurnSight,
)
from gear_lightning.data import make_row
from gear_lightning.environments.base import Environment, Step
from gear_lightning.environments.lookup_chain import LookupChainTasks
from gear_lightning.errors import UserError
from gear_lightning.generation.agent_loop import AgentLoop
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.engine import Sampling
from gear_lightning.probes.noise_floor import anchor_tokens
from gear_lightning.runs.records import read_records

TEACHERS = [EGRSD(), CREST(), TurnSight(), PBSD()]


def weights_of(rule: CreditAssigner, r: Rollout) -> list[float]:
    e = evidence([r])
    return on_actions(rule(e), e)[0]


# hand-computed --------------------------------------------------------------------------------------------------------


def test_golden_egrsd():
    # log p_T - log p_S = -0.1, 0.1, 1 and A = 2: exp = 0.904837, 1.105171, 2.718 -> 1.2; halved towards 1: 0.952419,
    # 1.052585, 1.1. Teacher entropies 0, 1, 4 of a scale of 2: 0, 1/2, 2 -> 1; gates 1 - 0.8 x: 1, 0.6, 0.2 times the
    # distance from 1: -0.047581, 0.6 * 0.052585 = 0.031551, 0.2 * 0.1
    r = rollout([0.1, -0.1, -1], teacher_entropy=[0, 1, 4], advantage=2.0)
    rule = EGRSD(entropy_scale=2.0, gate_floor=0.2)
    assert weights_of(rule, r) == pytest.approx([0.952419, 1.031551, 1.02], abs=1e-6)
    credit = rule(evidence([r]))
    assert_close(credit.token_advantages, torch.tensor([[1.904837, 2.063102, 2.04]]), atol=2e-6, rtol=0)
    assert credit.clipped.tolist() == [[False, False, True]]
    # the defaults: log 2 and 0.1; entropy 0.35: the gate is 1 - 0.9 * 0.35 / 0.693 = 0.545455
    unsure = rollout([-0.1, -0.1], teacher_entropy=[0.35, 5], advantage=2.0)
    assert weights_of(EGRSD(), unsure) == pytest.approx([1.028683, 1.005259], abs=1e-6)


def test_golden_crest():
    # surprisal 1 - d = 1.4, 0.6, 1: mean 1, deviation sqrt(0.32 / 3) = 0.326599, z = 1.2247, -1.2247, 0.
    # A > 0: (log p_T - log p_S) / 2 = 0.2, -0.2, 0: only the first agrees: exp 0.2 = 1.221403, m > 1, so the share is
    # 0.3: 1 + 0.3 * 0.221403
    r = rollout([-0.4, 0.4, 0])
    assert weights_of(CREST(), r) == pytest.approx([1.066421, 1, 1], abs=1e-6)
    # A < 0: only the second agrees; sigmoid(-1.224741) = 0.227101, m = 1 + 0.5 (0.454203 - 1) = 0.727101, share
    # 0.218130: 1 + 0.218130 * 0.221403
    assert weights_of(CREST(), replace(r, advantage=-1.0)) == pytest.approx([1, 1.048295, 1], abs=1e-6)
    # exp(2 / 2) -> 1.28, with the largest surprisal: 1 + 0.3 * 0.28
    credit = CREST()(evidence([rollout([-2.0, 0, 0])]))
    assert_close(credit.weights, torch.tensor([[1.084, 1, 1]]))
    assert credit.clipped.tolist() == [[True, False, False]]


def test_golden_gtpo():
    # H = 0.5, 1, 1.5, mean 1. A > 0: (1 + 0.1 H) / 1.1
    r = rollout([0, 0, 0], entropy=[0.5, 1, 1.5])
    assert weights_of(GTPO(), r) == pytest.approx([1.05 / 1.1, 1, 1.15 / 1.1])
    # A < 0: 1/H = 2, 1, 2/3, mean 11/9: 18/11, 9/11, 6/11; (1 + 0.1 x) / 1.1
    expected = [(1 + 0.1 * x / 11) / 1.1 for x in (18, 9, 6)]
    assert weights_of(GTPO(), replace(r, advantage=-1.0)) == pytest.approx(expected)
    # entropy 0 counts as 0.01: 1/H = 100, 1, mean 50.5
    sure = rollout([0, 0], entropy=[0, 1], advantage=-1.0)
    assert weights_of(GTPO(alpha1=0.0, alpha2=1.0), sure) == pytest.approx([100 / 50.5, 1 / 50.5])


def test_golden_scgrpo_within_the_noise():
    # D = 0, 1, 3, 4, 4: P75 is 4, the size compared with the noise; weights 0, 1/5, 3/7, 1/2, 1/2
    e = evidence([rollout([0] * 5)])
    e = replace(e, divergence=torch.tensor([[0, 1, 3, 4, 4.0]]))
    weights = [0, 0.2, 3 / 7, 0.5, 0.5]
    # noise 4: halfway to 1; noise 8: 1 / (1 + 16) of their distance from 1
    for noise, kept in ((4.0, 1 / 2), (8.0, 1 / 17), (0.04, 1.0)):
        credit = SCGRPO()(replace(e, noise=RoundingNoise(divergence=noise)))
        assert_close(credit.weights, torch.tensor([[1 + kept * (w - 1) for w in weights]]))
    # P75 at the smallest assumed noise, 1e-4, and far below it
    tiny = replace(e, divergence=torch.tensor([[0, 1, 3, 4, 4.0]]) / 4e4)
    assert_close(SCGRPO()(tiny).weights, torch.tensor([[(1 + w) / 2 for w in weights]]))
    assert (SCGRPO()(replace(e, divergence=torch.zeros(1, 5))).weights == 1).all()


def test_golden_turnsight_within_the_noise():
    # turn means 2 and 0 of 4 tokens each: deviation 1, z = 1 and -1; the noise of a mean of 4 is half that of a token:
    # with 2 nats, 1 / (1 + 1^4) of z remains
    r = rollout([-2.0] * 4 + [0.0] * 4, turns=[0] * 4 + [1] * 4)
    e = evidence([r])
    for noise, z in ((0.0, 1.0), (2.0, 0.5), (4.0, 1 / 17)):
        up = 0.25 * math.tanh(z)
        expected = torch.tensor([[1 + up] * 4 + [1 - up] * 4])
        assert_close(TurnSight()(replace(e, noise=RoundingNoise(noise))).weights, expected, atol=1e-5, rtol=0)


def test_golden_pbsd_within_the_noise():
    # a turn of 4 tokens sums to 0.4; the noise of a sum of 4 is twice that of a token: at 0.2 nats, half remains
    e = evidence([rollout([-0.1] * 4)])
    for noise, s in ((0.0, 0.4), (0.2, 0.2), (0.4, 0.4 / 17)):
        weights = PBSD()(replace(e, noise=RoundingNoise(noise))).weights
        assert_close(weights, torch.full((1, 4), 1 + math.tanh(s)), atol=1e-6, rtol=0)


def test_turns_are_compared_only_with_turns_of_the_same_sign():
    """Means 2, 0 | 5, 1, 3 of turns with positive and negative advantages: z is computed within each group."""
    own = [1.0, 1.0, -1.0, -1.0, -1.0]
    r = rollout([-2.0, 0, -5, -1, -3], turns=[0, 1, 2, 3, 4], turn_advantages=own)
    z = 2 / math.sqrt(8 / 3)  # 2, -2, 0 of variance 8/3
    tanh = [math.tanh(x) for x in (1, -1, -z, z, 0)]
    assert weights_of(TurnSight(), r) == pytest.approx([1 + 0.25 * x for x in tanh], abs=1e-5)
    alone = replace(r, turn_advantages=[1.0, -1.0, 0, 0, 0])
    assert weights_of(TurnSight(), alone)[:2] == [1, 1]


def test_golden_scgrpo_routing():
    # D = 0, 1, 3, 4, 4: P75 is 4. Of a group with one solved rollout: weight 1
    e = evidence([rollout([0] * 5, solved=n, advantage=-2.0) for n in (0, 1, 2)])
    e = replace(e, divergence=torch.tensor([[0, 1, 3, 4, 4.0]] * 3))
    weighed = [0, 0.2, 3 / 7, 0.5, 0.5]
    credit = SCGRPO()(e)
    assert_close(credit.weights, torch.tensor([weighed, [1.0] * 5, weighed]))
    assert credit.token_advantages[1].tolist() == [-2.0] * 5


# gap log p_T - log p_S of three turns: -1 -3 | 1 | 0, with an observation between them
TURNS = Rollout(
    turns=[-1, 0, 0, -1, 1, 2],
    policy=[9, 0, 2, -9, -2, -1],
    teacher=[0, -1, -1, 0, -1, -1],
    entropy=[0.0] * 6,
    advantage=-2.0,
)


def test_golden_turnsight():
    # means -2, 1, 0 of mean -1/3: deviations -5/3, 4/3, 1/3, root of the mean square sqrt(42 / 27) = 1.247219;
    # z = -1.336306, 1.069045, 0.267261. A < 0: w = 1 - 0.5 tanh z, halved towards 1: 1 - 0.25 tanh z, and
    # tanh z = -0.870782, 0.789101, 0.261075
    expected = [1.217696, 1.217696, 0.802725, 0.934731]
    assert weights_of(TurnSight(), TURNS) == pytest.approx(expected, abs=1e-6)
    praised = weights_of(TurnSight(), replace(TURNS, advantage=1.0))
    assert praised == pytest.approx([2 - w for w in expected], abs=1e-6)
    credit = TurnSight()(evidence([TURNS]))
    assert credit.anchor.tolist() == [[-1, 1, 1, -1, 4, 5]]
    assert credit.divergence.tolist() == [[0, 1, 3, 0, -1, 0]]


def test_golden_pbsd():
    # sums -4, 1, 0; delta 2: tanh = -0.964 -> -0.5, 0.462117, 0; A < 0: 1 - that
    rule = PBSD(delta=2.0)
    assert weights_of(rule, TURNS) == pytest.approx([1.5, 1.5, 0.537883, 1], abs=1e-6)
    assert weights_of(rule, replace(TURNS, advantage=3.0)) == pytest.approx([0.5, 0.5, 1.462117, 1], abs=1e-6)
    credit = rule(evidence([TURNS]))
    assert credit.clipped.tolist() == [[False, True, True, False, False, False]]
    assert credit.anchor.tolist() == [[-1, 1, 1, -1, 4, 5]]


# two turns of three tokens: right, wrong (two tokens) | wrong, unlabeled, wrong; labels of the observation do not count
DECIDED = Rollout(
    turns=[0, 0, 0, -1, 1, 1, 1],
    policy=[0.0] * 7,
    teacher=[0.0] * 7,
    entropy=[0.0] * 7,
    advantage=-1.0,
    decisions=[1, -1, -1, -1, -1, 0, -1],
)


moving = partial(Oracle, normalise="mean")


def test_golden_oracle():
    # first wrong decision: two tokens at 1.9, four at 0.1: mean 4.2 / 6 = 0.7
    high, low = 1.9 / 0.7, 0.1 / 0.7
    assert weights_of(moving(), DECIDED) == pytest.approx([low, high, high, low, low, low])
    # all wrong ones: four at 1.9, two at 0.1: mean 7.8 / 6 = 1.3
    high, low = 1.9 / 1.3, 0.1 / 1.3
    assert weights_of(moving(blame="all"), DECIDED) == pytest.approx([low, high, high, high, low, high])
    # A > 0: one right token: mean 2.4 / 6 = 0.4
    for blame in ("first", "all"):
        praised = weights_of(moving(blame=blame), replace(DECIDED, advantage=1.0))
        assert praised == pytest.approx([1.9 / 0.4, *[0.1 / 0.4] * 5])
    # clip 1: the others get 0; two tokens carry the advantage of 6
    assert weights_of(moving(clip=1.0), DECIDED) == pytest.approx([0, 3, 3, 0, 0, 0])


def test_golden_oracle_without_normalization():
    assert weights_of(Oracle(), DECIDED) == pytest.approx([0.1, 1.9, 1.9, 0.1, 0.1, 0.1])
    assert weights_of(Oracle(blame="all"), DECIDED) == pytest.approx([0.1, 1.9, 1.9, 1.9, 0.1, 1.9])
    assert weights_of(Oracle(clip=0.5), replace(DECIDED, advantage=1.0)) == pytest.approx([1.5, *[0.5] * 5])


def test_oracle_weights_are_1_without_a_decision_of_the_sign():
    right, wrong = [1, 1, 0, 0, 0, 0, 1], [0, -1, 0, 0, 0, 0, -1]
    for advantage, decisions in ((-1.0, right), (1.0, wrong), (1.0, None), (-1.0, None), (0.0, DECIDED.decisions)):
        r = replace(DECIDED, advantage=advantage, decisions=decisions)
        for rule in (Oracle(), moving(), moving(clip=1.0), moving(blame="all")):
            assert weights_of(rule, r) == [1.0] * 6
    # turns with advantages of their own: the turn that succeeded has its right decision, the other its wrong one
    r = replace(DECIDED, turn_advantages=[2.0] * 3 + [0.0] + [-1.0] * 3)
    # 1.9 0.1 0.1, mean 0.7 | 1.9 0.1 0.1
    expected = [1.9 / 0.7, 0.1 / 0.7, 0.1 / 0.7] * 2
    assert weights_of(moving(), r) == pytest.approx(expected)


# slow references ------------------------------------------------------------------------------------------------------


def drawn(rng: random.Random, kind: type) -> CreditAssigner:
    """Return a rule with random options."""
    share, positive = lambda: rng.choice([0.0, 0.3, 0.8, 1.0]), lambda: rng.choice([0.25, 1.0, 3.0])
    return kind(
        **{
            EGRSD: lambda: {"mix": share(), "clip": share(), "gate_floor": share(), "entropy_scale": positive()},
            CREST: lambda: {"mix": share(), "clip": share(), "gate_slope": share(), "temperature": positive()},
            GTPO: lambda: {"alpha1": share(), "alpha2": positive(), "entropy_floor": positive() / 10},
            TurnSight: lambda: {"mix": share(), "strength": share()},
            PBSD: lambda: {"delta": positive(), "clip": share()},
            SCGRPO: lambda: {"top_k_tokens": 8},
            Oracle: lambda: {
                "clip": share(),
                "blame": rng.choice(["first", "all"]),
                "normalise": rng.choice(["mean", "none"]),
            },
        }[kind]()
    )


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(list(SLOW)), SEEDS)
def test_rules_match_their_slow_references(kind, seed):
    rng = random.Random(seed)
    rows = some_rollouts(seed, vocabulary=8 * (kind is SCGRPO))
    if rng.random() < 0.5:
        rows = [with_turn_advantages(rng, r) for r in rows]
    rule, noise = drawn(rng, kind), some_noise(rng)
    e = evidence(rows, padding=rng.randint(0, 3), noise=noise)
    credit = rule(e)
    exact = rule(in_float64(e))
    near = {"atol": 1e-4, "rtol": 1e-4} if kind is SCGRPO else {"atol": 1e-6, "rtol": 1e-6}
    for i, r in enumerate(rows):
        expected = torch.tensor(SLOW[kind](rule, r, noise), dtype=exact.weights.dtype)
        assert_close(exact.weights[i, r.actions], expected, **near, msg=lambda m: f"{rule}: {m}")
        single = {"atol": 1e-4, "rtol": 1e-4} if kind in (SCGRPO, TurnSight) else {"atol": 3e-6, "rtol": 2e-5}
        assert_close(credit.weights[i, r.actions], expected.float(), **single, msg=lambda m: f"{rule}: {m}")
        measured = [0.0 if isinstance(rule, GTPO | Oracle) else -gap(r, t) for t in r.actions]
        assert kind is SCGRPO or credit.divergence[i, r.actions].tolist() == measured
    outside = ~e.action_mask
    assert (credit.weights[outside] == 1).all()
    assert (credit.token_advantages[outside] == 0).all()
    assert (credit.divergence[outside] == 0).all()
    assert (credit.weights >= 0).all()
    base = torch.where(outside, 0, e.base_advantages)
    assert torch.equal(credit.token_advantages, torch.where(outside, 0, credit.weights * base))
    assert not (credit.token_advantages.sign() == -base.sign())[base != 0].any()
    # a rollout has the same weights alone
    for i, r in enumerate(rows):
        alone = rule(in_float64(evidence([r], noise=noise))).weights[0]
        assert_close(alone, exact.weights[i, : len(r.turns)], atol=1e-6, rtol=1e-6)
        alone = rule(evidence([r], noise=noise)).weights[0]
        assert_close(alone, credit.weights[i, : len(r.turns)], atol=1e-6, rtol=1e-5)


# invariants -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([GTPO(), GTPO(alpha1=0.0), moving(), moving(blame="all"), moving(clip=1.0)]), SEEDS)
def test_rules_without_a_teacher_preserve_the_sum_of_credit(rule, seed):
    e = evidence(some_rollouts(seed))
    for w in on_actions(rule(replace(e, teacher=None)), e):
        assert not w or math.fsum(w) / len(w) == pytest.approx(1, abs=3e-6)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([*TEACHERS, SCGRPO(8), GTPO(), Oracle()]), SEEDS)
def test_teacher_based_weights_are_1_without_privileged_text(rule, seed):
    e = evidence(some_rollouts(seed, vocabulary=8))
    plain = rule(e)
    half = torch.arange(len(e.advantages)) % 2 == 0
    credit = rule(replace(e, privileged=half))
    assert torch.equal(credit.weights[half], plain.weights[half])
    if rule.needs_teacher:
        assert (credit.weights[~half] == 1).all()
        assert (credit.anchor[~half] == -1).all()
        assert credit.clipped is None or not credit.clipped[~half].any()
    else:
        assert torch.equal(credit.weights, plain.weights)


def test_crest_weights_are_at_least_1_and_gates_only_reduce_the_teachers_effect():
    for seed in range(30):
        e = evidence(some_rollouts(seed))
        crest = CREST()(e).weights
        assert ((crest >= 1) & (crest <= 1 + 0.3 * 0.28 + 1e-6)).all()
        gated, open_ = EGRSD()(e).weights - 1, RLSD()(e).weights - 1
        assert (gated.abs() <= open_.abs() + 1e-6).all()
        assert (gated * open_ >= 0).all()
        assert torch.equal(EGRSD(gate_floor=1.0)(e).weights, RLSD()(e).weights)


def test_turnsight_gives_a_rollout_with_one_turn_uniform_credit():
    assert weights_of(TurnSight(), rollout([1.0, -2.0, 0.5])) == [1, 1, 1]


def test_turn_segments_do_not_depend_on_the_divergence():
    for rule in (TurnSight(), PBSD()):
        credit = rule(evidence([TURNS]))
        assert (credit.anchor >= 0).any()
        assert not anchor_tokens(rule, credit).any()


# in a run -------------------------------------------------------------------------------------------------------------


class Tells(Environment):
    """Labels the first relation of every turn as wrong, and the entity as right."""

    def step(self, message):
        told = [{"text": "r1", "right": False, "occurrence": 0}, {"text": "e1", "right": True}]
        return Step([{"role": "tool", "name": "look", "content": "r1 e2"}], info={"decisions": told})


def test_the_oracle_finds_the_decisions_of_a_real_rollout():
    turn = 'r1 or r1 <tool_call>[{"name": "look", "arguments": {"relation": "r2", "entity": "e1"}}]</tool_call>'
    loop = AgentLoop(CHAT, Scripted(turn, turn), Tells, Budgets(turns=2, tokens=4000, context=8000), Sampling())
    (played,), _ = loop.run(torch.nn.Linear(1, 1), [(LookupChainTasks(2)[0], (0, 0, 0, 0))], policy_version=0)
    for advantage, text, times in ((-1.0, "r1", 1), (1.0, "e1", 2)):  # only the first wrong one; all right ones
        row = make_row(played, played.tokens[: played.prompt_length], advantage, group_id=0, index=0)
        batch = collate([row], step_tokens=1, step_rollouts=1, temperature=1.0)
        stats = TokenStats(torch.zeros(batch.tokens.shape), torch.zeros(batch.tokens.shape))
        credit = moving()(Evidence.of(batch, stats, None))
        chosen = batch.tokens[0, credit.weights[0] > 1].tolist()
        assert CHAT.text(chosen) == text * times
        if advantage < 0:
            assert credit.weights[0, played.prompt_length] > 1, "the turn begins with the decision"
        assert credit.weights[batch.action_mask].mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("rule", [*TEACHERS, SCGRPO(8), GTPO(), Oracle()], ids=lambda rule: type(rule).__name__)
def test_training_with_each_rule(tmp_path, rule):
    trainer(tmp_path, generation(), max_epochs=1).fit(module(rule), datamodule=data())
    (record,) = read_records(tmp_path)
    assert record.tensors["weights"].isfinite().all()
    assert "credit/weight_deviation" in (tmp_path / "metrics.csv").read_text().splitlines()[0]


# rejected options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EGRSD(mix=1.5), r"EGRSD: mix=1.5 is outside \[0, 1\]"),
        (lambda: EGRSD(clip=float("nan")), "EGRSD: clip=nan is outside"),
        (lambda: EGRSD(gate_floor=-0.1), "EGRSD: gate_floor=-0.1 is outside"),
        (lambda: EGRSD(entropy_scale=0.0), "EGRSD: entropy_scale=0.0 must be above 0, and finite"),
        (lambda: CREST(mix=-1.0), "CREST: mix=-1.0 is outside"),
        (lambda: CREST(clip=2.0), "CREST: clip=2.0 is outside"),
        (lambda: CREST(gate_slope=1.1), "CREST: gate_slope=1.1 is outside"),
        (lambda: CREST(temperature=-2.0), "CREST: temperature=-2.0 must be above 0"),
        (lambda: GTPO(alpha1=-1.0), "GTPO: alpha1=-1.0 must be at least 0, and finite"),
        (lambda: GTPO(alpha1=0.0, alpha2=0.0), "GTPO: alpha1=0.0 and alpha2=0.0 must be finite, and not both 0"),
        (lambda: GTPO(alpha2=math.inf), "GTPO: alpha2=inf must be at least 0, and finite"),
        (lambda: GTPO(entropy_floor=0.0), "GTPO: entropy_floor=0.0 must be above 0"),
        (lambda: TurnSight(mix=2.0), "TurnSight: mix=2.0 is outside"),
        (lambda: TurnSight(strength=1.5), "TurnSight: strength=1.5 is outside"),
        (lambda: PBSD(delta=math.inf), "PBSD: delta=inf must be above 0, and finite"),
        (lambda: PBSD(clip=1.5), "PBSD: clip=1.5 is outside"),
        (lambda: Oracle(clip=1.1), "Oracle: clip=1.1 is outside"),
        (lambda: Oracle(blame="last"), "Oracle: blame=last must be first or all"),
        (lambda: Oracle(normalise="geometric"), "Oracle: normalise=geometric must be mean or none"),
    ],
)
def test_invalid_options_are_rejected(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_missing_evidence_is_reported():
    e = evidence([DECIDED])
    with pytest.raises(UserError, match=r"Oracle needs labels of right and wrong decisions .*Evidence.decisions"):
        Oracle()(replace(e, decisions=None))
    with pytest.raises(UserError, match=r"SCGRPO needs the number of solved rollouts .*Evidence.solved"):
        SCGRPO()(replace(e, solved=None, divergence=torch.zeros(1, 7)))
    assert Oracle.needs_decisions
    assert not any(rule.needs_decisions for rule in (*TEACHERS, SCGRPO(), GTPO()))
    assert [rule.needs_teacher for rule in (*TEACHERS, SCGRPO(), GTPO(), Oracle())] == [True] * 5 + [False] * 2
