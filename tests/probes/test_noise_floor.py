"""The noise floor: the effect of rounding on credit."""

from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from every_rule import Sharp, random_rows
from tiny_runs import data, generation, module, trainer
from torch.testing import assert_close

from gear_lightning.batch import Credit, RolloutBatch, collate
from gear_lightning.credit import GEAR, PBSD, RLSD, SCGRPO, RoundingNoise, TokenOnly, Turn, TurnSight
from gear_lightning.errors import UserError
from gear_lightning.learning.token_stats import token_stats
from gear_lightning.probes.noise_floor import (
    STAND_IN,
    MeasureNoise,
    Noise,
    anchor_tokens,
    measure,
    moved,
    noise_of,
    quantiles,
    read_floor,
    rounding_of,
    score,
    summary,
    teacher_view,
    weight_spread,
    write_result,
)
from gear_lightning.teacher import Teacher, TeacherOptions

HINTS = (3, 40, 0, 7, 20)
BF16 = torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def policy() -> Any:
    return Sharp().model()


@pytest.fixture(scope="module")
def batch() -> RolloutBatch:
    return collate(random_rows(5, HINTS * 8), step_tokens=1, step_rollouts=1, temperature=1.0)


def in_bf16(policy, batch, rule) -> Noise:
    with BF16:
        return measure(policy, batch, rule)


# -- the measurement --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [GEAR(), TokenOnly(), Turn(), RLSD(), GEAR("jsd", sign_rule="symmetric")], ids=repr)
def test_the_floor_is_tiny_in_float32_and_larger_in_bfloat16(policy, batch, rule):
    exact, rounded = measure(policy, batch, rule), in_bf16(policy, batch, rule)
    assert exact.divergence.max() < 1e-4
    assert exact.anchors == rounded.anchors == 0, "the anchor threshold must be far above the noise of this model"
    assert rounded.divergence.max() > 100 * exact.divergence.max()
    if getattr(rule, "signed", True):  # unsigned: scaled by the rollout's own scale, even if it is noise
        assert_close(exact.weights, torch.ones_like(exact.weights), atol=1e-4, rtol=0)
        assert (rounded.weights - 1).abs().max() > 1e-3


def test_the_floor_equals_the_error_of_low_precision_with_real_privileged_text(policy, batch):
    """The reference is the difference of the divergence with real privileged text between bfloat16 and float32."""

    def divergence() -> torch.Tensor:
        with torch.no_grad():
            ours = token_stats(policy, batch.tokens, batch.valid, batch.action_mask)
        theirs = Teacher(policy, TeacherOptions("live")).score(policy, batch, batch.action_mask)
        return (ours.logprobs - theirs.logprobs)[batch.action_mask & batch.privileged[:, None]]

    exact = divergence()
    with BF16:
        error = (divergence() - exact).abs()
    assert exact.abs().median() > 0.1
    floor = in_bf16(policy, batch, GEAR()).divergence
    for q in (0.5, 0.9, 0.99):
        assert 0.5 < floor.quantile(q) / error.quantile(q) < 2


def test_both_forwards_have_the_shapes_and_positions_of_training(batch):
    view, shift = teacher_view(batch)
    lengths = batch.valid.sum(-1)
    assert torch.equal(shift[batch.privileged], batch.teacher_offset[batch.privileged])
    assert (shift[~batch.privileged] == STAND_IN).all()
    assert (~batch.privileged).any()
    assert view.teacher_tokens.shape[1] == (lengths + shift).max()
    with_text = replace(batch, privileged=torch.ones_like(batch.privileged), teacher_offset=batch.teacher_offset + 1)
    columns = (batch.teacher_valid.sum(-1) + 1).max()
    assert teacher_view(with_text)[0].teacher_tokens.shape[1] == columns, "must be as wide as the real teacher's view"
    for row in range(batch.size):
        n = int(lengths[row])
        assert torch.equal(view.teacher_tokens[row, :n], batch.tokens[row, :n]), "must have the policy's own prompt"
        assert view.teacher_valid[row].sum() == n
    for name in ("tokens", "valid", "action_mask", "turn_ids", "stop_mask", "temperature"):
        assert getattr(view, name) is getattr(batch, name)


def test_rollouts_with_advantage_0_are_measured_with_advantage_1(policy, batch):
    flat = replace(batch, base_advantages=torch.zeros_like(batch.base_advantages))
    ones = replace(batch, base_advantages=torch.ones_like(batch.base_advantages))
    assert torch.equal(in_bf16(policy, flat, GEAR()).weights, in_bf16(policy, ones, GEAR()).weights)
    assert (in_bf16(policy, flat, GEAR()).weights != 1).any()
    once = replace(batch, solved=torch.ones_like(batch.solved))  # in training, these have weight 1 with SC-GRPO
    assert (in_bf16(policy, once, SCGRPO()).weights != 1).any()


def test_moving_a_rotary_model_changes_only_rounding_and_is_undone(policy, batch):
    def logprobs() -> torch.Tensor:
        with torch.no_grad():
            return token_stats(policy, batch.tokens, batch.valid, batch.action_mask).logprobs

    before = logprobs()
    for distance in (0, 40):
        with moved(policy, torch.full((batch.size,), distance)):
            there = logprobs()
        assert torch.equal(there, before) == (distance == 0)
        assert_close(there, before, atol=1e-4, rtol=0)
    assert torch.equal(logprobs(), before)


def test_a_model_with_absolute_positions_is_not_moved_or_padded_beyond_its_length(batch):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    columns = batch.tokens.shape[1]
    sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": columns}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    noise = measure(model, batch, GEAR())
    assert noise.shape == (batch.size, columns, columns)
    assert noise.divergence.max() < 1e-4


def test_the_policy_keeps_its_mode_and_gets_no_gradient(policy, batch):
    for training in (True, False):
        policy.train(training)
        measure(policy, batch, GEAR())
        assert all(part.training is training for part in policy.modules())
    assert all(p.grad is None for p in policy.parameters())
    policy.eval()


def test_rules_use_the_99th_percentiles_of_the_finite_values():
    values = torch.cat([torch.arange(101.0), torch.tensor([float("nan"), float("inf")])])
    assert rounding_of(values, 2 * values, GEAR()) == RoundingNoise(99.0, 0.0), "it must compare only sampled tokens"
    assert rounding_of(values, 2 * values, SCGRPO()) == RoundingNoise(99.0, 198.0)
    assert rounding_of(values[:0], values[-1:], SCGRPO()) == RoundingNoise()


@pytest.mark.parametrize("rule", [TurnSight(), GEAR(scale="zscore"), PBSD()], ids=lambda rule: type(rule).__name__)
def test_a_rule_with_the_rounding_constant_gives_noise_no_credit(policy, batch, rule):
    with BF16:
        scored = score(policy, batch, rule)
    unknown = noise_of(scored, rule)
    known = noise_of(scored, rule, rounding_of(unknown.log_ratio, unknown.divergence, rule))
    assert (known.weights - 1).abs().mean() < 0.02
    assert (unknown.weights - 1).abs().mean() > 2 * (known.weights - 1).abs().mean()


def test_the_spread_of_a_weight_is_its_distance_from_the_rollouts_median():
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    weights = torch.tensor([[1.0, 0.8, 1.9, 7.0], [0.5, 1.5, 7.0, 7.0]])
    credit = Credit(weights, weights, weights, torch.full((2, 4), -1))
    assert_close(weight_spread(credit, mask)[mask], torch.tensor([0.0, 0.2, 0.9, 0.5, 0.5]))


def test_a_blank_micro_batch_has_no_noise(policy):
    blank = collate([], step_tokens=1, step_rollouts=1, temperature=1.0)
    noise = measure(policy, blank, GEAR())
    assert (len(noise.divergence), noise.anchors, noise.rollouts) == (0, 0, 0)
    with pytest.raises(UserError, match="nothing to measure"):
        summary([noise])


def test_summary_matches_numpy():
    rng = np.random.default_rng(0)
    parts = [
        Noise(
            *(torch.tensor(rng.exponential(size=n)) for _ in range(2)),
            torch.tensor(1 + rng.normal(size=n) / 50),
            torch.tensor(rng.exponential(size=n)),
            a,
            r,
            (r, 9, 12),
        )
        for n, a, r in ((300, 2, 4), (41, 1, 2))
    ]
    result = summary(parts)
    divergence, weights = (np.concatenate([getattr(p, k).numpy() for p in parts]) for k in ("divergence", "weights"))
    percent = {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "p99.9": 99.9, "max": 100}
    log_ratio, spread = (np.concatenate([getattr(p, k).numpy() for p in parts]) for k in ("log_ratio", "spread"))
    for key, values in (
        ("log_ratio", log_ratio),
        ("divergence", divergence),
        ("weight", weights),
        ("weight_off_one", abs(weights - 1)),
        ("weight_spread", spread),
    ):
        for name, p in percent.items():
            assert result[key][name] == pytest.approx(np.percentile(values, p))
    assert result["weight"]["min"] == weights.min()
    assert result["share_of_weights_off_one"] == pytest.approx((abs(weights - 1) > 0.01).mean())
    assert (result["tokens"], result["rollouts"], result["anchors_per_rollout"]) == (341, 6, 0.5)
    assert result["shapes"][1] == {"rows": 2, "columns": 9, "teacher_columns": 12}
    with pytest.raises(UserError, match="not finite"):
        summary([replace(parts[0], divergence=parts[0].divergence * float("nan"))])
    assert quantiles(torch.tensor([2.0])) == dict.fromkeys(percent, 2.0)


def test_anchors_are_the_first_tokens_of_segments_but_not_of_turns():
    anchor = torch.tensor([[-1, 1, 1, -1, 4], [-1, -1, 2, 2, 2]])
    zero = torch.zeros(2, 5)
    credit = Credit(zero, zero, zero, anchor)
    assert anchor_tokens(GEAR(), credit).nonzero().tolist() == [[0, 1], [0, 4], [1, 2]]
    assert not anchor_tokens(Turn(), credit).any()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_forward_without_gradient_is_bitwise_that_of_training(tmp_path, precision):
    class Both(L.Callback):
        pairs: list = []  # noqa: RUF012

        def on_train_batch_start(self, trainer, pl_module, batch, idx):
            with torch.no_grad(), trainer.strategy.precision_plugin.train_step_context():
                self.ours = token_stats(pl_module.policy, batch.tokens, batch.valid, batch.action_mask).logprobs

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, idx):
            self.pairs.append((self.ours, outputs["policy"].logprobs.detach()))

    both = Both()
    trainer(tmp_path, generation(), both, precision=precision).fit(module(), datamodule=data())
    assert len(both.pairs) == 4
    assert all(torch.equal(*pair) for pair in both.pairs)


@pytest.mark.parametrize(("precision", "size"), [("32-true", 1e-4), ("bf16-mixed", 1.0), ("bf16-true", 1.0)])
def test_measuring_uses_the_recipes_precision_and_makes_no_optimizer_step(tmp_path, precision, size):
    probe = MeasureNoise(micro_batches=1)
    fit = trainer(tmp_path, generation(), probe, precision=precision)
    model = module()
    fit.fit(model, datamodule=data())
    result = probe.result
    assert fit.global_step == 0
    assert result["precision"] == {"bf16-mixed": "bf16-mixed, head in float32"}.get(precision, precision)
    assert result["weights_dtype"] == ("bfloat16" if precision == "bf16-true" else "float32")
    assert result["shapes"][0]["rows"] == 4
    assert len(result["shapes"]) == 1
    assert result["shapes"][0]["teacher_columns"] > result["shapes"][0]["columns"]
    assert 0 < result["divergence"]["max"] < size
    assert (result["divergence"]["max"] > 1e-4) == (precision != "32-true")
    path = tmp_path / "out" / "floor.json"
    write_result(path, result)
    assert read_floor(path) == result
