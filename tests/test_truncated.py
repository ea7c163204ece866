"""``data.truncated``: rollouts that a budget cut short are used for learning, or masked out of the loss."""

import pytest
import torch
from every_rule import Sharp
from scripted_data import Told
from scripted_data import iteration as one_iteration
from tiny_runs import AnyCall, data, generation, trainer

from gear_lightning.advantage import GRPO, DrGRPO, LeaveOneOut, TurnGRPO
from gear_lightning.callbacks.run_status import RunStatus
from gear_lightning.commands.status import status_of
from gear_lightning.credit import Uniform
from gear_lightning.environments.base import Step
from gear_lightning.generation.budgets import Budgets
from gear_lightning.module import GearModule
from gear_lightning.rewards import OverlongPenalty
from gear_lightning.runs.records import read_records


def iteration(tmp_path, rewards: list[float], cut: set[int], monkeypatch, **options):
    """Run one iteration of groups with these rewards, in which the rollouts ``cut`` are truncated."""
    played = Told.generate

    def generate(self, jobs, stage):
        rollouts = played(self, jobs, stage)
        for rollout, (_, seed) in zip(rollouts, jobs, strict=True):
            rollout.turn_rewards = [rollout.reward]
            rollout.status = "truncated" if seed[-1] in cut else rollout.status
        return rollouts

    monkeypatch.setattr(Told, "generate", generate)
    return one_iteration(tmp_path, lambda task, rollout: rewards[rollout], **options)


@pytest.mark.parametrize("advantage", [GRPO(), DrGRPO(), LeaveOneOut()])
def test_a_masked_rollout_is_not_in_the_loss_but_in_the_baseline(tmp_path, monkeypatch, advantage):
    rewards = [1.0, 0.0, 0.5, 0.0]
    options = {"advantage": advantage, "tasks_per_iteration": 1}
    (whole,), source = iteration(tmp_path, rewards, {1, 2}, monkeypatch, **options)
    assert (whole.size, int(whole.step_tokens), int(whole.step_rollouts)) == (4, 12, 4)
    assert (source.stats.masked, sum(source.stats.left_out.values())) == (0, 0), "by default they are used for learning"
    (masked,), source = iteration(tmp_path, rewards, {1, 2}, monkeypatch, truncated="mask", **options)
    assert (int(masked.step_tokens), int(masked.step_rollouts)) == (6, 2), "not excluded from the denominators"
    expected = advantage(torch.tensor(rewards))
    assert dict(zip(masked.index.tolist(), masked.advantages.tolist(), strict=True)) == {
        0: expected[0].item(),
        3: expected[3].item(),
    }
    assert source.stats.masked == 2
    assert source.stats.left_out == {"truncated": 2}
    assert source.stats.statuses == {"done": 2, "truncated": 2}
    assert source.stats.rewards == rewards, "train/reward must include all rollouts"


@pytest.mark.parametrize(
    ("rewards", "cut", "signal"),
    [
        ([1.0, 0.0, 0.0, 0.0], {0}, True),
        ([1.0, 0.0, 0.5, 0.5], {0, 1}, False),  # the other rollouts have the mean reward
        ([1.0, 0.0, 0.0, 0.0], {0, 1, 2, 3}, False),
        ([0.0, 0.0, 0.0, 0.0], set(), False),
    ],
)
def test_a_group_has_a_signal_only_if_an_unmasked_rollout_has_an_advantage(tmp_path, monkeypatch, rewards, cut, signal):
    for advantage in (GRPO(), TurnGRPO()):
        options = {"truncated": "mask", "advantage": advantage}
        _, source = iteration(tmp_path, rewards, cut, monkeypatch, **options)
        assert source.stats.zero_spread == (0 if signal else 2)
        _, source = iteration(tmp_path, rewards, cut, monkeypatch, zero_spread="resample", **options)
        assert source.cursor == (2 if signal else 8), "another group must replace it"
        (batch,), _ = iteration(tmp_path, rewards, cut, monkeypatch, zero_spread="drop", **options)
        assert int(batch.step_rollouts) == (2 * (4 - len(cut)) if signal else 0)


class Long(AnyCall):
    """Rewards length; half of the rollouts end before the budget."""

    def step(self, message):
        return Step(done=True, reward=float(len(message["content"].split())))


def test_a_run_masks_records_and_counts_cut_rollouts(tmp_path):
    generate = generation(
        environment=Long, budgets=Budgets(turns=1, tokens=6, context=96), overlong=OverlongPenalty(2, 4)
    )
    fit = trainer(tmp_path, generate, RunStatus(), max_epochs=1)
    fit.fit(GearModule(Sharp(), Uniform()), datamodule=data(truncated="mask", tasks_per_iteration=4, group_size=8))
    shares = {name: float(value) for name, value in fit.callback_metrics.items()}
    assert 0 < shares["rollouts/masked"] == shares["rollouts/truncated"] < 1
    (record,) = read_records(tmp_path)
    cut = [r for r in record.rollouts if r["status"] == "truncated"]
    assert len(cut) == shares["rollouts/masked"] * 32
    for r in record.rollouts:
        assert (r["row"] is None) == (r["status"] == "truncated")
        assert r["reward"] is not None
    assert all(r["reward_parts"]["overlong"] == -1.0 for r in cut), "the full penalty, only in the baseline"
    assert status_of(tmp_path)["status"]["failures"] == {"truncated": len(cut)}, "must be reported as excluded"
