"""`gear-lightning teacher-check`: which text the teacher sees, hand-computed values, and the command on a recipe."""

import json
from dataclasses import replace

import pytest
import torch
from probe_command import command
from tiny_runs import AnyCall, data, generation, module, trainer

from gear_lightning.environments.base import Task
from gear_lightning.errors import UserError
from gear_lightning.probes.teacher_check import CheckTeacher, Scored, pairs_of, summary, table
from gear_lightning.teacher import TeacherOptions


def task(name: str, reference: str | None, answer: str | None = None) -> Task:
    return Task(name, [{"role": "user", "content": name}], reference=reference, meta={"answer": answer, "kept": name})


def test_every_task_is_paired_with_the_next_task_that_has_another_text():
    tasks = [task("a", "one", "1"), task("b", "one", "2"), task("c", "two", "3")]
    found = pairs_of(tasks, TeacherOptions())
    assert [found[t.id].reference for t in tasks] == ["two", "two", "one"]
    assert [found[t.id].meta for t in tasks] == [
        {"answer": "3", "kept": "a"}, {"answer": "3", "kept": "b"}, {"answer": "1", "kept": "c"}
    ]  # fmt: skip
    assert [found[t.id].messages for t in tasks] == [t.messages for t in tasks], "the question must not change"
    assert [pairs_of(tasks, TeacherOptions(shows="answer"))[t.id].meta["answer"] for t in tasks] == ["2", "3", "1"]
    with pytest.raises(UserError, match="all 2 tasks have the same reference"):
        pairs_of(tasks[:2], TeacherOptions())
    with pytest.raises(UserError, match=r"task d has no answer, but model.teacher.shows=answer needs one"):
        pairs_of([*tasks, task("d", "three")], TeacherOptions(shows="answer"))


def scored(own: list[float], other: list[float], decisions: list[int], success: bool) -> Scored:
    """Return a scored rollout: a prompt of one token, sampled tokens, and a stop token."""
    counts = torch.tensor([False, *[True] * (len(own) - 2), False])
    return Scored(torch.tensor(own), torch.tensor(other), counts, torch.tensor(decisions), success)


def test_the_summary_matches_hand_computed_values():
    told = summary([
        # right, wrong, and a later wrong decision, which does not count
        scored([9, 1, 5, 7, 9.0], [9, 2, 2, 2, 9.0], [0, 1, -1, 0, 0], False),
        scored([9, 2, 1, 3, 9.0], [9, 2, 1, 3, 9.0], [0, 1, 1, 0, 0], True),
        scored([9, 8, -1, -1, 9.0], [9, 1, 4, 4, 9.0], [0, -1, 1, -1, 0], False),
    ])  # fmt: skip
    assert (told["rollouts"], told["tokens"], told["solved"]) == (3, 9, 1)
    assert (told["first_wrong"], told["right_before"]) == (2, 3)
    own, other = told["own"], told["other"]
    assert own["size"] == pytest.approx((1 + 5 + 7 + 2 + 1 + 3 + 8 + 1 + 1) / 9)
    assert own["first_wrong"] == 1.0  # 5 and 8 compared with 1, 2 and 1
    assert other["first_wrong"] == pytest.approx((1 + 0.5 + 0.5 + 0.5) / 6)  # 2 and 1 against 2, 2, 1
    assert own["last"] == 0.5  # 7 and -1 against 3
    assert other["last"] == 0.5  # 2 and 4 against 3
    assert own["mean"] == 0.75  # 13 / 3 and 2 against 2: one above, one equal
    shown = table({"tasks": 3, "left_out": 0, "empty": 0, "shows": "answer", **told}).splitlines()
    assert shown[:2] == [
        "3 rollouts of 3 tasks, 1 solved, 9 tokens",
        "first wrong decisions: 2 tokens; right ones before them: 3",
    ]
    assert next(line for line in shown if "AUC of the first wrong" in line).split()[-2:] == ["1.00", "0.42"]


def test_areas_are_none_without_comparisons_and_no_tokens_raise_an_error():
    alone = scored([0, 1, 1, 0.0], [0, 1, 1, 0.0], [0, 0, 0, 0], True)
    told = summary([alone])
    assert told["shared"] is None
    assert [told["own"][name] for name in ("first_wrong", "last", "mean")] == [None] * 3
    shown = table({"tasks": 3, "left_out": 2, "empty": 1, "shows": "answer", **told})
    assert "2 excluded: their privileged prompts are too long" in shown
    assert "1 more excluded: only a stop token, or a failed environment" in shown
    assert "AUCs need solved and failed rollouts" in shown
    with pytest.raises(UserError, match="nothing to measure"):
        summary([replace(alone, counts=torch.zeros(4, dtype=torch.bool))])
    with pytest.raises(UserError, match="not finite"):
        summary([replace(alone, own=torch.tensor([0, float("nan"), 1, 0]))])


def measured(tmp_path, **teacher) -> dict:
    probe, options = CheckTeacher(), {"template": " <ref> {reference}", **teacher}
    fit = trainer(tmp_path, generation(environment=AnyCall), probe, max_epochs=1)
    fit.fit(module(teacher=TeacherOptions(**options)), datamodule=data())
    return probe.result


def test_the_probe_scores_both_views_and_does_not_train(tmp_path):
    told = measured(tmp_path, weights="live")
    assert (told["rollouts"], told["tasks"], told["left_out"], told["empty"]) == (8, 2, 0, 0)
    assert told["own"]["size"] > 0
    assert told["other"]["size"] > 0
    assert told["own"] != told["other"]
    assert -1 <= told["shared"] < 1
    json.dumps(told, allow_nan=False)


def test_a_teacher_without_privileged_text_has_no_divergence(tmp_path, monkeypatch):
    """Both views then equal the policy's own, so the measured divergence comes only from the text."""
    monkeypatch.setattr("gear_lightning.teacher.privileged_text", lambda *_: None)
    told = measured(tmp_path, weights="live")
    assert told["own"]["size"] == told["other"]["size"] == pytest.approx(0, abs=1e-5)


# -- the command ------------------------------------------------------------------------------------------------------

COMMAND = [
    "teacher-check", "--config", "configs/quickstart.yaml", "--warm_start=null", "--model.policy.hidden_size", "32",
    "--model.policy.layers", "2", "--data.group_size", "2", "--data.val_limit", "4",
]  # fmt: skip


@pytest.mark.usefixtures("starts_quickly")
def test_the_command_measures_a_recipe_and_writes_only_its_result(tmp_path, repository):
    status, out, err = command(repository, *COMMAND, "--trainer.default_root_dir", tmp_path, "--tasks", "3")
    assert status == 0, err
    assert "6 rollouts of 3 tasks" in out
    assert "the teacher sees the reference of" in out
    assert [p.name for p in tmp_path.iterdir()] == ["teacher_check.json"]
    assert json.loads((tmp_path / "teacher_check.json").read_text())["tasks"] == 3


@pytest.mark.usefixtures("starts_quickly")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "configs/credit/grpo.yaml"], "model.credit=Uniform has no teacher"),
        (["--model.teacher.shows", "peer"], "model.teacher.shows=peer shows no text of the task"),
        (["--config", "configs/credit/opsd.yaml"], "Uniform has no teacher (the teacher of model.dist"),
        (["--tasks", "1"], "tasks=1: must be at least 2"),
        (["--tasks", "0"], "tasks=0: must be at least 2"),
        (["--out", "."], "out=. is a directory"),
        (["--out", "configs/quickstart.yaml/x.json"], "configs/quickstart.yaml/x.json: cannot be written"),
    ],
)
def test_invalid_options_give_one_error(tmp_path, repository, args, message):
    status, _, err = command(repository, *COMMAND, "--trainer.default_root_dir", tmp_path / "run", *args)
    assert status == 2, err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert message in line
