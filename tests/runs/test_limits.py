"""A run ends after a complete iteration with its state saved; options that would shorten an iteration are refused."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from command_line import FIT, error_of
from lightning.pytorch.callbacks import EarlyStopping
from resume_runs import Scores, StopAt, fit, folder_of, steps, weights
from tiny_runs import NoSpread, data, generation, module, trainer

import gear_lightning
from gear_lightning.callbacks.health import Health
from gear_lightning.errors import UserError
from gear_lightning.rollout import STATUSES
from gear_lightning.runs.limits import REFUSED_CALLBACKS, check_callbacks, check_limits
from gear_lightning.runs.monitor import KNOWN, NAMES
from gear_lightning.runs.records import ledger

EARLY = "lightning.pytorch.callbacks.EarlyStopping"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fast_dev_run": True}, "trainer.fast_dev_run would train on a part of an iteration; for a trial use"),
        ({"overfit_batches": 0.5}, "trainer.overfit_batches would train on a part"),
        ({"limit_train_batches": 3}, "limit_train_batches=3 would train on a part of an iteration's 8 micro-batches"),
        ({"limit_train_batches": 0.9}, "limit_train_batches=0.9"),
        ({"limit_train_batches": 0}, "limit_train_batches=0 "),
        ({"val_check_interval": 0.5}, "val_check_interval=0.5 would evaluate in the middle of an iteration"),
        ({"val_check_interval": 1}, "val_check_interval=1 would"),
        ({"val_check_interval": timedelta(minutes=1)}, "val_check_interval=0:01:00 would"),
        ({"check_val_every_n_epoch": None}, "check_val_every_n_epoch=None: must be at least 1"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch=0: must be"),
        ({"limit_val_batches": 1}, "limit_val_batches=1 would skip some of an evaluation's 3 batches.*data.val_limit"),
        ({"limit_val_batches": 0.5}, "limit_val_batches=0.5 would skip"),
    ],
    ids=str,
)
def test_options_that_shorten_an_iteration_or_an_evaluation_are_refused(options, message):
    source = data(micro_batch_size=2, inner_epochs=2, val_limit=6, eval_batch_size=2)
    with pytest.raises(UserError, match=message):
        check_limits({"check_val_every_n_epoch": 1, **options}.get, source, 1)


def test_options_that_keep_them_complete_are_accepted():
    source = data(micro_batch_size=2, inner_epochs=2, val_limit=6, eval_batch_size=2)
    whole = {"limit_train_batches": 8, "val_check_interval": 8, "limit_val_batches": 3, "check_val_every_n_epoch": 2}
    shares = {"limit_train_batches": 1.0, "val_check_interval": 1.0, "limit_val_batches": 1.0}
    for options in (
        whole,
        {**shares, "check_val_every_n_epoch": 1},
        {"limit_val_batches": 0, "check_val_every_n_epoch": 1},
    ):
        check_limits(options.get, source, 1)
    check_limits({"limit_test_batches": 3}.get, source, 1, "test")
    with pytest.raises(UserError, match="limit_test_batches=2 would skip"):
        check_limits({"limit_test_batches": 2}.get, source, 1, "test")


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"limit_train_batches": 1}, {"val_check_interval": 0.5}])
def test_a_custom_trainer_is_checked_too(tmp_path, options):
    with pytest.raises(UserError, match=f"trainer.{next(iter(options))}"):
        trainer(tmp_path, generation(), **options).fit(module(), datamodule=data(micro_batch_size=2))


@pytest.mark.parametrize("kind", REFUSED_CALLBACKS, ids=lambda kind: kind.__name__)
def test_a_callback_that_cannot_work_is_rejected_with_an_alternative(kind):
    class Mine(kind):
        pass

    for refused in (kind, Mine):
        with pytest.raises(UserError, match=rf"trainer.callbacks: {refused.__name__} \w+"):
            check_callbacks([Health, refused])
    check_callbacks([Health, EarlyStopping, L.pytorch.callbacks.LearningRateMonitor])


def test_such_a_callback_of_a_custom_trainer_is_rejected(tmp_path):
    averaging = L.pytorch.callbacks.EMAWeightAveraging()
    with pytest.raises(UserError, match=r"EMAWeightAveraging samples with other weights.*model.teacher.rate"):
        trainer(tmp_path, generation(), averaging, max_epochs=1).fit(module(), datamodule=data())


def test_lightnings_sanity_check_does_not_change_training(tmp_path):
    options = {
        "limit_val_batches": 1.0,
        "checkpoint": {"every_n_epochs": 1},
        "max_epochs": 1,
        "check_val_every_n_epoch": 9,
    }
    one = fit(tmp_path / "one", **options)
    other = trainer(tmp_path / "other", generation(), limit_val_batches=1.0, max_epochs=1, check_val_every_n_epoch=9)
    other.num_sanity_val_steps = 1
    torch.manual_seed(0)
    other.fit(module(), datamodule=data(val_limit=6, eval_batch_size=2))
    assert torch.equal(weights(one), weights(other))
    assert not other.datamodule.evaluation_due, "a resume would repeat the evaluation and stop"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trainer.fast_dev_run", "true"], "trainer.fast_dev_run would train on a part"),
        (["--trainer.check_val_every_n_epoch", "null"], "check_val_every_n_epoch=None: must be at least 1"),
        (["--checkpoint.monitor", "val/sucess"], "checkpoint.mode must be given"),
        (["--checkpoint.monitor", "val/sucess", "--checkpoint.mode", "max"], "monitor=val/sucess: there is no such"),
        (["--checkpoint.monitor", "val/success", "--trainer.check_val_every_n_epoch", "9"], "val/success is never"),
        (["--checkpoint.save_top_k", "3"], "save_top_k=3 keeps the best checkpoints"),
        (["--model.optimizer.lr", "-1"], "Invalid learning rate: -1"),
        (["--model.lr_scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau"], "--model.lr_scheduler.monitor val/su"),
        (["--model.lr_scheduler", "lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor", "reward",
          "--model.lr_scheduler.mode", "max"], "model.lr_scheduler.monitor=reward: there is no such metric"),
        ([f"--trainer.callbacks+={EARLY}", "--trainer.callbacks.monitor", "val/success"], "mode of EarlyStopping=min"),
    ],
)  # fmt: skip
def test_the_command_line_refuses_invalid_options_before_the_warm_start(command, tmp_path, args, message):
    warm = [a for a in FIT if a != "--warm_start=null"]
    error = error_of(command, *warm, "--trainer.default_root_dir", tmp_path / "run", *args)
    assert message in error
    assert "warm" not in error
    assert not (tmp_path / "run" / "config.yaml").exists()


def resumed(run: Any, *callbacks: L.Callback, path: Any = None, **options: Any) -> L.Trainer:
    return fit(run, *callbacks, resume=path or folder_of(run), **options)


@pytest.mark.parametrize("batch", [0, 1, 3, 5])
def test_a_stop_between_micro_batches_waits_for_the_end_of_the_iteration(tmp_path, batch):
    source = {"micro_batch_size": 2, "inner_epochs": 2}
    whole = fit(tmp_path / "whole", source=source, max_epochs=3)
    run = tmp_path / "run"
    made = fit(run, StopAt(1, batch), source=source, max_epochs=3)
    assert (made.global_step, steps(run)["last"]) == (4, 4)
    assert ledger(run) == [entry for entry in ledger(tmp_path / "whole") if entry[0] < 2]
    again = resumed(run, path=folder_of(run) / "iteration=1.ckpt", source=source, max_epochs=3)
    assert torch.equal(weights(again), weights(whole))


@pytest.mark.parametrize(("inner_epochs", "first", "total"), [(1, 2, 4), (3, 4, 8), (3, 3, 7)])
def test_a_run_that_ended_at_max_steps_resumes_exactly(tmp_path, inner_epochs, first, total):
    options = {"source": {"micro_batch_size": 2, "inner_epochs": inner_epochs}, "max_epochs": -1}
    whole = fit(tmp_path / "whole", max_steps=total, **options)
    run = tmp_path / "run"
    fit(run, max_steps=first, **options)
    assert steps(run)["last"] == first
    again = resumed(run, max_steps=total, **options)
    assert torch.equal(weights(again), weights(whole))
    assert ledger(run) == ledger(tmp_path / "whole")
    rows = [(path / "metrics.csv").read_text().splitlines() for path in (run, tmp_path / "whole")]
    assert [row.split(",")[0] for row in rows[0]] == [row.split(",")[0] for row in rows[1]]


ENDED = {
    "max_epochs": ({"max_epochs": 2}, [], r"the checkpoint has 2 iterations, and trainer.max_epochs=2; raise it"),
    "fewer": ({"max_epochs": 2}, [], r"the checkpoint has 2 iterations, and trainer.max_epochs=1; raise it"),
    "max_steps": ({"max_epochs": -1, "max_steps": 2}, [], r"2 steps, and trainer.max_steps=2; raise it to continue"),
    "max_time": ({"max_time": timedelta(microseconds=1)}, [], r"which is the sum over all starts"),
    "early": ({}, [lambda: EarlyStopping("score", mode="max", patience=1), lambda: Scores(2, 1, 9, 9, training=True)],
              r"ended after 2 iterations by EarlyStopping \(.*score did not improve in the last 1 records"),
    "callback": ({}, [lambda: StopAt(1, 0)], r"ended after 2 iterations by a callback \(trainer.should_stop\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDED)
def test_a_finished_run_trains_nothing_and_reports_the_reason(tmp_path, capsys, name):
    options, callbacks, why = ENDED[name]
    made = fit(tmp_path, *(make() for make in callbacks), **options)
    before = (tmp_path / "metrics.csv").read_text()
    options = {**options, "max_epochs": 1} if name == "fewer" else options
    capsys.readouterr()
    again = resumed(tmp_path, *(make() for make in callbacks), **options)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nothing to train")]
    assert re.search(why, line), line
    assert again.global_step == made.global_step == steps(tmp_path)["last"]
    assert torch.equal(weights(again), weights(made))
    assert (tmp_path / "metrics.csv").read_text() == before
    if name in ("early", "callback"):
        path = folder_of(tmp_path) / "iteration=1.ckpt"
        assert str(path) in line
        more = (
            [EarlyStopping("score", mode="max", patience=5), Scores(2, 1, 0, 0, training=True)]
            if name == "early"
            else []
        )
        assert resumed(tmp_path, *more, path=path).global_step == 4, "a changed patience must take effect"
    else:
        more = {"max_epochs": 3} if "max_steps" not in options else {"max_epochs": -1, "max_steps": 3}
        assert resumed(tmp_path, **more).global_step == 3


@pytest.mark.filterwarnings("ignore:No group has had any spread")
def test_health_saves_the_state_of_a_run_and_prevents_its_resume(tmp_path):
    options = {"environment": NoSpread, "checkpoint": {"every_n_epochs": 9}, "max_epochs": 5}
    spread = "no group had any spread of rewards for 2 iterations"
    with pytest.raises(UserError, match=spread):
        fit(tmp_path, Health(1, 2), **options)
    assert steps(tmp_path)["last"] == 2
    with pytest.raises(UserError, match=rf"ended after 2 iterations by health: {spread}.*name the checkpoint"):
        resumed(tmp_path, Health(1, 2), **options)
    named = folder_of(tmp_path) / "iteration=1.ckpt"
    assert resumed(tmp_path, Health(1, 2), path=named, max_epochs=3).global_step == 3


def test_a_run_continues_until_min_epochs(tmp_path):
    made = fit(tmp_path, StopAt(0, 0), min_epochs=3, max_epochs=9, checkpoint={"every_n_epochs": 9})
    assert made.global_step == 3
    assert steps(tmp_path) == {"iteration=2": 3, "last": 3}


def test_every_metric_that_is_logged_is_known():
    """An option that monitors an unknown metric is refused."""
    families = "|".join(KNOWN)
    root = Path(gear_lightning.__file__).parent
    texts = [path.read_text() for path in [*root.rglob("*.py"), *(root.parent / "callbacks").glob("*.py")]]
    named = {name for text in texts for name in re.findall(rf'"((?:{families})/[a-z_0-9]+)"', text)}
    assert named | {f"rollouts/{status}" for status in STATUSES[1:]} <= NAMES
    assert {"val/success", "train/reward", "train/skipped_steps", "perf/seconds"} <= NAMES
