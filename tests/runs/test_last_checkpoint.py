"""Which checkpoints are kept: always the newest state, the best ones by the monitored metric, and no others."""

import random
import shutil
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
from resume_runs import Scores, StopAt, fit, folder_of, steps, weights

from gear_lightning.callbacks.checkpoint import IterationCheckpoint
from gear_lightning.errors import UserError
from gear_lightning.runs.checkpoints import write_checkpoint

LIMITS = [  # (limit, steps of the run), with two steps per iteration
    ({"max_epochs": 3}, 6),
    ({"max_epochs": -1, "max_steps": 5}, 5),
    ({"max_epochs": -1, "max_steps": 4}, 4),
    ({"max_epochs": -1, "max_time": timedelta(microseconds=1)}, 2),
    ({"max_epochs": 9, "stop": (1, 1)}, 4),
]
CADENCES = [
    {}, {"every_n_epochs": 2}, {"every_n_epochs": 0}, {"every_n_train_steps": 1}, {"every_n_train_steps": 3},
    {"train_time_interval": timedelta(0)}, {"train_time_interval": timedelta(hours=1)},
    {"save_on_train_epoch_end": False},
]  # fmt: skip
CHOICES = [{"save_top_k": k} for k in (0, 1, -1)] + [
    {"monitor": "score", "mode": mode, "save_top_k": k} for mode in ("min", "max") for k in (1, 2, -1)
]


def combinations(number: int) -> list[tuple]:
    """Return combinations with each limit, cadence and choice at least once."""
    rng = random.Random(0)
    parts = [
        [*part * (number // len(part)), *rng.sample(part, number % len(part))] for part in (LIMITS, CADENCES, CHOICES)
    ]
    for part in parts:
        rng.shuffle(part)
    return list(zip(*parts, strict=True))


@pytest.mark.parametrize(("limit", "cadence", "choice"), combinations(9), ids=str)
def test_last_ckpt_is_the_newest_state_and_a_finished_run_trains_nothing(tmp_path, limit, cadence, choice):
    options, end = dict(limit[0]), limit[1]
    callbacks = [Scores(3.0, 1.0, 2.0), *([StopAt(*options.pop("stop"))] if "stop" in options else [])]
    options |= {"source": {"inner_epochs": 2}, "checkpoint": {**cadence, **choice}, "limit_val_batches": 1.0}
    made = fit(tmp_path, *callbacks, **options)
    last = folder_of(tmp_path) / "last.ckpt"
    assert made.global_step == end == torch.load(last, weights_only=True)["global_step"]
    assert last.is_symlink()
    kept = {file.name: file.stat().st_mtime_ns for file in folder_of(tmp_path).iterdir()}
    again = fit(tmp_path, *callbacks, resume=folder_of(tmp_path), **options)
    assert again.global_step == end
    assert torch.equal(weights(again), weights(made))
    assert kept == {file.name: file.stat().st_mtime_ns for file in folder_of(tmp_path).iterdir()}


def ranked(run: Path, name: str = "last") -> dict[str, float]:
    state = torch.load(folder_of(run) / f"{name}.ckpt", weights_only=True)["callbacks"]["IterationCheckpoint"]
    return {Path(path).stem: round(float(score), 6) for path, score in state["best_k_models"].items()}


@pytest.mark.parametrize(
    ("values", "mode", "top", "best"),
    [
        ((1, 5, 2, 4, 3), "max", 2, {1: 5, 3: 4}),
        ((1, 5, 2, 4, 3), "min", 2, {0: 1, 2: 2}),
        ((2, 2, 2, 2, 2), "max", 1, {0: 2}),  # of equal values, the earlier one
        ((float("nan"), 1, float("nan"), float("inf"), float("nan")), "max", 2, {1: 1}),  # non-finite values
        ((1, 3, None, 4, None), "max", 1, {3: 4}),
    ],
)
def test_the_best_are_kept_in_addition_to_the_newest_two(tmp_path, values, mode, top, best):
    scores = Scores(*values, training=True)
    fit(tmp_path, scores, checkpoint={"monitor": "score", "mode": mode, "save_top_k": top}, max_epochs=5)
    assert ranked(tmp_path) == {f"iteration={i}": value for i, value in best.items()}
    assert steps(tmp_path) == {**{f"iteration={i}": i + 1 for i in {*best, 3, 4}}, "last": 5}


def test_only_a_value_measured_in_the_same_iteration_counts(tmp_path):
    """With an evaluation in every second iteration, its value does not count in the next iteration."""
    options = {"checkpoint": {"monitor": "val/reward", "save_top_k": 5}, "limit_val_batches": 1.0, "max_epochs": 5}
    made = fit(tmp_path, check_val_every_n_epoch=2, **options)
    assert list(ranked(tmp_path)) == ["iteration=1", "iteration=3"]
    assert made.checkpoint_callback.mode == "max"
    assert steps(tmp_path).keys() == {"iteration=1", "iteration=3", "iteration=4", "last"}


def test_without_a_monitor_the_newest_two_are_kept_and_minus_one_keeps_all(tmp_path):
    for k, files in ((0, {3, 4}), (1, {3, 4}), (-1, {0, 1, 2, 3, 4})):
        run = tmp_path / str(k)
        fit(run, checkpoint={"save_top_k": k}, max_epochs=5)
        assert steps(run) == {**{f"iteration={i}": i + 1 for i in files}, "last": 5}


def test_checkpoints_within_an_iteration_have_unique_names(tmp_path):
    source = {"inner_epochs": 3}
    fit(tmp_path, checkpoint={"every_n_train_steps": 2, "save_top_k": -1}, source=source, max_epochs=2)
    wanted = {"iteration=0-step=00002": 2, "iteration=1-step=00004": 4, "iteration=1": 6, "last": 6}
    assert steps(tmp_path) == wanted


def test_a_file_name_holds_only_metrics_measured_in_its_iteration(tmp_path):
    name = "{epoch}-{val/reward:.2f}-{score:.1f}"
    scores, keeper = Scores(1.0, None, training=True), {"filename": name, "save_top_k": -1}
    fit(tmp_path, scores, checkpoint=keeper, max_epochs=2)
    assert steps(tmp_path).keys() == {"0-nan-1.0", "1-nan-nan", "last"}


def test_a_resume_from_a_weights_only_checkpoint_is_refused(tmp_path):
    fit(tmp_path, checkpoint={"save_weights_only": True}, max_epochs=2)
    assert steps(tmp_path)["last"] == 2
    with pytest.raises(UserError, match=r"holds only weights \(checkpoint.save_weights_only\).*gear-lightning export"):
        fit(tmp_path, resume=folder_of(tmp_path), max_epochs=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_top_k": 3}, "save_top_k=3 keeps the best.*monitor, the metric that ranks them, is not set"),
        ({"save_top_k": -2}, "save_top_k=-2: must be at least -1"),
        ({"mode": "max"}, "mode=max does nothing without checkpoint.monitor"),
        ({"monitor": "val/success", "save_top_k": 0}, "monitor=val/success does nothing with checkpoint.save_top_k=0"),
        (
            {"monitor": "val/success", "mode": "min"},
            "treats the smallest val/success as the best; give checkpoint.mode=max",
        ),
        ({"monitor": "train/entropy"}, "checkpoint.mode must be given: .* a small train/entropy is better"),
        ({"save_on_exception": True}, "save_on_exception is not supported"),
        ({"every_n_epochs": 2, "every_n_train_steps": 3}, "every_n_train_steps and checkpoint.every_n_epochs exclude"),
        ({"every_n_epochs": 1, "train_time_interval": timedelta(1)}, "exclude one another"),
        ({"every_n_epochs": -1}, "every_n_epochs=-1: must be at least 0"),
        ({"every_n_train_steps": 2, "save_on_train_epoch_end": False}, "does nothing with every_n_train_steps"),
        ({"filename": "policy"}, "filename=policy gives all checkpoints the same name"),
        ({"filename": "{epoch}-{val/reward}"}, "gives names with a slash.*auto_insert_metric_name=false"),
        ({"filename": "{epoch:q}"}, "filename={epoch:q} cannot be read"),
    ],
    ids=str,
)
def test_contradictory_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        IterationCheckpoint(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"monitor": "val/rewards", "mode": "max"}, "monitor=val/rewards: there is no such metric; there are credit/"),
        ({"monitor": "val/success"}, "monitor=val/success is never measured: this run has no evaluation"),
        ({"save_on_train_epoch_end": False}, "writes checkpoints after evaluations, and this run has none"),
    ],
    ids=str,
)
def test_a_metric_that_will_not_be_measured_is_refused_before_the_first_rollout(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        fit(tmp_path, checkpoint=options)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_metric_that_is_never_logged_ends_the_run_after_saving_its_state(tmp_path):
    keeper = {"monitor": "scores", "mode": "max", "every_n_epochs": 5}
    with pytest.raises(UserError, match=r"monitor=scores: there is no such metric in this run; it has logged .*score"):
        fit(tmp_path, Scores(1.0, training=True), checkpoint=keeper)
    assert steps(tmp_path) == {"iteration=0": 1, "last": 1}
    made = fit(
        tmp_path, Scores(1.0, 2.0, training=True), resume=folder_of(tmp_path), checkpoint={**keeper, "monitor": "score"}
    )
    assert made.global_step == 4


def test_kills_moves_and_a_new_interval_do_not_change_which_checkpoints_are_kept(tmp_path):
    scores, keeper = Scores(1, 9, 3, 4, 2, 0, training=True), {"monitor": "score", "mode": "max"}
    fit(tmp_path / "whole", scores, checkpoint=keeper, max_epochs=6)
    run = tmp_path / "before"
    fit(run, scores, checkpoint=keeper, max_epochs=4)
    for suffix in ("", ".json"):  # killed before an older one was removed
        shutil.copy(folder_of(run) / f"iteration=2.ckpt{suffix}", folder_of(run) / f"iteration=0.ckpt{suffix}")
    state = folder_of(run) / "iteration=3.ckpt"
    content = torch.load(state, weights_only=True)
    content["callbacks"]["IterationCheckpoint"]["files"].insert(0, str(folder_of(run) / "iteration=0.ckpt"))
    write_checkpoint(content, state)
    run = run.rename(tmp_path / "after")
    fit(run, scores, resume=folder_of(run), checkpoint={**keeper, "every_n_train_steps": 1}, max_epochs=6)
    assert steps(run) == steps(tmp_path / "whole") == {"iteration=1": 2, "iteration=4": 5, "iteration=5": 6, "last": 6}
    assert ranked(run) == ranked(tmp_path / "whole")


def test_another_monitor_starts_a_new_ranking_and_keeps_the_best_of_the_old_one(tmp_path):
    scores = Scores(9, 1, 1, 1, training=True)
    fit(tmp_path, scores, checkpoint={"monitor": "score", "mode": "max"}, max_epochs=3)
    with pytest.warns(UserWarning, match=r"no longer ranked by score; iteration=0.ckpt are kept"):
        fit(tmp_path, resume=folder_of(tmp_path), checkpoint={"monitor": "train/reward"}, max_epochs=4)
    assert steps(tmp_path).keys() == {"iteration=0", "iteration=2", "iteration=3", "last"}
    assert ranked(tmp_path).keys() == {"iteration=3"}


def test_a_resume_from_an_older_checkpoint_moves_the_newer_ones_away(tmp_path, capsys):
    fit(tmp_path, checkpoint={"save_top_k": -1}, max_epochs=4)
    older = folder_of(tmp_path) / "iteration=1.ckpt"
    fit(tmp_path, resume=older, checkpoint={"save_top_k": -1}, max_epochs=3)
    assert steps(tmp_path) == {"iteration=0": 1, "iteration=1": 2, "iteration=2": 3, "last": 3}
    assert (
        "iteration=2.ckpt, iteration=3.ckpt: later than the checkpoint that the run resumes" in capsys.readouterr().err
    )
    aside = folder_of(tmp_path) / "earlier-1"
    assert sorted(file.name for file in aside.glob("*.ckpt*")) == [
        f"iteration={i}.ckpt{suffix}" for i in (2, 3) for suffix in ("", ".json")
    ]
    made = fit(tmp_path, resume=folder_of(tmp_path), max_epochs=4)
    assert made.global_step == 4, "the run must not resume from the abandoned continuation"


def test_a_repeated_evaluation_ranks_checkpoints_as_an_uninterrupted_one(tmp_path):
    class Cut(L.Callback):
        def on_validation_start(self, trainer, pl_module):
            trainer.datamodule.stop = lambda: trainer.current_epoch == 1

        def on_validation_end(self, trainer, pl_module):
            trainer.datamodule.stop = lambda: False

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

    options = {
        "checkpoint": {"monitor": "val/response_tokens", "mode": "max", "save_top_k": 9},
        "limit_val_batches": 1.0,
    }
    fit(tmp_path / "whole", **options)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path / "cut", Cut(), **options)
    assert "iteration=1" not in ranked(tmp_path / "cut")
    fit(tmp_path / "cut", resume=folder_of(tmp_path / "cut"), **options)
    assert ranked(tmp_path / "cut") == ranked(tmp_path / "whole")
