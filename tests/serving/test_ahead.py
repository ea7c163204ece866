"""Rollouts that are sampled while the policy is updated: how old they are, what a resume repeats, how they end."""

import threading

import lightning as L
import pytest
import stand_in_server as stand_in
import torch
from deadlines import until
from detached_engine import Detached
from distributed_runs import Chatter, Opinions
from every_rule import TalkTasks
from tiny_runs import data, generation, module, trainer

from gear_lightning.errors import Stopped, UserError
from gear_lightning.generation import CachedEngine
from gear_lightning.generation.budgets import Budgets
from gear_lightning.loss import ClippedSurrogate
from gear_lightning.module import GearModule
from gear_lightning.runs.metrics_file import read_columns
from gear_lightning.runs.records import ledger, read_records
from gear_lightning.teacher import TeacherOptions

CORRECTED = ClippedSurrogate(sampler_cap=2.0)


def fit(engine, folder, *callbacks, ahead=1, ckpt=None, environment=Chatter, micro_batch_size=4, **options):
    torch.manual_seed(0)
    rollouts = generation(
        engine=engine,
        ahead=ahead,
        environment=environment,
        budgets=Budgets(turns=3, tokens=24, turn_tokens=12, context=128),
    )
    runs = trainer(folder, rollouts, *callbacks, **{"max_epochs": 4, **options})
    teacher = TeacherOptions(template=" <ref> {reference}")
    runs.fit(
        GearModule(Opinions(), teacher=teacher, objective=CORRECTED, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)),
        datamodule=data(train_tasks=TalkTasks(), val_tasks=TalkTasks(seed=1), micro_batch_size=micro_batch_size),
        ckpt_path=ckpt,
        weights_only=True if ckpt else None,
    )
    return runs


def ages(folder) -> list[set[int]]:
    """Return, per iteration, how many optimizer steps old the tokens were when the policy learned from them."""
    found = []
    for record in read_records(folder):
        versions = record.tensors["versions"][record.tensors["action_mask"]]
        found.append({record.iteration - version for version in versions.tolist()})
    return found


def flying() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "rollouts"]


def test_rollouts_are_one_iteration_old_and_every_task_is_learned_from_once(served, tmp_path):
    _, engine = served
    runs = fit(engine, tmp_path)
    assert ages(tmp_path) == [{0}, {1}, {1}, {1}]
    assert [group for _, group, _ in ledger(tmp_path)] == list(range(8))
    assert runs.callback_metrics["train/staleness"] == 1
    assert runs.callback_metrics["train/sampler_ratio"] != 1, "an older policy must be corrected for"
    assert runs.datamodule.cursor == 8, "no rollouts after the last iteration's"
    assert not flying()


def test_the_server_samples_while_the_policy_is_updated(served, tmp_path):
    made, engine = served

    class Blocks(L.Callback):
        """Ends an update only after the server has sampled for the next iteration."""

        waited = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before = len(made.seen)
            if trainer.current_epoch == 0 and not self.waited:
                until(lambda: len(made.seen) > before + 1, "turns of the next iteration")
                self.waited += 1

    blocks = Blocks()
    fit(engine, tmp_path, blocks, max_epochs=2)
    assert blocks.waited == 1


def test_conversations_continue_over_updates_with_the_newer_weights(served, tmp_path):
    made, engine = served
    late = {"talk-4", "talk-5"}  # tasks of the third iteration

    class Waits(Chatter):
        """Lets the conversations of the third iteration continue only after the first update."""

        def reset(self, task, *, seed):
            self.late = task.id in late
            return super().reset(task, seed=seed)

        def step(self, message):
            if self.late:
                until(lambda: [path for path, _ in made.seen].count("/update_weights") > 1, "the update")
            return super().step(message)

    fit(engine, tmp_path, ahead=2, environment=Waits, max_epochs=5)
    found = ages(tmp_path)
    assert found[0] == {0}
    assert max(max(of) for of in found) == 2
    versions = [
        torch.unique(row[mask]).tolist()
        for record in read_records(tmp_path)
        for row, mask in zip(record.tensors["versions"], record.tensors["action_mask"], strict=True)
    ]
    assert any(len(of) > 1 for of in versions), "no conversation was open during an update"
    for record in read_records(tmp_path):
        for turns, row in zip(record.tensors["turn_ids"], record.tensors["versions"], strict=True):
            assert ((row >= 0) == (turns >= 0)).all()
            assert (row[row >= 0].diff() >= 0).all(), "weights must not go back"


@pytest.mark.parametrize("ahead", [1, 2])
def test_after_a_kill_no_task_is_lost_or_learned_from_twice(served, tmp_path, ahead):
    _, engine = served

    class Kill(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 2:
                raise Stopped

    class Keep(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    with pytest.raises(Stopped):
        fit(engine, tmp_path, Kill(), Keep(), ahead=ahead, max_epochs=5)
    assert not flying(), "the rollouts that were begun must end with the run"
    fit(engine, tmp_path, ahead=ahead, max_epochs=5, ckpt=tmp_path / "last.ckpt")
    assert [(i, group) for i, group, _ in ledger(tmp_path)] == [(g // 2, g) for g in range(10)]
    assert ages(tmp_path)[2] == {0}, "rollouts that were begun are sampled again, with the newest weights"


def test_a_checkpoint_within_an_iteration_keeps_its_rollouts_and_forgets_those_begun(served, tmp_path):
    _, engine = served

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and not batch_idx:
                trainer.save_checkpoint(tmp_path / "within.ckpt")
                raise Stopped

    with pytest.raises(Stopped):
        fit(engine, tmp_path, Stop(), micro_batch_size=2)
    fit(engine, tmp_path, ckpt=tmp_path / "within.ckpt", micro_batch_size=2)
    assert [(i, group) for i, group, _ in ledger(tmp_path)] == [(g // 2, g) for g in range(8)]
    assert ages(tmp_path) == [{0}, {1}, {1}, {1}]


def test_a_server_that_fails_while_it_samples_ahead_ends_the_run_with_one_error(served, tmp_path):
    made, engine = served

    class Breaks(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            made.fault = stand_in.CUT if trainer.current_epoch == 1 else ""

    with pytest.raises(UserError, match="gave a turn up"):
        fit(engine, tmp_path, Breaks())
    assert not flying()


def test_an_engine_in_this_process_with_weights_of_its_own_samples_ahead(tmp_path):
    runs = fit(Detached(), tmp_path, max_epochs=3)
    assert runs.callback_metrics["train/staleness"] == 1
    assert ages(tmp_path) == [{0}, {1}, {1}]


def test_an_evaluation_waits_for_open_conversations_and_uses_the_newest_weights(served, tmp_path):
    _, engine = served
    runs = fit(engine, tmp_path, limit_val_batches=None)
    assert len(read_columns(tmp_path / "metrics.csv")["val/success"][0]) == 4
    assert ages(tmp_path) == [{0}, {1}, {1}, {1}], "weights do not change within a conversation"
    assert runs.callback_metrics["train/staleness"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": CachedEngine(), "ahead": 1}, "CachedEngine samples in the training process"),
        ({"ahead": -1}, "ahead=-1: must be at least 0"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        generation(**options)


def test_rollouts_of_an_older_policy_need_a_correction(served, tmp_path):
    _, engine = served
    runs = trainer(tmp_path, generation(engine=engine, ahead=1))
    with pytest.raises(UserError, match=r"set model\.objective\.sampler_cap"):
        runs.fit(module(), datamodule=data())
