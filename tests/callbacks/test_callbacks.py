"""Callbacks report, warn and stop runs; they do not change training."""

import random
from dataclasses import replace

import pytest
import torch
from tiny_runs import AnyCall, NoSpread, data, generation, module, trainer

from gear_lightning.callbacks.checkpoint import IterationCheckpoint
from gear_lightning.callbacks.health import Health
from gear_lightning.callbacks.sample_table import SampleTable
from gear_lightning.credit import GEAR, Uniform
from gear_lightning.distillation import OPSD
from gear_lightning.environments.lookup_chain import LookupChain
from gear_lightning.errors import UserError
from gear_lightning.teacher import TeacherOptions


def test_a_run_that_cannot_learn_warns_and_then_stops_with_advice(tmp_path):
    fit = trainer(tmp_path, generation(environment=NoSpread), Health(warn_after=2, stop_after=3), max_epochs=9)
    with (
        pytest.warns(UserWarning, match="No group has had any spread of rewards for 2 iterations"),
        pytest.raises(UserError, match=r"for 3 iterations.*easier or harder.*group_size"),
    ):
        fit.fit(module(), datamodule=data())
    assert fit.global_step == 3


def test_health_counts_survive_a_checkpoint():
    health = Health()
    health.load_state_dict({"barren": 7, "blind": 2, "rows": [8, 0]})
    assert health.state_dict() == {"barren": 7, "blind": 2, "rows": [8, 0]}


class SometimesFeedback(AnyCall):
    """Returns feedback with a given probability."""

    probability = 0.0

    def reset(self, task, *, seed):
        self.luck = random.Random(seed)
        return super().reset(task, seed=seed)

    def step(self, message):
        step = super().step(message)
        if self.luck.random() < self.probability:
            step.info["feedback"] = "e1"
        return step


def blind_run(tmp_path, shows, environment=SometimesFeedback, **options):
    shown = TeacherOptions("frozen", shows=shows, template=" <ref> {reference}", feedback_template=" <ref> {feedback}")
    run = trainer(tmp_path, generation(environment=environment), Health(warn_after=2, stop_after=3), max_epochs=4)
    run.fit(module(teacher=shown, **options), datamodule=data())
    return run.global_step


@pytest.mark.parametrize("options", [{"credit": GEAR()}, {"credit": Uniform(), "objective": None}], ids=str)
def test_a_teacher_without_privileged_text_warns_and_then_stops_the_run(tmp_path, options):
    if "objective" in options:
        options = {**options, "distillation": OPSD()}
    user = type(options.get("distillation", options["credit"])).__name__
    with (
        pytest.warns(UserWarning, match=r"shows=feedback, and no rollout had feedback for 2 iterations"),
        pytest.raises(UserError, match=rf"for 3 iterations.*{user} has no effect.*shows=reference.*return feedback"),
    ):
        blind_run(tmp_path, "feedback", **options)


@pytest.mark.parametrize(
    ("shows", "options"),
    [("feedback", {"credit": Uniform(), "distillation": OPSD()}), ("peer_or_feedback", {"credit": GEAR()})],
)
def test_a_run_that_learns_without_its_teacher_only_warns(tmp_path, shows, options):
    with pytest.warns(UserWarning, match=rf"shows={shows}, and no rollout had .* for 2 iterations"):
        assert blind_run(tmp_path, shows, **options) == 4


def test_feedback_on_some_rollouts_is_enough(tmp_path, recwarn):
    class Seldom(SometimesFeedback):
        probability = 0.1

    assert blind_run(tmp_path, "feedback", Seldom) == 4
    assert not any("teacher.shows" in str(w.message) for w in recwarn)


def test_feedback_dropped_for_length_does_not_count_as_missing(tmp_path, recwarn):
    class Always(SometimesFeedback):
        probability = 1.0

    shown = TeacherOptions("frozen", shows="feedback", feedback_template=" <ref> {feedback}", max_prompt=1)
    run = trainer(tmp_path, generation(environment=Always), Health(1, 2), max_epochs=3)
    run.fit(module(teacher=shown), datamodule=data())
    assert not any("teacher.shows" in str(w.message) for w in recwarn)


def test_repeated_non_finite_gradients_stop_the_run(tmp_path):
    model = module(optimizer=lambda p: torch.optim.SGD(p, lr=1e12))
    with pytest.raises(UserError, match=r"the gradients of 3 optimizer steps in a row are not finite"):
        trainer(tmp_path, generation(), Health(stop_after_skipped=3), max_epochs=9).fit(model, datamodule=data())


def test_prompts_that_end_differently_are_reported_once(tmp_path, recwarn):
    """A teacher whose prompt ends differently (a <think> tag on one side) disagrees only at the first token."""
    health = Health()
    fit = trainer(tmp_path, generation(), health, max_epochs=1)
    fit.fit(module(), datamodule=data())
    assert not any("first response token" in str(w.message) for w in recwarn), "the two prompts end alike here"
    health._gaps = [80.0, 16.0, 3.0, 300.0]
    health._check_alignment()
    health._gaps = [80.0, 16.0, 3.0, 300.0]
    health._check_alignment()
    found = [str(w.message) for w in recwarn if "first response token" in str(w.message)]
    assert len(found) == 1
    assert "5.00 nats apart at the first response token and 0.01 elsewhere" in found[0]


def test_the_sample_table_shows_best_and_worst_and_only_when_due(tmp_path, capsys):
    fit = trainer(tmp_path, generation(), SampleTable(every_n_iterations=2, rows=3), max_epochs=3)
    fit.fit(module(), datamodule=data())
    shown = capsys.readouterr().out
    assert shown.count("rollouts of iteration") == 1
    assert "rollouts of iteration 1" in shown
    assert shown.count("lookup-train-0-") == 3


def test_observing_callbacks_do_not_change_training(tmp_path):
    def weights(name: str, *callbacks):
        torch.manual_seed(0)
        model = module()
        trainer(tmp_path / name, generation(), *callbacks).fit(model, datamodule=data())
        return model.policy.state_dict()

    bare, watched = weights("bare"), weights("watched", Health(), SampleTable(1))
    assert all(torch.equal(bare[name], watched[name]) for name in bare)


@pytest.mark.parametrize("shows", ["answer", "peer"])
def test_the_teacher_can_be_shown_an_answer_or_a_peer(tmp_path, shows):
    from gear_lightning.environments.lookup_chain import LookupChainTasks

    class Answered(LookupChainTasks):
        def __getitem__(self, index):
            task = super().__getitem__(index)
            return replace(task, reference=None, meta={**task.meta, "answer": "e31"})

    seen = []

    class Watch(type(generation())):
        def teacher_prompt(self, rollout, peer):
            ids, dropped = super().teacher_prompt(rollout, peer)
            seen.append((rollout, peer, self._module.chat_format.tokenizer.decode(ids)))
            return ids, dropped

    class Lenient(LookupChain):  # an untrained policy solves nothing
        def step(self, message):
            step = super().step(message)
            step.info["success"] = "e" in message.get("content", "")
            step.reward = float(step.info["success"])
            return step

    model = module(teacher=TeacherOptions(shows=shows, template=" <ref> {reference}"))
    source = data(train_tasks=Answered(2), val_tasks=None)
    callback = Watch(environment=Lenient, budgets=generation().budgets)
    trainer(tmp_path, callback, max_epochs=1).fit(model, datamodule=source)
    for rollout, peer, prompt in seen:
        if shows == "answer":
            assert "<ref> e31 <end>" in prompt
        elif peer is None:
            assert "<ref>" not in prompt
        else:
            assert peer is not rollout
            said = peer.messages[1]["content"]
            assert f"<ref> assistant: {said}".split()[-1] in prompt
    assert any(peer is not None for _, peer, _ in seen)


def test_a_teacher_copied_every_n_steps_does_not_change_in_between(tmp_path):
    model = module(teacher=TeacherOptions(template=" {reference}", rate=1.0, every=2))
    kept = []

    class Keep(Health):
        def on_train_epoch_end(self, trainer, pl_module):
            flat = lambda m: torch.cat([p.detach().flatten().clone() for p in m.parameters()])  # noqa: E731
            kept.append((flat(pl_module.policy), flat(pl_module.teacher.model)))

    trainer(tmp_path, generation(), Keep(), max_epochs=4).fit(model, datamodule=data())
    policies, teachers = zip(*kept, strict=True)
    assert torch.equal(teachers[1], policies[1])
    assert torch.equal(teachers[2], teachers[1])
    assert torch.equal(teachers[3], policies[3])
    assert not torch.equal(teachers[0], policies[0])


def test_the_last_iteration_is_saved_whatever_the_interval(tmp_path):
    callback = IterationCheckpoint(
        tmp_path / "c", "{epoch}", save_last="link", every_n_epochs=2, save_on_train_epoch_end=True
    )
    fit = trainer(tmp_path, generation(), callback, max_epochs=5, enable_checkpointing=True)
    fit.fit(module(), datamodule=data())
    kept = ["epoch=3.ckpt", "epoch=4.ckpt", "last.ckpt"]  # the previous one is kept in case the last is damaged
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == kept
    assert torch.load(tmp_path / "c" / "last.ckpt", weights_only=True)["global_step"] == 5
