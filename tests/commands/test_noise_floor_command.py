"""`gear-lightning noise-floor`, with new and with recorded rollouts."""

import csv

import lightning as L
import pytest
import torch
from probe_command import command
from tiny_runs import data, generation, module, trainer

from gear_lightning.batch import RolloutBatch
from gear_lightning.credit import GEAR
from gear_lightning.errors import UserError
from gear_lightning.probes.noise_floor import measure, read_floor, recorded_batches


def metrics(folder) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_recorded_rollouts_give_the_batches_that_were_trained_on(tmp_path):
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
    with pytest.raises(UserError, match="use a policy with the tokenizer of the run"):
        recorded_batches(tmp_path, micro_batch_size=4, temperature=1.0, vocabulary=7)


pytestmark = pytest.mark.usefixtures("starts_quickly")
COMMAND = [
    "noise-floor", "--config", "configs/quickstart.yaml", "--warm_start=null", "--model.policy.hidden_size", "32",
    "--model.policy.layers", "2", "--data.tasks_per_iteration", "2", "--data.group_size", "4",
    "--data.micro_batch_size", "4", "--data.val_limit", "4",
]  # fmt: skip


def test_the_command_measures_a_recipe_and_a_run_and_does_not_change_the_run(tmp_path, repository):
    where = ["--trainer.default_root_dir", tmp_path]
    status, out, err = command(repository, *COMMAND, *where, "--trainer.precision", "bf16-mixed")
    assert status == 0, err
    assert "Noise floor of GEAR (k1) in bf16-mixed, head in float32 on cpu" in out
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
        (["--micro_batches", "0"], "micro_batches=0: must be at least 1"),
        (["--out", "configs/quickstart.yaml/x.json"], "configs/quickstart.yaml/x.json: cannot be written"),
    ],
    ids=["no teacher", "no rollouts", "unknown key", "no micro-batch", "no place"],
)
def test_invalid_options_give_one_error(tmp_path, repository, args, message):
    status, _, err = command(repository, *COMMAND, "--trainer.default_root_dir", tmp_path / "run", *args)
    assert status == 2, err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert message in line
