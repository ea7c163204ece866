"""The callback that measures rounding for the credit rule, and warns if anchors or weights do not exceed it."""

import csv
import json
import warnings
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import pytest
import torch
from every_rule import Sharp, Talk, TalkTasks, random_rows
from tiny_runs import data, generation, module, trainer

from gear_lightning.callbacks.noise_floor import NoiseFloor
from gear_lightning.credit import GEAR, RLSD, RoundingNoise, TokenOnly, TurnSight
from gear_lightning.errors import UserError
from gear_lightning.generation.budgets import Budgets
from gear_lightning.lens.recredit import recorded_noise, recredit
from gear_lightning.module import GearModule
from gear_lightning.probes import rounding
from gear_lightning.probes.noise_floor import MeasureNoise, read_floor, write_result
from gear_lightning.probes.rounding import Floor, chosen, measure_floor
from gear_lightning.runs.records import read_records
from gear_lightning.teacher import TeacherOptions


@dataclass(frozen=True)
class WeakContext(Sharp):
    """A model that depends little on its context: privileged text changes it no more than bfloat16 rounding does."""

    def model(self) -> Any:
        model = super().model()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.mul_(0.02)
        return model


EAGER = GEAR(anchor_rule="absolute", anchor_floor=1e-3, segment_max=1)  # nearly every token is an anchor


class Weights(L.Callback):
    """Keeps the weights after every iteration."""

    def __init__(self):
        self.kept: list[torch.Tensor] = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.kept.append(torch.cat([p.detach().float().flatten() for p in pl_module.policy.parameters()]))


def run(folder, *callbacks, source=WeakContext(), rule=EAGER, **options) -> tuple[list[str], torch.Tensor]:
    """Train and return the warnings about the floor, and the weights after each iteration."""
    torch.manual_seed(0)
    weights = Weights()
    model = GearModule(
        source,
        rule,
        teacher=TeacherOptions("live", template=" <ref> {reference}"),
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-3),
        head_precision="bfloat16" if options.get("precision") == "bf16-mixed" else None,  # maximizes rounding
    )
    tasks = data(train_tasks=TalkTasks(turns=4), val_tasks=None, group_size=6, micro_batch_size=6)
    talk = generation(environment=Talk, budgets=Budgets(4, 80, 24, 250))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(folder, talk, *callbacks, weights, **options).fit(model, datamodule=tasks)
    return [str(w.message) for w in said if "noise" in str(w.message)], torch.stack(weights.kept)


def noise_in(folder) -> list[RoundingNoise]:
    """Return the rounding error that credit rules assumed, by iteration."""
    return [recorded_noise(record) for record in read_records(folder)]


def metrics(folder) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_anchors_inside_the_floor_are_reported_once_with_advice(tmp_path):
    said, _ = run(tmp_path, NoiseFloor(weight_share=1.0), precision="bf16-mixed", max_epochs=4)
    assert len(said) == 1
    share = float(metrics(tmp_path)[0]["credit/anchors_in_noise"])
    assert share > 0.1
    for part in (
        "anchors of GEAR",
        "are inside the noise floor",
        "nats (p99) in bf16-mixed",
        "higher trainer.precision",
    ):
        assert part in said[0]
    assert "model.credit.anchor_floor above" in said[0]
    assert 1e-4 < float(metrics(tmp_path)[0]["credit/noise_p99"]) < 1


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "32-true"},  # the same anchors and weights, above the noise
        {"precision": "32-true", "rule": TokenOnly()},
        {"precision": "bf16-mixed", "source": Sharp(), "rule": GEAR()},  # departures, and the default floor
        {"precision": "bf16-mixed", "source": Sharp(), "rule": RLSD()},
        {"precision": "bf16-mixed", "rule": TurnSight()},  # it does not turn this noise into credit
    ],
    ids=str,
)
def test_credit_above_the_floor_is_not_reported(tmp_path, options):
    assert run(tmp_path, NoiseFloor(), **options)[0] == []


@pytest.mark.parametrize("rule", [TokenOnly(), RLSD(), GEAR()], ids=lambda rule: type(rule).__name__)
def test_weights_inside_the_floor_are_reported_once_also_without_anchors(tmp_path, rule):
    said, _ = run(tmp_path, NoiseFloor(), rule=rule, precision="bf16-mixed", max_epochs=4)
    assert len(said) == 1
    for part in (
        f"of the movement of the weights of {type(rule).__name__} is inside the noise floor",
        "rounding in bf16-mixed",
        "higher trainer.precision",
        "configs/credit/grpo.yaml",
    ):
        assert part in said[0]
    share = [float(row["credit/weights_in_noise"]) for row in metrics(tmp_path)]
    assert share[0] > 0.5
    run(tmp_path / "loud", NoiseFloor(), source=Sharp(), rule=rule, precision="bf16-mixed", max_epochs=1)
    assert float(metrics(tmp_path / "loud")[0]["credit/weights_in_noise"]) < 0.2 < share[0]


def test_a_measured_file_replaces_the_measurement(tmp_path):
    probe = MeasureNoise(micro_batches=1)
    fit = trainer(tmp_path, generation(), probe, precision="32-true")
    fit.fit(module(), datamodule=data())
    high = {**probe.result, "divergence": dict.fromkeys(probe.result["divergence"], 50.0)}
    write_result(tmp_path / "noise_floor.json", high)
    said, _ = run(tmp_path, NoiseFloor(tokens=0), source=Sharp())
    assert len(said) == 1
    assert "already differ by 50 nats (p99)" in said[0]
    assert {row["credit/noise_p99"] for row in metrics(tmp_path)} == {"50.0"}
    assert noise_in(tmp_path) == [RoundingNoise(log_ratio=probe.result["log_ratio"]["p99"])] * 2
    # measured with another precision: reported and not used; refused if the file is given explicitly
    write_result(tmp_path / "noise_floor.json", {**high, "precision": "bf16-true"})
    said, _ = run(tmp_path, NoiseFloor(tokens=0), source=Sharp())
    assert noise_in(tmp_path) == [RoundingNoise()] * 2
    assert len(said) == 1
    assert "measured with precision bf16-true (here 32-true); measure again" in said[0]
    assert said[0].endswith("It is not used.")
    with pytest.raises(UserError, match=r"precision bf16-true \(here 32-true\); measure again"):
        run(tmp_path, NoiseFloor(str(tmp_path / "noise_floor.json")))
    # the same for a file of an earlier version
    write_result(tmp_path / "noise_floor.json", {**high, "format": 1})
    said, _ = run(tmp_path, NoiseFloor(tokens=0), source=Sharp())
    assert "not a result of this version of gear-lightning noise-floor; create it again. It is not used." in said[0]


def test_without_measurement_and_file_nothing_is_reported(tmp_path):
    assert run(tmp_path, NoiseFloor(tokens=0), precision="bf16-mixed")[0] == []
    assert "credit/noise_p99" not in metrics(tmp_path)[0]


def test_rounding_is_measured_once_before_the_first_update(tmp_path):
    """Two forwards per micro-batch of whole rollouts, until there are enough tokens: 12 rollouts, 6 per forward."""
    run(tmp_path / "first", source=Sharp(), max_epochs=1)  # an engine is tested once per process and model class
    for tokens, passes in ((1, 1), (10**9, 2)):
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
        assert len(calls) - len(plain.calls) == 2 * passes
        assert calls.count(0) - plain.calls.count(0) == 2 * passes, "not all before the first update"
        first, *others = noise_in(tmp_path / str(tokens))
        assert first.log_ratio > 0
        assert others == [first] * 2, "it must be constant within the run"


SCALED = GEAR(scale="zscore")


def test_the_credit_rule_gets_the_floor_and_recredit_reads_it_from_the_records(tmp_path):
    """With a teacher signal no larger than rounding, and a rule that normalizes away the size of the signal."""
    options = {"rule": SCALED, "precision": "bf16-mixed"}
    run(tmp_path / "with", NoiseFloor(), **options)
    run(tmp_path / "without", NoiseFloor(tokens=0), **options)
    with_floor, without = (next(read_records(tmp_path / name)) for name in ("with", "without"))
    mask = with_floor.tensors["action_mask"]
    away = [(record.tensors["weights"] - 1).abs()[mask].mean() for record in (with_floor, without)]
    assert 2 * away[0] < away[1]
    torch.testing.assert_close(recredit(with_floor, SCALED).weights, with_floor.tensors["weights"], atol=1e-6, rtol=0)
    # records of earlier versions have no floor: recredit then assumes none
    for rollout in with_floor.rollouts:
        del rollout["noise"]
    again = recredit(with_floor, SCALED)
    torch.testing.assert_close(again.weights, without.tensors["weights"], atol=1e-6, rtol=0)


def test_micro_batches_and_the_order_of_rollouts_do_not_change_the_measurement(tmp_path):
    found = []

    class Measure(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            source = trainer.datamodule
            for size, rows in ((1, source.rows), (3, source.rows), (16, source.rows[::-1])):
                some = chosen(rows, source.group_size, 200)
                context = trainer.strategy.precision_plugin.train_step_context
                floor = measure_floor(pl_module, some, micro_batch_size=size, temperature=1.0, context=context)
                found.append((sorted(row.index for row in some), floor))

    run(tmp_path, Measure(), rule=SCALED, max_epochs=1)
    rows, floors = zip(*found, strict=True)
    assert rows[0] == rows[1] == rows[2]
    assert 1 < len(rows[0]) < 12
    assert len({floor.tokens for floor in floors}) == 1
    for floor in floors[1:]:  # rounding depends on shapes, but its size hardly does
        assert 0.5 < floor.log_ratio / floors[0].log_ratio < 2
    assert floors[0].log_ratio < 1e-4


def test_ranks_choose_the_same_rollouts_and_get_the_same_floor(monkeypatch):
    """Two ranks with one group each choose like one rank with both: first rollouts of every group, then second ones."""
    mine = random_rows(1, (0,) * 8)
    rows = [replace(row, group_id=i // 4, index=i % 4 + 4 * (i // 4)) for i, row in enumerate(mine)]
    one = chosen(rows, 4, 40)
    places = [[((row.index % 4, row.group_id), sum(row.action_mask)) for row in part] for part in (rows[:4], rows[4:])]
    monkeypatch.setattr(rounding, "gather", lambda _: places)
    others = [replace(row, index=row.index % 4) for row in rows[4:]]
    two = [*chosen(rows[:4], 4, 40), *chosen(others, 4, 40)]
    assert [(r.group_id, r.index % 4) for r in one] == [(r.group_id, r.index % 4) for r in two]
    wanted = sorted((r.index % 4, r.group_id) for r in one)
    assert wanted == [(i // 2, i % 2) for i in range(len(wanted))]
    sizes = {place: size for part in places for place, size in part}
    assert sum(sizes[place] for place in wanted) >= 40 > sum(sizes[place] for place in wanted[:-1])


class Stops(L.Callback):
    """Writes a checkpoint in the middle of an iteration, and ends the run."""

    def __init__(self, path, epoch, batch):
        self.path, self.at = path, (epoch, batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [(0, 0), (0, 2), (1, 1)], ids=["first step", "second inner epoch", "later"])
def test_a_resumed_run_keeps_its_measured_floor(tmp_path, at):
    """In bfloat16, with a rule whose weights depend on the floor; also in the middle of an iteration."""

    def fit(name, *callbacks, floor=None, **options):
        torch.manual_seed(0)
        teacher = TeacherOptions("live", template=" <ref> {reference}")
        model = GearModule(WeakContext(), SCALED, teacher=teacher, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
        tasks = data(train_tasks=TalkTasks(turns=2), val_tasks=None, micro_batch_size=4, inner_epochs=2)
        talk = generation(environment=Talk, budgets=Budgets(2, 40, 24, 250))
        floor = floor or NoiseFloor()
        loop = trainer(tmp_path / name, talk, floor, *callbacks, precision="bf16-mixed", max_epochs=3)
        loop.fit(model, datamodule=tasks, **options)
        return model

    whole, middle = fit("whole"), tmp_path / "middle.ckpt"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit("parts", Stops(middle, *at))
    resumed = fit("parts", ckpt_path=middle, weights_only=True)
    assert whole.noise.log_ratio > 1e-3
    assert resumed.noise == whole.noise
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    # an option changed at a resume takes effect
    off = fit("off", floor=NoiseFloor(tokens=0), ckpt_path=middle, weights_only=True)
    assert off.noise == RoundingNoise()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_training_is_bitwise_equal_with_and_without_the_callback(tmp_path, precision):
    plain = run(tmp_path / "plain", precision=precision, max_epochs=3)[1]
    watched = run(tmp_path / "watched", NoiseFloor(tokens=10**9), precision=precision, max_epochs=3)[1]
    assert torch.equal(plain, watched)
    assert (plain[0] != plain[-1]).any()
    ours, theirs = metrics(tmp_path / "watched"), metrics(tmp_path / "plain")
    for mine, other in zip(ours, theirs, strict=True):
        for name in other:
            assert name.startswith(("time/", "perf/")) or mine[name] == other[name], name


def test_counts_and_warnings_survive_a_checkpoint():
    first, second = NoiseFloor(), NoiseFloor()
    first._floor, first._conditions = Floor(0.25, 0.5, 0.1, 300), {"precision": "bf16-mixed"}
    first._anchors, first._moved, first._warned = [3.0, 1.0], [30.0, 0.2, 0.1], {"anchors": True, "weights": False}
    state = json.loads(json.dumps(first.state_dict()))
    second.load_state_dict(state)
    assert second._kept == state["floor"] == {"precision": "bf16-mixed", "floor": first._floor.plain()}
    assert {**second.state_dict(), "floor": None} == {**state, "floor": None}
    second.load_state_dict({"floor": 0.25, "seen": 300.0, "counts": [3.0, 1.0], "warned": True})  # an earlier version


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": -1}, "tokens=-1: must not be negative"),
        ({"share": 0.0}, r"share=0.0: must be in \(0, 1\]"),
        ({"share": 1.5}, r"share=1.5: must be in \(0, 1\]"),
        ({"weight_share": 0.0}, r"weight_share=0.0: must be in \(0, 1\]"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        NoiseFloor(**options)


SIZES = '"log_ratio": {"p99": 1}, "divergence": {"p99": 1}, "weight_spread": {"p99": 1}'


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", f'{{"format": 1, {SIZES}}}', '{"format": 2}', f'{{"format": 2, {SIZES.replace("1", "NaN", 1)}}}'],
)
def test_an_invalid_file_is_refused(tmp_path, text):
    path = tmp_path / "noise_floor.json"
    with pytest.raises(UserError, match="cannot be read"):
        read_floor(path)
    path.write_text(text)
    with pytest.raises(UserError, match="not a result of this version of gear-lightning noise-floor"):
        read_floor(path)
