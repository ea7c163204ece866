"""Padding has no effect: a padded batch equals its rows one at a time, and the values in the padding do not matter."""

from dataclasses import replace

import pytest
import torch
from every_rule import Sharp, random_rows, untrained
from torch.testing import assert_close

from gear_lightning.batch import RolloutBatch, collate
from gear_lightning.credit import CREST, EGRSD, GEAR, GTPO, PBSD, RLSD, SCGRPO, Evidence, Placebo, Turn, TurnSight
from gear_lightning.learning.token_stats import token_stats
from gear_lightning.module import GearModule
from gear_lightning.teacher import TeacherOptions

ROWS = random_rows(5, hints=(0, 45, 3, 12, 0))
RULES = [
    GEAR(),
    GEAR("jsd", sign_rule="symmetric", divergence_top_k=8),
    GEAR("k3", sign_rule="negatives_only", anchor_rule="zscore", segment_value="mean"),
    GEAR("reverse_kl", sign_rule="reversed_on_correct", divergence_top_k=8, entropy="teacher", anchor_at="peak"),
    Turn(),
    Placebo(),
    RLSD(),
    SCGRPO(top_k_tokens=8),
    EGRSD(),
    CREST(),
    GTPO(),
    TurnSight(),
    PBSD(),
]
FIELDS = ("logprobs", "entropy", "top_logprobs")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> GearModule:
    module = GearModule(Sharp(), teacher=TeacherOptions(template=" <ref> {reference}"))
    untrained(module, tmp_path_factory.mktemp("run"))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.teacher.model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return module


def batch_of(rows) -> RolloutBatch:
    return collate(rows, step_tokens=1, step_rollouts=1, temperature=0.8)


def scored(model: GearModule, batch: RolloutBatch):
    policy = token_stats(
        model.policy, batch.tokens, batch.valid, batch.action_mask, temperature=batch.temperature, top_k=8
    )
    return policy, model.teacher.score(model.policy, batch, batch.action_mask, policy.top_ids)


def gradients(model: GearModule, *batches: RolloutBatch) -> torch.Tensor:
    """Return the gradients of a loss that weights every token differently."""
    model.policy.zero_grad()
    for batch in batches:
        logprobs = scored(model, batch)[0].logprobs
        weight = torch.sin(batch.tokens.float() + 3 * batch.index[:, None])  # only at actions: the rest is masked
        (logprobs * weight * batch.action_mask).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.policy.parameters()])


def noisy(batch: RolloutBatch) -> RolloutBatch:
    """Return the batch with random ids of the vocabulary in its padding."""
    generator = torch.Generator().manual_seed(2)

    def fill(tokens, valid):
        return torch.where(valid, tokens, torch.randint(0, 100, tokens.shape, generator=generator))

    return replace(
        batch,
        tokens=fill(batch.tokens, batch.valid),
        teacher_tokens=fill(batch.teacher_tokens, batch.teacher_valid),
    )


def test_the_rows_of_this_test_differ_in_length():
    batch = batch_of(ROWS)
    for valid in (batch.valid, batch.teacher_valid):
        assert valid.sum(-1).max() > 2 * valid.sum(-1).min()
    assert set(batch.teacher_offset.tolist()) == {0, 45, 3, 12}


def test_a_padded_batch_equals_its_rows_one_at_a_time(model):
    together = scored(model, batch_of(ROWS))
    for i, row in enumerate(ROWS):
        n = len(row.tokens)
        alone = scored(model, batch_of([row]))
        for ours, theirs in zip(together, alone, strict=True):
            for name in FIELDS:
                assert_close(getattr(ours, name)[i, :n], getattr(theirs, name)[0], atol=2e-5, rtol=1e-5)
                assert not getattr(ours, name)[i, n:].any()
            assert torch.equal(ours.top_ids[i, :n], theirs.top_ids[0])


def test_gradients_of_a_padded_batch_equal_those_of_its_rows(model):
    together = gradients(model, batch_of(ROWS))
    alone = gradients(model, *(batch_of([row]) for row in ROWS))
    assert together.abs().max() > 0.1
    assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_credit_of_a_padded_batch_equals_that_of_its_rows(model, rule):
    batch = batch_of(ROWS)
    together = rule(Evidence.of(batch, *scored(model, batch)))
    assert (together.weights != 1).any()
    assert (together.weights[~batch.action_mask] == 1).all()
    for i, row in enumerate(ROWS):
        n = len(row.tokens)
        single = batch_of([row])
        alone = rule(Evidence.of(single, *scored(model, single)))
        for name in ("weights", "token_advantages", "divergence"):
            assert_close(getattr(together, name)[i, :n], getattr(alone, name)[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(together.anchor[i, :n], alone.anchor[0])
        assert (together.anchor[i, n:] == -1).all()
        assert not together.token_advantages[i, n:].any()


def test_the_values_in_the_padding_do_not_matter(model):
    clean = batch_of(ROWS)
    dirty = noisy(clean)
    assert not torch.equal(clean.tokens, dirty.tokens)
    assert not torch.equal(clean.teacher_tokens, dirty.teacher_tokens)
    stats, again = scored(model, clean), scored(model, dirty)
    for ours, theirs in zip(stats, again, strict=True):
        for name in (*FIELDS, "top_ids"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for rule in RULES:
        ours, theirs = rule(Evidence.of(clean, *stats)), rule(Evidence.of(dirty, *again))
        for name in ("weights", "token_advantages", "divergence", "anchor"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), (rule, name)
    assert torch.equal(gradients(model, clean), gradients(model, dirty))
