"""The check of tasks before training: sampling, sharing between ranks, caching, and invalid tasks that it misses."""

import functools
import json
import logging
import re
from dataclasses import replace

import pytest
from tiny_runs import AnyCall, data, generation, module, trainer

from gear_lightning.credit import GEAR, Uniform
from gear_lightning.environments import lines, task_check
from gear_lightning.environments.base import Task, TaskSource
from gear_lightning.environments.dataset_stream import StreamedTasks
from gear_lightning.environments.dataset_tasks import DatasetTasks
from gear_lightning.environments.jsonl import JsonlTasks
from gear_lightning.environments.single_turn import SingleTurn
from gear_lightning.environments.task_check import TaskChecker, check_source, chosen
from gear_lightning.errors import UserError
from gear_lightning.generation.budgets import Budgets
from gear_lightning.module import GearModule
from gear_lightning.teacher import TeacherOptions


class Numbers(TaskSource):
    def __init__(self, size, longest=(), fingerprint=None):
        self._size, self._longest, self._fingerprint = size, longest, fingerprint

    size = property(lambda self: self._size)
    fingerprint = property(lambda self: self._fingerprint)

    def __getitem__(self, index):
        return Task(str(index), [{"role": "user", "content": f"e{index % 32}"}], reference="e1")

    def longest(self, count):
        return self._longest[:count]


class Looks(TaskChecker):
    """Records the tasks that it checks, and rejects some."""

    def __init__(self, bad=(), key="k"):
        self.bad, self.key, self.seen = bad, key, []

    def check_task(self, task):
        self.seen.append(int(task.id))
        if int(task.id) in self.bad:
            raise UserError(f"task {task.id} is bad")

    def check_key(self):
        return self.key


def check(source, checker=None, used=None, limit=100) -> list[int]:
    checker = checker or Looks()
    check_source("data.train_tasks", source, used, limit, checker)
    return checker.seen


@pytest.fixture
def remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("GEAR_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(task_check, "REMEMBERED", 10)


@pytest.mark.parametrize("kind", ["lines", "rows", "stream"])
def test_the_error_about_a_task_names_its_file_and_row(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("GEAR_LIGHTNING_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps({"prompt": "p", "id": str(i)}) + "\n" for i in range(3)))
    sources = {"lines": JsonlTasks, "rows": DatasetTasks, "stream": functools.partial(StreamedTasks, buffer=1)}
    with pytest.raises(UserError, match=rf"^{re.escape(str(file))}:2: task 1 is bad$"):
        check(sources[kind](str(file)), Looks(bad=(1,)))


def test_a_small_source_is_checked_completely_and_a_large_one_by_a_fixed_sample(caplog):
    caplog.set_level(logging.INFO)
    assert check(Numbers(100)) == list(range(100))
    assert check(Numbers(5000), limit=None) == list(range(5000))
    assert "sample" not in caplog.text
    found = check(Numbers(10**9, longest=(7, 10**8, 3)))
    assert "data.train_tasks: checked 100 of 1,000,000,000 tasks: a sample" in caplog.text
    assert len(set(found)) == len(found) == 100
    assert found == sorted(found), "the error must name the first invalid task"
    assert {3, 7, 10**8} <= set(found), "the sample must include the longest tasks"
    assert found[-1] > 9 * 10**8
    assert found == check(Numbers(10**9, longest=(7, 10**8, 3))), "the sample must be the same at every start"
    assert set(chosen(Numbers(50, longest=range(50)), 20, 10)) <= set(range(20)), "only tasks that are used are sampled"
    assert check(Numbers(None)) == list(range(16))
    assert check(Numbers(40), used=8) == list(range(8))
    with pytest.raises(UserError, match="Numbers has no tasks"):
        check(Numbers(0))


def test_ranks_share_the_tasks_and_each_checks_at_least_one(monkeypatch):
    parts = []
    for rank in range(3):
        monkeypatch.setattr(task_check, "place", lambda rank=rank: (rank, 3))
        parts.append(check(Numbers(100)))
    assert sorted(i for part in parts for i in part) == list(range(100))
    monkeypatch.setattr(task_check, "place", lambda: (2, 3))
    assert check(Numbers(1)) == [0], "the ranks of a machine must detect its problems"


def test_ranks_with_different_tasks_stop_before_training(monkeypatch):
    class Digested(Numbers):
        digest = property(lambda self: "ab" * 32)

    other = {"data.train_tasks": "ba" * 6}
    gather = "gear_lightning.distributed.collective.gather"
    monkeypatch.setattr(gather, lambda mine: [mine, other] if isinstance(mine, dict) else [mine])
    with pytest.raises(UserError, match=r"rank 1 has other tasks than rank 0: data\.train_tasks is baba.* and abab"):
        check(Digested(5))
    other["data.train_tasks"] = "ab" * 6
    assert check(Digested(5)) == [0, 1, 2, 3, 4]


def test_a_passed_check_is_cached_for_the_same_tasks_and_checker(remembered):
    source = Numbers(50, fingerprint="a")
    assert len(check(source)) == 50
    assert check(source) == [0], "one task is still checked, because this machine may differ"
    assert len(check(Numbers(50, fingerprint="b"))) == 50, "other tasks need a check"
    assert len(check(source, Looks(key="other"))) == 50, "another checker needs a check"
    assert len(check(source, limit=20)) == 20
    assert len(check(Numbers(50))) == len(check(source, Looks(key=None))) == 50, "an unknown key must not be cached"
    for _ in range(2):
        with pytest.raises(UserError, match="task 30 is bad"):
            check(Numbers(50, fingerprint="c"), Looks(bad=[30]))
    assert len(check(Numbers(50, fingerprint="c"))) == 50, "a failed check must not be cached"


def test_a_cache_that_cannot_be_written_has_no_effect(remembered, tmp_path):
    (tmp_path / "cache").touch()
    source = Numbers(50, fingerprint="a")
    with pytest.warns(UserWarning, match="result of the check of the tasks cannot be written"):
        check(source)
    assert len(check(source)) == 50


def key(environment=AnyCall, budgets=Budgets(context=96), **options) -> str | None:
    generate = generation(environment=environment, budgets=budgets)
    generate._module = module(**options)
    return generate.check_key()


def test_the_key_covers_everything_that_the_check_depends_on():
    keys = [
        key(),
        key(credit=Uniform()),
        key(credit=GEAR(kappa=0.5)),
        key(budgets=Budgets(context=97)),
        key(teacher=TeacherOptions(template=" <ref> {reference}", max_prompt=50)),
        key(functools.partial(SingleTurn, "exact")),
        key(functools.partial(SingleTurn, "contains")),
        key(functools.partial(SingleTurn, AnyCall.step)),
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert keys[0] == key()
    assert key(functools.partial(SingleTurn, lambda task, said, keys=keys: 1.0)) is not None
    assert key(functools.partial(SingleTurn, lambda task, said: len(keys))) is None, "a closure can contain anything"


def test_the_fingerprint_of_a_source_includes_the_code_of_rewards(tmp_path, monkeypatch):
    code, tasks = tmp_path / "judges.py", tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "a"}\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    code.write_text("def judge(task, transcript): return 1.0\n")
    before = JsonlTasks(str(tasks), reward="judges.judge").fingerprint
    code.write_text("def judge(task, transcript): return 1.0  # otherwise\n")
    assert JsonlTasks(str(tasks), reward="judges.judge").fingerprint not in (None, before)
    assert JsonlTasks(str(tasks)).fingerprint != before


def lookups(path, n: int, **odd) -> JsonlTasks:
    """Return tasks for the tiny policy, of which task ``n // 2`` differs."""
    rows = [{"prompt": f"e{i % 32} w1", "answer": "e1", "reference": "e1"} for i in range(n)]
    rows[n // 2] |= odd
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonlTasks(str(path))


ODD = [
    ({"prompt": "e1 " * 200}, "rollouts/prompt_too_long"),
    ({"answer": "none", "reward": "number"}, "rollouts/invalid_reward"),
]


@pytest.mark.parametrize(("odd", "metric"), ODD)
def test_an_invalid_task_that_the_check_misses_fails_its_rollouts_and_not_the_run(tmp_path, monkeypatch, odd, metric):
    environment = functools.partial(SingleTurn, "contains")
    source = data(train_tasks=lookups(tmp_path / "tasks.jsonl", 8, **odd), tasks_per_iteration=8, val_tasks=None)
    with pytest.raises(UserError, match=r"tasks\.jsonl:5: task tasks-5"):
        generation(environment=environment).attach(module(), source)
    source.check_limit = 1
    monkeypatch.setattr(JsonlTasks, "longest", lambda self, count: ())
    fit = trainer(tmp_path, generation(environment=environment), max_epochs=1)
    fit.fit(module(), datamodule=source)
    assert fit.global_step == 1
    assert fit.callback_metrics[metric] == pytest.approx(1 / 8)


def test_a_too_long_reference_that_the_check_misses_ends_the_run_if_overlong_is_error(tmp_path, monkeypatch):
    options = TeacherOptions(template=" <ref> {reference}", max_prompt=40, overlong="error")
    tasks = lookups(tmp_path / "tasks.jsonl", 8, reference="e1 " * 80)
    source = data(train_tasks=tasks, tasks_per_iteration=8, val_tasks=None)
    environment = functools.partial(SingleTurn, "contains")
    with pytest.raises(UserError, match="task tasks-5: its privileged prompt has"):
        generation(environment=environment).attach(module(teacher=options), source)
    source.check_limit = 1
    monkeypatch.setattr(JsonlTasks, "longest", lambda self, count: ())
    fit = trainer(tmp_path / "error", generation(environment=environment), max_epochs=1)
    with pytest.raises(UserError, match="task tasks-5: its privileged prompt has"):
        fit.fit(module(teacher=options), datamodule=source)
    fit = trainer(tmp_path / "drop", generation(environment=environment), max_epochs=1)
    fit.fit(module(teacher=replace(options, overlong="drop")), datamodule=source)
    assert fit.callback_metrics["teacher/overlong"] == 4


def test_a_teacher_prompt_that_cannot_be_built_affects_only_the_teachers_view(tmp_path, monkeypatch):
    source = data(train_tasks=lookups(tmp_path / "tasks.jsonl", 8), tasks_per_iteration=8, val_tasks=None)
    model, make = module(), GearModule.privileged_prompt

    def fails(self, task, *rest, **options):
        if task.id == "tasks-5":
            raise ValueError("no such character")
        return make(self, task, *rest, **options)

    monkeypatch.setattr(GearModule, "privileged_prompt", fails)
    source.check_limit = 1
    monkeypatch.setattr(JsonlTasks, "longest", lambda self, count: ())
    fit = trainer(tmp_path, generation(environment=functools.partial(SingleTurn, "contains")), max_epochs=1)
    with pytest.warns(UserWarning, match="task tasks-5: the teacher's prompt cannot be built"):
        fit.fit(model, datamodule=source)
    assert fit.callback_metrics["teacher/overlong"] == 4


@pytest.mark.parametrize("where", ["prompt", "reference"])
def test_text_that_cannot_be_encoded_is_rejected_before_training(where):
    half = "e1 \ud800"

    class Halves(Numbers):
        def __getitem__(self, index):
            said = half if where == "prompt" else "e1"
            reference = half if where == "reference" else "e1"
            return Task("t7", [{"role": "user", "content": said}], reference=reference, meta={"answer": "e1"})

    source = data(train_tasks=Halves(3), val_tasks=None)
    with pytest.raises(UserError, match=r"task t7: .*surrogates not allowed"):
        generation(environment=functools.partial(SingleTurn, "contains")).attach(module(), source)


def test_overwriting_the_task_file_stops_the_run_with_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "SMALL", 0)
    monkeypatch.setenv("GEAR_LIGHTNING_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tasks.jsonl"
    source = data(train_tasks=lookups(path, 8), tasks_per_iteration=4, val_tasks=None)

    class Overwrites(AnyCall):
        def reset(self, task, *, seed):
            path.write_text('{"prompt": "e2"}\n' * 20)
            return []

        def step(self, message):
            return SingleTurn("contains").step(message)

    with pytest.raises(UserError, match=r"tasks\.jsonl:\d: the file was changed while the run was using it"):
        trainer(tmp_path, generation(environment=Overwrites), max_epochs=4).fit(module(), datamodule=source)


def test_the_order_of_a_large_source_is_drawn_once_per_pass(monkeypatch):
    import torch

    drawn, real = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **options: drawn.append(args) or real(*args, **options))
    source = data(train_tasks=Numbers(50))
    ids = [source.train_task(i).id for i in range(100)]
    assert len(drawn) == 2
    assert sorted(ids[:50]) == sorted(ids[50:])
    fresh = data(train_tasks=Numbers(50))
    assert [fresh.train_task(i).id for i in (70, 3, 99)] == [ids[i] for i in (70, 3, 99)], (
        "it depends on earlier accesses"
    )
