"""The noise floor: what rounding does to credit, and the warning where anchors sit inside it."""

import csv
import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from laws import Sharp, Talk, TalkTasks, random_rows
from tiny import data, generation, module, trainer
from torch.testing import assert_close

from gear_lightning.batch import Credit, RolloutBatch, collate
from gear_lightning.callbacks.noise_floor import NoiseFloor
from gear_lightning.credit import GEAR, RLSD, TokenOnly, Turn
from gear_lightning.errors import UserError
from gear_lightning.module import GearModule
from gear_lightning.noise_floor import (
    STAND_IN,
    MeasureNoise,
    Noise,
    anchor_tokens,
    measure,
    moved,
    quantiles,
    read_floor,
    recorded_batches,
    summary,
    teacher_view,
    write_floor,
)
from gear_lightning.rollout import Budgets
from gear_lightning.teacher import Teacher, TeacherOptions
from gear_lightning.token_stats import token_stats

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
def test_float32_has_a_tiny_floor_and_bfloat16_a_larger_one(policy, batch, rule):
    exact, rounded = measure(policy, batch, rule), in_bf16(policy, batch, rule)
    assert exact.divergence.max() < 1e-4
    assert exact.anchors == rounded.anchors == 0, "the floor of an anchor is far above the noise of this model"
    assert rounded.divergence.max() > 100 * exact.divergence.max()
    if getattr(rule, "signed", True):  # an unsigned divergence is scaled by the rollout's own, noise or not
        assert_close(exact.weights, torch.ones_like(exact.weights), atol=1e-4, rtol=0)
        assert (rounded.weights - 1).abs().max() > 1e-3


def test_the_floor_is_the_error_of_low_precision_on_real_privileged_text(policy, batch):
    """Reference: the same divergence, with real privileged text, in bfloat16 and in float32."""

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


def test_both_sides_have_the_shapes_and_places_of_training(batch):
    view, shift = teacher_view(batch)
    lengths = batch.valid.sum(-1)
    assert torch.equal(shift[batch.privileged], batch.teacher_offset[batch.privileged])
    assert (shift[~batch.privileged] == STAND_IN).all()
    assert (~batch.privileged).any()
    assert view.teacher_tokens.shape[1] == (lengths + shift).max()
    with_text = replace(batch, privileged=torch.ones_like(batch.privileged), teacher_offset=batch.teacher_offset + 1)
    columns = (batch.teacher_valid.sum(-1) + 1).max()
    assert teacher_view(with_text)[0].teacher_tokens.shape[1] == columns, "as wide as the real teacher's view"
    for row in range(batch.size):
        n = int(lengths[row])
        assert torch.equal(view.teacher_tokens[row, :n], batch.tokens[row, :n]), "the policy's own prompt"
        assert view.teacher_valid[row].sum() == n
    for name in ("tokens", "valid", "action_mask", "turn_ids", "stop_mask", "temperature"):
        assert getattr(view, name) is getattr(batch, name)


def test_rollouts_without_an_advantage_are_measured_as_if_they_had_one(policy, batch):
    flat = replace(batch, advantages=torch.zeros_like(batch.advantages))
    ones = replace(batch, advantages=torch.ones_like(batch.advantages))
    assert torch.equal(in_bf16(policy, flat, GEAR()).weights, in_bf16(policy, ones, GEAR()).weights)
    assert (in_bf16(policy, flat, GEAR()).weights != 1).any()


def test_moving_a_rotary_model_changes_rounding_alone_and_leaves_nothing_behind(policy, batch):
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


def test_a_model_that_counts_its_positions_stays_where_it_is_and_gets_no_more_columns_than_it_has(batch):
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


def test_a_blank_micro_batch_has_no_noise(policy):
    blank = collate([], step_tokens=1, step_rollouts=1, temperature=1.0)
    noise = measure(policy, blank, GEAR())
    assert (len(noise.divergence), noise.anchors, noise.rollouts) == (0, 0, 0)
    with pytest.raises(UserError, match="nothing to measure"):
        summary([noise])


def test_summary_against_numpy():
    rng = np.random.default_rng(0)
    parts = [
        Noise(torch.tensor(rng.exponential(size=n)), torch.tensor(1 + rng.normal(size=n) / 50), a, r, (r, 9, 12))
        for n, a, r in ((300, 2, 4), (41, 1, 2))
    ]
    told = summary(parts)
    divergence, weights = (np.concatenate([getattr(p, k).numpy() for p in parts]) for k in ("divergence", "weights"))
    percent = {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "p99.9": 99.9, "max": 100}
    for key, values in (("divergence", divergence), ("weight", weights), ("weight_off_one", abs(weights - 1))):
        for name, p in percent.items():
            assert told[key][name] == pytest.approx(np.percentile(values, p))
    assert told["weight"]["min"] == weights.min()
    assert told["share_of_weights_off_one"] == pytest.approx((abs(weights - 1) > 0.01).mean())
    assert (told["tokens"], told["rollouts"], told["anchors_per_rollout"]) == (341, 6, 0.5)
    assert told["shapes"][1] == {"rows": 2, "columns": 9, "teacher_columns": 12}
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
def test_the_pass_without_gradient_is_that_of_training_bit_for_bit(tmp_path, precision):
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
def test_measuring_takes_the_recipes_precision_and_takes_no_step(tmp_path, precision, size):
    probe = MeasureNoise(micro_batches=1)
    fit = trainer(tmp_path, generation(), probe, precision=precision)
    model = module()
    fit.fit(model, datamodule=data())
    told = probe.result
    assert fit.global_step == 0
    assert told["precision"] == precision
    assert told["weights_dtype"] == ("bfloat16" if precision == "bf16-true" else "float32")
    assert told["shapes"][0]["rows"] == 4
    assert len(told["shapes"]) == 1
    assert told["shapes"][0]["teacher_columns"] > told["shapes"][0]["columns"]
    assert 0 < told["divergence"]["max"] < size
    assert (told["divergence"]["max"] > 1e-4) == (precision != "32-true")
    path = tmp_path / "out" / "floor.json"
    write_floor(path, told)
    assert read_floor(path) == told


# -- the warning ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deaf(Sharp):
    """Hardly hears what stands before a token: privileged text moves it no more than bfloat16's rounding does."""

    def model(self) -> Any:
        model = super().model()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.mul_(0.03)
        return model


EAGER = GEAR(anchor_rule="absolute", anchor_floor=1e-3, segment_max=1)  # nearly every token is an anchor


class Weights(L.Callback):
    """Keeps the weights after every iteration."""

    def __init__(self):
        self.kept: list[torch.Tensor] = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.kept.append(torch.cat([p.detach().float().flatten() for p in pl_module.policy.parameters()]))


def run(folder, *callbacks, source=Deaf(), rule=EAGER, **options) -> tuple[list[str], torch.Tensor]:
    """Warnings about the floor, and the weights after each iteration."""
    torch.manual_seed(0)
    weights = Weights()
    model = GearModule(
        source,
        rule,
        teacher=TeacherOptions("live", template=" <ref> {reference}"),
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-3),
    )
    tasks = data(train_tasks=TalkTasks(turns=4), val_tasks=None, group_size=6, micro_batch_size=6)
    talk = generation(environment=Talk, budgets=Budgets(4, 80, 24, 250))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(folder, talk, *callbacks, weights, **options).fit(model, datamodule=tasks)
    return [str(w.message) for w in said if "noise" in str(w.message)], torch.stack(weights.kept)


def metrics(folder) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_anchors_inside_the_floor_are_reported_once_with_what_to_do(tmp_path):
    said, _ = run(tmp_path, NoiseFloor(), precision="bf16-mixed", max_epochs=4)
    assert len(said) == 1
    share = float(metrics(tmp_path)[0]["credit/anchors_in_noise"])
    assert share > 0.1
    for part in (
        "anchors of GEAR",
        "sit inside the noise floor",
        "nats (p99) in bf16-mixed",
        "wider trainer.precision",
    ):
        assert part in said[0]
    assert "model.credit.anchor_floor above" in said[0]
    assert 1e-4 < float(metrics(tmp_path)[0]["credit/noise_p99"]) < 1


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "32-true"},  # the same anchors, above the noise
        {"precision": "bf16-mixed", "source": Sharp(), "rule": GEAR()},  # departures, and the default floor
        {"precision": "bf16-mixed", "rule": TokenOnly()},  # no anchors
        {"precision": "bf16-mixed", "rule": Turn()},
    ],
    ids=str,
)
def test_anchors_above_the_floor_and_rules_without_anchors_are_not_reported(tmp_path, options):
    assert run(tmp_path, NoiseFloor(), **options)[0] == []


def test_a_measured_file_takes_the_place_of_measuring(tmp_path):
    probe = MeasureNoise(micro_batches=1)
    fit = trainer(tmp_path, generation(), probe, precision="32-true")
    fit.fit(module(), datamodule=data())
    high = {**probe.result, "divergence": dict.fromkeys(probe.result["divergence"], 50.0)}
    write_floor(tmp_path / "noise_floor.json", high)
    said, _ = run(tmp_path, NoiseFloor(tokens=0), source=Sharp())
    assert len(said) == 1
    assert "already differ by 50 nats (p99)" in said[0]
    assert {row["credit/noise_p99"] for row in metrics(tmp_path)} == {"50.0"}
    # of another precision: said, and not used; asked for by name: refused
    write_floor(tmp_path / "noise_floor.json", {**high, "precision": "bf16-true"})
    said, _ = run(tmp_path, NoiseFloor(tokens=0), source=Sharp())
    assert len(said) == 1
    assert "measured with precision bf16-true (here 32-true); measure again" in said[0]
    assert said[0].endswith("It is not used.")
    with pytest.raises(UserError, match=r"precision bf16-true \(here 32-true\); measure again"):
        run(tmp_path, NoiseFloor(str(tmp_path / "noise_floor.json")))


def test_never_measuring_and_having_no_file_says_nothing(tmp_path):
    assert run(tmp_path, NoiseFloor(tokens=0), precision="bf16-mixed")[0] == []
    assert "credit/noise_p99" not in metrics(tmp_path)[0]


def test_measuring_ends_when_the_floor_rests_on_enough_tokens(tmp_path):
    for tokens, passes in ((1, 1), (10**9, 3)):
        calls = []

        class Count(L.Callback):
            def setup(self, trainer, pl_module, stage):
                pl_module.configure_model()
                body, calls = pl_module.policy.get_decoder(), self.calls
                body.register_forward_pre_hook(lambda *a: calls.append(pl_module.trainer.global_step))

        plain = Count()
        plain.calls = []
        run(tmp_path / f"plain-{tokens}", plain, source=Sharp(), max_epochs=3)
        watched = Count()
        watched.calls = calls
        run(tmp_path / str(tokens), watched, NoiseFloor(tokens=tokens), source=Sharp(), max_epochs=3)
        assert len(calls) - len(plain.calls) == 2 * passes, "two forwards for each measurement"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_training_is_the_same_bit_for_bit_with_and_without_it(tmp_path, precision):
    plain = run(tmp_path / "plain", precision=precision, max_epochs=3)[1]
    watched = run(tmp_path / "watched", NoiseFloor(tokens=10**9), precision=precision, max_epochs=3)[1]
    assert torch.equal(plain, watched)
    assert (plain[0] != plain[-1]).any()
    ours, theirs = metrics(tmp_path / "watched"), metrics(tmp_path / "plain")
    for mine, other in zip(ours, theirs, strict=True):
        for name in other:
            assert name.startswith(("time/", "perf/")) or mine[name] == other[name], name


def test_what_was_measured_survives_a_checkpoint():
    first, second = NoiseFloor(), NoiseFloor()
    first._floor, first._seen, first._counts, first._warned = 0.25, 300.0, [3.0, 1.0], True
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": -1}, "tokens=-1 must not be negative"),
        ({"share": 0.0}, r"share=0.0 must lie in \(0, 1\]"),
        ({"share": 1.5}, r"share=1.5 must lie in \(0, 1\]"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        NoiseFloor(**options)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 0, "divergence": {"p99": 1}}', '{"format": 1}'])
def test_a_file_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "noise_floor.json"
    with pytest.raises(UserError, match="cannot be read"):
        read_floor(path)
    path.write_text(text)
    with pytest.raises(UserError, match="not a file of gear-lightning noise-floor"):
        read_floor(path)


# -- recorded rollouts and the command line ---------------------------------------------------------------------------


def test_recorded_rollouts_give_back_what_was_trained_on(tmp_path):
    seen: list[RolloutBatch] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, idx):
            if trainer.current_epoch == 1:
                seen.append(batch)

    trainer(tmp_path, generation(), Keep()).fit(module(), datamodule=data())
    found = recorded_batches(tmp_path, micro_batch_size=4, temperature=1.0, vocabulary=200)
    assert [b.size for b in found] == [b.size for b in seen] == [4, 4]
    for ours, theirs in zip(found, seen, strict=True):
        for name in ("tokens", "valid", "action_mask", "turn_ids", "stop_mask", "sampler_logprobs", "advantages"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert not ours.privileged.any()
    assert measure(module().source.model(), found[0], GEAR()).divergence.max() < 1e-4
    with pytest.raises(UserError, match="another tokenizer"):
        recorded_batches(tmp_path, micro_batch_size=4, temperature=1.0, vocabulary=7)


COMMAND = [
    "noise-floor", "--config", "configs/quickstart.yaml", "--warm_start=null", "--model.policy.hidden_size", "32",
    "--model.policy.layers", "2", "--data.tasks_per_iteration", "2", "--data.group_size", "4",
    "--data.micro_batch_size", "4", "--data.val_limit", "4",
]  # fmt: skip


def command(repository, *args: object) -> tuple[int, str, str]:
    """Run ``gear-lightning`` in a process of its own: exit status, stdout, stderr."""
    line = [sys.executable, "-m", "gear_lightning", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(repository), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(line, cwd=repository, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_the_command_measures_a_recipe_and_a_run_and_leaves_the_run_alone(tmp_path, repository):
    where = ["--trainer.default_root_dir", tmp_path]
    status, out, err = command(repository, *COMMAND, *where, "--trainer.precision", "bf16-mixed")
    assert status == 0, err
    assert "Noise floor of GEAR (k1) in bf16-mixed on cpu" in out
    for part in ("p50", "p99.9", "|divergence|, nats", "weights further than 0.01 from 1", "anchors: 0 per rollout"):
        assert part in out
    assert [p.name for p in tmp_path.iterdir()] == ["noise_floor.json"]
    told = read_floor(tmp_path / "noise_floor.json")
    assert told["divergence"]["max"] > 1e-4
    assert told["rollouts"] == 8

    fit = ["fit", *COMMAND[1:], *where, "--trainer.max_epochs", "1", "--trainer.precision", "bf16-mixed"]
    status, out, err = command(repository, *fit)
    assert status == 0, err
    assert float(metrics(tmp_path)[-1]["credit/noise_p99"]) == pytest.approx(told["divergence"]["p99"])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    other = ["--rollouts", tmp_path, "--out", tmp_path / "other.json", "--ckpt_path", "last", "--micro_batches", "1"]
    status, out, err = command(repository, *COMMAND, *where, "--trainer.precision", "bf16-mixed", *other)
    assert status == 0, err
    again = read_floor(tmp_path / "other.json")
    assert (again["rollouts"], again["rollouts_from"]) == (4, str(tmp_path))
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "other.json"}
    assert after == before, "the run was changed"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "configs/credit/grpo.yaml"], "model.credit=Uniform has no teacher"),
        (["--rollouts", "no/such/run"], "no/such/run/rollouts: no rollout records; is this a run directory?"),
        (["--roll_outs", "x"], "--roll_outs"),
        (["--micro_batches", "0"], "micro_batches=0 must be at least 1"),
        (["--out", "configs/quickstart.yaml/x.json"], "configs/quickstart.yaml/x.json: cannot be written"),
    ],
    ids=["no teacher", "no rollouts", "unknown key", "no micro-batch", "no place"],
)
def test_what_cannot_be_measured_is_told_in_one_line(tmp_path, repository, args, message):
    status, _, err = command(repository, *COMMAND, "--trainer.default_root_dir", tmp_path / "run", *args)
    assert status == 2, err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert message in line
