"""``credit.where``: a rule weighs only answers or tool calls; all other tokens keep the advantage of GRPO."""

import math
import random
from dataclasses import dataclass, fields, replace

import pytest
import torch
from every_rule import BF16, every_rule, null_evidence, rule_classes
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_maths import (
    LISTED,
    SAMPLED,
    SEEDS,
    evidence,
    random_rule,
    slow_credit,
    some_rollouts,
    with_turn_advantages,
)

from gear_lightning.batch import CALL, REASONING, Credit
from gear_lightning.credit import GEAR, RLSD, CreditAssigner, Evidence, Placebo, TokenOnly, Uniform
from gear_lightning.errors import UserError

SCOPES = st.sampled_from(["answer", "actions"])
RULES = [rule for rule in every_rule() if rule.where == "all" and not isinstance(rule, Uniform)]


def in_scope(where: str, turn: int, part: int) -> bool:
    """Return whether a rule weighs a token, from the definition."""
    return turn >= 0 and (part == CALL if where == "actions" else part != REASONING)


def check_outside(credit: Credit, e: Evidence, where: str) -> None:
    """Check exactly that tokens outside of the scope have the credit of GRPO."""
    for row, column in (e.turn_ids >= 0).nonzero().tolist():
        if in_scope(where, int(e.turn_ids[row, column]), int(e.parts[row, column])):
            continue
        base = e.advantages[row] if e.turn_advantages is None else e.turn_advantages[row, column]
        assert credit.weights[row, column] == 1
        assert credit.token_advantages[row, column] == base
        assert credit.divergence[row, column] == 0
        assert credit.anchor[row, column] == -1
        assert credit.clipped is None or not credit.clipped[row, column]


@settings(deadline=None)
@given(st.sampled_from(RULES), SCOPES, SEEDS, st.booleans())
def test_a_scope_equals_rollouts_without_the_other_tokens(rule, where, seed, own):
    if isinstance(rule, Placebo):
        rule = GEAR()  # the seed of a permutation depends on token positions
    rng = random.Random(seed)
    rows = some_rollouts(seed, vocabulary=3 if rule.top_k else 0)
    rows = [with_turn_advantages(rng, r) if own else r for r in rows]
    e = evidence(rows)
    credit = replace(rule, where=where)(e)
    check_outside(credit, e, where)
    kept = [[t for t in r.actions if in_scope(where, r.turns[t], r.parts[t])] for r in rows]
    cut = rule(evidence([r.only(columns) for r, columns in zip(rows, kept, strict=True)], padding=1))
    for i, columns in enumerate(kept):
        n = len(columns)
        for name in ("weights", "token_advantages", "divergence"):
            torch.testing.assert_close(
                getattr(credit, name)[i, columns], getattr(cut, name)[i, :n], atol=1e-6, rtol=1e-5, msg=name
            )
        place = {t: j for j, t in enumerate(columns)} | {-1: -1}
        assert [place[t] for t in credit.anchor[i, columns].tolist()] == cut.anchor[i, :n].tolist()


@settings(deadline=None)
@given(SCOPES, SEEDS)
def test_gear_within_a_scope_equals_the_slow_reference(where, seed):
    rng = random.Random(seed)
    kind = rng.choice([GEAR, TokenOnly])
    rule = random_rule(rng, SAMPLED + LISTED, kind, **({"segment_end": "none"} if kind is TokenOnly else {}))
    rows = some_rollouts(seed, 3, vocabulary=8)
    credit = replace(rule, where=where)(evidence(rows))
    for i, r in enumerate(rows):
        turns = [k if in_scope(where, k, part) else -1 for k, part in zip(r.turns, r.parts, strict=True)]
        weights, divergence, anchors = slow_credit(rule, replace(r, turns=turns))
        columns = [t for t, turn in enumerate(turns) if turn >= 0]
        assert credit.weights[i, columns].tolist() == pytest.approx(weights, abs=1e-4, rel=1e-4)
        assert credit.divergence[i, columns].tolist() == pytest.approx(divergence, abs=1e-5, rel=1e-5)
        assert credit.anchor[i, columns].tolist() == anchors


@pytest.mark.parametrize("where", ["answer", "actions"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_scope_moves_credit_inside_of_it_alone(rule, where):
    e = null_evidence(BF16, says=1.0, turns=3)
    credit = replace(rule, where=where)(e)
    check_outside(credit, e, where)
    scope = (e.parts == CALL) if where == "actions" else (e.parts != REASONING)
    assert (credit.weights[scope] != 1).any()
    garbage = torch.where(scope, 0, math.nan)  # what the other tokens are must not matter
    for name in ("policy", "teacher"):
        stats = getattr(e, name)
        wrong = {f: getattr(stats, f) + garbage for f in ("logprobs", "entropy")}
        e = replace(e, **{name: replace(stats, **wrong)})
    again = replace(rule, where=where)(e)
    for field in fields(Credit):
        if (value := getattr(credit, field.name)) is not None:
            assert torch.equal(getattr(again, field.name), value), field.name


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_without_a_scope_parts_do_not_matter(rule):
    e = null_evidence(BF16, says=1.0)
    first, other = rule(e), rule(replace(e, parts=None))
    assert torch.equal(first.weights, other.weights)
    assert torch.equal(first.token_advantages, other.token_advantages)


@settings(deadline=None)
@given(SCOPES, SEEDS)
def test_the_placebo_permutes_within_the_scope(where, seed):
    e = evidence(some_rollouts(seed))
    real, placebo = (kind(segment_end="none", where=where)(e) for kind in (GEAR, Placebo))
    check_outside(placebo, e, where)
    for row in range(len(real.weights)):
        assert real.weights[row].sort().values.tolist() == pytest.approx(
            placebo.weights[row].sort().values.tolist(), abs=1e-6
        )


@dataclass(frozen=True)
class Careless(CreditAssigner):
    """A user's rule that knows neither ``where`` nor the action mask."""

    needs_teacher = False

    def __call__(self, evidence: Evidence) -> Credit:
        weights = 2 - evidence.policy.logprobs
        return Credit(weights, weights * evidence.base_advantages, weights, torch.zeros_like(evidence.turn_ids))


def test_a_users_rule_need_not_know_the_scope():
    e = null_evidence(BF16, both_signs=True)
    credit = Careless(where="actions")(e)
    check_outside(credit, e, "actions")
    inside = e.parts == CALL
    assert torch.equal(credit.weights[inside], (2 - e.policy.logprobs)[inside])
    assert torch.equal(credit.token_advantages[inside], (credit.weights * e.turn_advantages)[inside])


def test_a_scope_without_tokens_is_grpo():
    e = null_evidence(BF16, says=1.0)
    e = replace(e, parts=torch.zeros_like(e.parts))
    credit, plain = GEAR(where="actions")(e), Uniform()(e)
    assert torch.equal(credit.weights, plain.weights)
    assert torch.equal(credit.token_advantages, plain.token_advantages)


def test_scopes_without_effect_or_data_are_refused():
    with pytest.raises(UserError, match="Uniform: where=actions does nothing"):
        Uniform(where="actions")
    e = null_evidence(BF16)
    with pytest.raises(UserError, match=r"RLSD: where=answer needs to know .*Evidence.parts"):
        RLSD(where="answer")(replace(e, parts=None))
    with pytest.raises(UserError, match="RLSD: where=calls must be all, answer or actions"):
        RLSD(where="calls")(e)  # type: ignore[arg-type]
    assert all("where" in {f.name for f in fields(kind)} for kind in rule_classes())
