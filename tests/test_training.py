"""The complete training loop, on a tiny policy."""

import csv
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_runs import data, generation, module, trainer

from gear_lightning.credit import GEAR, Uniform
from gear_lightning.errors import UserError
from gear_lightning.runs.records import TENSOR_KEYS, read_records


def fit(run: Path, model=None, source=None, generate=None, **options):
    torch.manual_seed(0)
    model = model or module()
    trainer(run, generate or generation(), **options).fit(model, datamodule=source or data())
    return model


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, fit(folder)


def test_metrics_of_every_iteration_are_logged(run):
    folder, _ = run
    found = rows(folder)
    assert [row["step"] for row in found] == ["1", "2"]
    for name in (
        "train/reward",
        "train/zero_spread_groups",
        "train/entropy",
        "train/clip_fraction",
        "train/grad_norm",
        "credit/segment_token_fraction",
        "credit/segments_per_rollout",
        "credit/divergence_p95",
        "credit/weight_clip_fraction",
        "teacher/student_gap",
        "time/rollout_s",
        "time/update_s",
        "perf/rollout_tokens_per_s",
    ):
        assert all(row[name] for row in found), name
    assert float(found[0]["train/sampler_gap_max"]) < 1e-5, "sampler and trainer disagree on log-probs"


def test_the_cost_of_a_run_is_counted_from_its_start(run):
    """Two iterations of 2 tasks x 4 rollouts; tokens as in the records; seconds as logged."""
    folder, _ = run
    found = rows(folder)
    assert [float(row["perf/rollouts"]) for row in found] == [8, 16]
    sampled = [int(record.tensors["action_mask"].sum()) for record in read_records(folder)]
    assert [float(row["perf/sampled_tokens"]) for row in found] == [sampled[0], sum(sampled)]
    spent = [float(row["time/rollout_s"]) + float(row["time/update_s"]) for row in found]
    assert [float(row["perf/seconds"]) for row in found] == pytest.approx([spent[0], sum(spent)], rel=1e-4)


def test_records_contain_the_data_used_in_training(run):
    folder, _ = run
    records = list(read_records(folder))
    assert [r.iteration for r in records] == [0, 1]
    for record in records:
        assert set(record.tensors) == set(TENSOR_KEYS)
        tensors, mask = record.tensors, record.tensors["action_mask"]
        assert torch.allclose(
            tensors["token_advantages"], torch.where(mask, tensors["weights"] * tensors["advantages"][:, None], 0)
        )
        assert (tensors["policy_version"] == record.iteration).all()
        assert sorted(r["row"] for r in record.rollouts if r["row"] is not None) == list(range(len(mask)))


def test_credit_can_be_recomputed_from_records(run):
    from gear_lightning.batch import TokenStats
    from gear_lightning.credit import Evidence

    for record in read_records(run[0]):
        t = record.tensors
        evidence = Evidence(
            t["advantages"],
            t["action_mask"],
            t["turn_ids"],
            t["stop_mask"],
            t["policy_version"],
            TokenStats(t["policy_logprobs"], t["entropy"]),
            TokenStats(t["teacher_logprobs"], t["entropy"]),
        )
        again = GEAR()(evidence)
        assert torch.allclose(again.weights, t["weights"], atol=1e-5)
        assert torch.equal(again.anchor, t["anchor"])


def test_weights_change_and_the_teacher_follows(tmp_path):
    model = fit(tmp_path)
    start = module()
    start.trainer = trainer(tmp_path / "other")
    start.configure_model()
    moved = [not torch.equal(a, b) for a, b in zip(model.policy.parameters(), start.policy.parameters(), strict=True)]
    assert any(moved)
    # two steps of the average: the teacher lies between the start and the policy
    first, teacher, policy = (
        torch.cat([p.detach().flatten() for p in m.parameters()])
        for m in (start.policy, model.teacher.model, model.policy)
    )
    assert 0 < (teacher - first).norm() < (policy - first).norm()


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_gradient_does_not_depend_on_the_micro_batch(tmp_path, micro_batch_size):
    def weights(size: int) -> torch.Tensor:
        folder = tmp_path / str(size)
        optimizer = lambda p: torch.optim.SGD(p, lr=1.0)  # noqa: E731  (Adam would hide a wrong scale)
        model = fit(folder, module(optimizer=optimizer), data(micro_batch_size=size), max_epochs=1)
        return torch.cat([p.detach().flatten() for p in model.policy.parameters()])

    assert torch.allclose(weights(micro_batch_size), weights(3), atol=1e-5)


def test_uniform_runs_no_teacher(tmp_path):
    model = fit(tmp_path, module(Uniform()))
    assert model.teacher is None
    assert all((r.tensors["weights"] == 1).all() for r in read_records(tmp_path))


def test_inner_epochs_take_several_steps_on_frozen_credit(tmp_path):
    model = fit(tmp_path, source=data(inner_epochs=3), max_epochs=1)
    assert model.trainer.global_step == 3


def test_group_of_one_is_rejected():
    with pytest.raises(UserError, match="group_size=1"):
        data(group_size=1)


def test_task_without_reference_is_rejected(tmp_path):
    from dataclasses import replace

    from gear_lightning.environments.lookup_chain import LookupChainTasks

    class Bare(LookupChainTasks):
        def __getitem__(self, index):
            return replace(super().__getitem__(index), reference=None)

    with pytest.raises(UserError, match=r"lookup-train-0-0 has no reference.*GEAR"):
        fit(tmp_path, source=data(train_tasks=Bare(2)))


def test_a_run_resumed_between_iterations_equals_an_uninterrupted_one(tmp_path):
    whole = fit(tmp_path / "whole", max_epochs=4)
    first = trainer(tmp_path / "parts", generation(), max_epochs=2)
    first.fit(module(), datamodule=data())
    first.save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(99)  # a new process has another random state
    model = module()
    trainer(tmp_path / "parts", generation(), max_epochs=4).fit(
        model, datamodule=data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    same_weights(whole, model)
    same_metrics(tmp_path / "whole", tmp_path / "parts")
    same_totals(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(("inner_epochs", "batch_idx"), [(1, 0), (1, 2), (1, 3), (2, 3), (2, 4), (2, 7)])
def test_a_checkpoint_within_an_iteration_resumes_exactly(tmp_path, inner_epochs, batch_idx):
    import lightning as L

    class SaveAndStop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, idx):
            if trainer.current_epoch == 1 and idx == batch_idx:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")
                raise KeyboardInterrupt

    options = {"micro_batch_size": 2, "inner_epochs": inner_epochs}
    whole = fit(tmp_path / "whole", source=data(**options), max_epochs=3)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path / "parts", generation(), SaveAndStop(), max_epochs=3).fit(module(), datamodule=data(**options))
    model = module()
    trainer(tmp_path / "parts", generation(), max_epochs=3).fit(
        model, datamodule=data(**options), ckpt_path=tmp_path / "mid.ckpt", weights_only=True
    )
    same_weights(whole, model)
    same_totals(tmp_path / "whole", tmp_path / "parts")
    if inner_epochs == 1 and batch_idx < 3:  # after the last step, an iteration's metrics are lost until its end
        same_metrics(tmp_path / "whole", tmp_path / "parts")


def same_weights(one, other):
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def same_metrics(one: Path, other: Path):
    left, right = rows(one), rows(other)
    timing = ("time/", "perf/rollout_", "perf/update_", "perf/padding", "perf/seconds")
    assert [{k: v for k, v in row.items() if not k.startswith(timing)} for row in left] == [
        {k: v for k, v in row.items() if not k.startswith(timing)} for row in right
    ]


def same_totals(one: Path, other: Path):
    """Check that two runs have the same totals since the start; their times may differ."""
    for name in ("perf/rollouts", "perf/sampled_tokens"):
        assert float(rows(one)[-1][name]) == float(rows(other)[-1][name]), name
    seconds = [float(row["perf/seconds"]) for row in rows(other)]
    assert all(before < after for before, after in pairwise([0.0, *seconds]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher": "live"}, "model.teacher.weights=ema, and this run has live"),
        ({"optimizer": "SGD"}, "model.optimizer=AdamW, and this run has SGD"),
        ({"precision": "bf16-true"}, "trainer.precision=32-true, and this run has bf16-true"),
        ({"source": 64}, r"model.policy=[\d,]+ weights in \d+ tensors"),
    ],
)
def test_resuming_with_other_options_names_them(tmp_path, changed, message):
    from tiny_runs import source as policy

    from gear_lightning.module import GearModule
    from gear_lightning.teacher import TeacherOptions

    first = trainer(tmp_path, generation(), max_epochs=1)
    first.fit(module(), datamodule=data())
    first.save_checkpoint(tmp_path / "one.ckpt")
    other = GearModule(
        policy(hidden_size=changed.get("source", 32)),
        teacher=TeacherOptions(changed.get("teacher", "ema"), template=" <ref> {reference}"),
        optimizer=lambda p: getattr(torch.optim, changed.get("optimizer", "AdamW"))(p, lr=1e-2),
    )
    again = trainer(tmp_path, generation(), max_epochs=2, precision=changed.get("precision", "32-true"))
    with pytest.raises(UserError, match=message):
        again.fit(other, datamodule=data(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
