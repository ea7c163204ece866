"""The data module: groups, advantages, denominators, failed rollouts, and the order of tasks."""

from collections import Counter

import lightning as L
import pytest
import torch
from deadlines import until
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_data import Finite, Told, iteration
from tiny_runs import data, generation, module, trainer

from gear_lightning.collection.groups import plan_moves
from gear_lightning.data import RolloutDataModule
from gear_lightning.environments.base import Step
from gear_lightning.environments.lookup_chain import LookupChain


def by_reward(task: str, rollout: int) -> float:
    return float(rollout == 0)


@pytest.mark.parametrize("failure", ["invalid_reward", "environment_error", "environment_timeout", "prompt_too_long"])
def test_a_failed_rollout_does_not_affect_the_advantages_of_its_group(tmp_path, failure):
    two = [1.0, 0.0, 0.0]

    def some_fail(task, rollout):
        return failure if rollout == 3 else two[rollout]

    (batch,), source = iteration(tmp_path, some_fail)
    smaller = torch.tensor(two)
    expected = (smaller - smaller.mean()) / (smaller.std() + 1e-6)
    assert batch.size == 6
    for group in batch.group_ids.unique():
        assert torch.allclose(batch.advantages[batch.group_ids == group], expected)
    assert int(batch.step_tokens) == 18
    assert source.stats.statuses == Counter({"done": 6, failure: 2})


def test_groups_without_spread_are_kept_dropped_or_replaced(tmp_path):
    flat = set()

    def outcome(task, rollout):
        flat.add(task)
        return by_reward(task, rollout) if len(flat) % 2 == 0 else 0.1 + 0.2  # the std is not exactly 0

    (kept,), source = iteration(tmp_path, outcome)
    assert (kept.size, int(kept.step_tokens), source.stats.zero_spread) == (8, 24, 1)
    assert (kept.advantages.reshape(2, 4) == 0).all(-1).sum() == 1
    flat.clear()
    (dropped,), source = iteration(tmp_path, outcome, zero_spread="drop")
    assert (dropped.size, int(dropped.step_tokens), source.stats.zero_spread) == (4, 12, 1)
    flat.clear()
    (fresh,), source = iteration(tmp_path, outcome, zero_spread="resample")
    assert (fresh.size, int(fresh.step_tokens)) == (8, 24)
    assert (fresh.advantages != 0).all(), "a group without spread was not replaced"
    assert source.cursor == 4, "two rounds of two tasks must be generated"


def test_resampling_ends_after_resample_rounds(tmp_path):
    batches, source = iteration(tmp_path, lambda *_: 0.0, zero_spread="resample", resample_rounds=3)
    assert source.cursor == 6
    assert [b.size for b in batches] == [1], "the step needs a blank batch"
    assert not batches[0].action_mask.any()


def test_each_pass_over_the_tasks_uses_every_task_once_in_a_new_order(tmp_path):
    source = RolloutDataModule(Finite(10), tasks_per_iteration=5, group_size=2)
    first, second = ([source.train_task(i).id for i in range(k, k + 10)] for k in (0, 10))
    assert sorted(first) == sorted(second) == sorted(f"t{i}" for i in range(10))
    assert first != second
    other = RolloutDataModule(Finite(10), tasks_per_iteration=5, group_size=2, seed=1)
    assert [other.train_task(i).id for i in range(10)] != first


def test_a_peer_is_another_solved_rollout_of_the_same_group(tmp_path):
    _, source = iteration(tmp_path, lambda task, rollout: float(rollout in (1, 2)), tasks_per_iteration=1)
    assert source.generator.peers == [1.0] * 4
    _, source = iteration(tmp_path, lambda task, rollout: float(rollout == 1), tasks_per_iteration=1)
    assert source.generator.peers == [1.0, None, 1.0, 1.0], "a rollout must not be its own peer"


def test_micro_batches_contain_every_rollout_once(tmp_path):
    batches, _ = iteration(tmp_path, by_reward, micro_batch_size=3)
    assert len(batches) == 3
    assert sorted(i for b in batches for i in b.index.tolist()) == list(range(8))
    assert {int(b.step_tokens) for b in batches} == {24}


def test_an_iteration_without_usable_rollouts_changes_no_weight(tmp_path):
    from gear_lightning.environments.lookup_chain import LookupChain

    class Broken(LookupChain):
        def step(self, message):
            raise RuntimeError("tool broke")

    model = module(optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    start = {}

    class Keep(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            start.update({k: v.clone() for k, v in pl_module.policy.state_dict().items()})

    fit = trainer(tmp_path, generation(environment=Broken), max_epochs=1)
    fit.callbacks.append(Keep())
    fit.fit(model, datamodule=data())
    assert start
    assert all(torch.equal(v, start[k]) for k, v in model.policy.state_dict().items())
    assert fit.callback_metrics["rollouts/environment_error"] == 1


def test_evaluation_does_not_depend_on_batching(tmp_path):
    def success(size: int) -> dict[str, float]:
        model, source = module(), data(eval_batch_size=size, val_limit=5, val_rollouts=2)
        (found,) = trainer(tmp_path / str(size), generation(), limit_val_batches=None).validate(
            model, datamodule=source, verbose=False
        )
        return found

    assert success(3) == pytest.approx(success(10))


# -- oversampling, and the exchange of groups between ranks -----------------------------------------------------------


def test_oversampling_ends_the_slowest_rollouts_and_counts_them(tmp_path):
    done = []

    class Held(LookupChain):
        def reset(self, task, *, seed):
            self.held = task.id.endswith("-0")
            return super().reset(task, seed=seed)

        def step(self, message):
            if self.held:
                until(lambda: len(done) >= 4, "the other group")
            done.append(self.held)
            return Step(done=True, reward=float(len(done) % 2))

    source = data(tasks_per_iteration=1, oversample=1.0)
    runs = trainer(tmp_path, generation(environment=Held, workers=8), max_epochs=1)
    runs.fit(module(), datamodule=source)
    assert [group.group_id for group in source.groups] == [1], "the group that was complete first"
    assert source.stats.statuses["stopped"] == 4
    assert source.cursor == 2
    assert runs.callback_metrics["rollouts/stopped"] == 0.5


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 5))
def test_after_the_exchange_no_rank_lacks_groups_while_another_has_too_many(counts, share):
    after = list(counts)
    for giver, taker in plan_moves(counts, share):
        assert after[giver] > share > after[taker]
        after[giver] -= 1
        after[taker] += 1
    assert sum(after) == sum(counts)
    assert min(after) >= share or max(after) <= share


def test_resampling_takes_groups_with_a_signal_from_the_further_tasks_of_oversampling(tmp_path):
    source = RolloutDataModule(Finite(64), tasks_per_iteration=2, group_size=4, zero_spread="resample", oversample=0.5)
    source.trainer, source.generator = trainer(tmp_path), Told(lambda task, rollout: float(task != "t0" and rollout))
    source.train_task = lambda position: Finite(64)[position]
    source._generate()
    assert [group.task.id for group in source.groups] == ["t1", "t2"]
    assert source.cursor == 3, "three tasks are drawn for two"
