"""The callback that warns where anchors of credit sit inside the noise floor, and changes nothing else."""

import csv
import json
import warnings
from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import torch
from laws import Sharp, Talk, TalkTasks
from tiny import data, generation, module, trainer

from gear_lightning.callbacks.noise_floor import NoiseFloor
from gear_lightning.credit import GEAR, TokenOnly, Turn
from gear_lightning.errors import UserError
from gear_lightning.module import GearModule
from gear_lightning.noise_floor import (
    MeasureNoise,
    read_floor,
    write_result,
)
from gear_lightning.rollout import Budgets
from gear_lightning.teacher import TeacherOptions


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
    write_result(tmp_path / "noise_floor.json", high)
    said, _ = run(tmp_path, NoiseFloor(tokens=0), source=Sharp())
    assert len(said) == 1
    assert "already differ by 50 nats (p99)" in said[0]
    assert {row["credit/noise_p99"] for row in metrics(tmp_path)} == {"50.0"}
    # of another precision: said, and not used; asked for by name: refused
    write_result(tmp_path / "noise_floor.json", {**high, "precision": "bf16-true"})
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
