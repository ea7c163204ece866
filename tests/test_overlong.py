"""DAPO's length penalty: its values, the rollouts it applies to, and what it does not change."""

import copy
import json

import pytest
from every_rule import watched
from talking_policies import policy, talking, tasks
from tiny_runs import generation, trainer

from gear_lightning.advantage import TurnGRPO
from gear_lightning.callbacks.generation import _penalise
from gear_lightning.environments.base import Task
from gear_lightning.errors import UserError
from gear_lightning.generation.budgets import Budgets
from gear_lightning.rewards import OverlongPenalty
from gear_lightning.rollout import Rollout
from gear_lightning.runs.records import read_records

PENALTY = OverlongPenalty(expected=28, buffer=40, factor=2.0)  # budgets of `talking`: 80 tokens


def test_golden_values():
    # the paper's: 0 up to 16384 tokens, the full penalty at 20480, half of it in the middle
    paper = OverlongPenalty(16384, 4096)
    assert [paper(n) for n in (0, 16384, 17408, 18432, 20480, 30000)] == [0, 0, 0.25, 0.5, 1, 1]
    assert [OverlongPenalty(0, 1, 0.25)(n) for n in (0, 1, 2)] == [0, 0.25, 0.25]


@pytest.mark.parametrize("values", [(-1, 5), (5, 0), (5, 5, 0.0), (5, 5, -1.0)])
def test_invalid_values_are_rejected(values):
    with pytest.raises(UserError, match=r"overlong.expected=.* overlong.buffer=.* overlong.factor="):
        OverlongPenalty(*values)


def test_a_penalty_that_cannot_be_reached_is_rejected():
    budgets = Budgets(tokens=24)
    generation(budgets=budgets, overlong=OverlongPenalty(16, 8))
    with pytest.raises(UserError, match=r"25 tokens is more than generation\.budgets\.tokens=24.*overlong\.expected"):
        generation(budgets=budgets, overlong=OverlongPenalty(16, 9))


def rollouts(folder) -> list[dict]:
    """Return the records of the first iteration, with their sampled tokens."""
    (record,) = read_records(folder, [0])
    sampled = record.tensors["action_mask"].sum(-1).tolist()
    return [{**r, "tokens": sampled[r["row"]]} for r in record.rollouts if r["row"] is not None]


def test_a_run_subtracts_the_penalty_once_and_does_not_change_success(tmp_path):
    """Compares the first iterations of two runs that differ only in the penalty."""
    for name, penalty in (("plain", None), ("short", PENALTY)):
        watched(tmp_path / name, policy(), tasks(advantage=TurnGRPO()), talking(overlong=penalty), max_epochs=1)
    plain, short = rollouts(tmp_path / "plain"), rollouts(tmp_path / "short")
    lost = [2 * min(1, max(0, (r["tokens"] - 28) / 40)) for r in plain]
    assert min(lost) == 0 < max(lost), "this test needs rollouts shorter and longer than 28 tokens"
    for before, after, penalty in zip(plain, short, lost, strict=True):
        assert after["messages"] == before["messages"]
        assert after["reward"] == pytest.approx(before["reward"] - penalty)
        assert after["reward_parts"] == pytest.approx({**before["reward_parts"], "overlong": -penalty})
        assert after["success"] == before["success"]
        assert after["turn_rewards"][:-1] == before["turn_rewards"][:-1]
        assert sum(after["turn_rewards"]) == pytest.approx(after["reward"])
    assert any(r["success"] and r["reward"] < 1 for r in short), "solved, although its reward is below the threshold"


def test_evaluation_applies_no_penalty(tmp_path):
    fit = trainer(tmp_path, talking(overlong=OverlongPenalty(0, 1)))
    fit.predict(policy(), datamodule=tasks(val_tasks=tasks().train_tasks), return_predictions=False)
    lines = [json.loads(line) for line in (tmp_path / "predictions" / "rank_0.jsonl").read_text().splitlines()]
    assert lines
    assert not any("overlong" in line["reward_parts"] for line in lines)
    assert all(line["reward"] >= 0 for line in lines)


def test_failed_rollouts_and_rollouts_without_turns_get_no_penalty():
    task = Task("t", [])
    failed = Rollout(task, [], action_mask=[True] * 9, turn_rewards=[1.0], turns=1, reward=1.0)
    failed.status = "environment_error"
    for rollout in (failed, Rollout(task, [])):
        before = copy.deepcopy(rollout.state_dict())
        _penalise(rollout, OverlongPenalty(0, 1))
        assert rollout.state_dict() == before
        assert rollout.reward_parts == {}
