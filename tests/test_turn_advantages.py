"""Advantages of turns: hand-computed values, a slow reference, groups without a signal, and their use in a batch."""

import math
import statistics
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from every_rule import Talk, watched
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_data import Finite, Told
from scripted_policy import answered
from talking_policies import policy, talking, tasks
from tiny_runs import trainer
from torch.testing import assert_close

from gear_lightning.advantage import GRPO, MTGRPO, DrGRPO, GiGPO, GroupAdvantage, LeaveOneOut, TurnGRPO
from gear_lightning.callbacks.generation import GenerationCallback
from gear_lightning.data import RolloutDataModule
from gear_lightning.environments.base import Environment, Step, Task
from gear_lightning.errors import UserError
from gear_lightning.generation.budgets import Budgets
from gear_lightning.runs.records import read_records

RULES = [TurnGRPO(), MTGRPO(), MTGRPO(coef=0.3), GiGPO(), GiGPO(step_weight=0.5, gamma=0.5, divide_by_std=False)]
PLAIN = [GRPO(), DrGRPO(), LeaveOneOut()]
Turns = list[list[float]]


def of_turns(rule: GroupAdvantage, turn_rewards: Turns, states: list[list[str]] | None = None) -> Turns:
    found = rule.of_turns(*facts(turn_rewards, states))
    assert found is not None
    assert [len(row) for row in found] == [len(row) for row in turn_rewards]
    return found


def facts(turn_rewards: Turns, states: list[list[str]] | None = None) -> tuple[torch.Tensor, Turns, list[list[str]]]:
    states = states or [["", *(f"s{i}.{k}" for k in range(1, len(row)))] for i, row in enumerate(turn_rewards)]
    return torch.tensor([math.fsum(row) for row in turn_rewards]), turn_rewards, states


def near(found: Turns, wanted: Turns) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, abs=2e-5, rel=1e-5)


# values by hand -------------------------------------------------------------------------------------------------------


def test_golden_turn_grpo():
    # turn 0: 1 0 0, mean 1/3, variance (4/9 + 1/9 + 1/9) / 2 = 1/3: (2/3) / 0.57735 = 1.15470, (-1/3) / 0.57735
    # turn 1: 2 4, mean 3, std sqrt(2); turn 2: only one rollout
    near(
        of_turns(TurnGRPO(), [[1, 2], [0, 4, 9], [0]]),
        [[1.15470, -0.70711], [-0.57735, 0.70711, 0], [-0.57735]],
    )
    assert TurnGRPO()(torch.tensor([1.0, 0, 0, 0])).tolist() == GRPO()(torch.tensor([1.0, 0, 0, 0])).tolist()


def test_golden_mt_grpo():
    # outcomes 0 1 0 2: mean 0.75, variance (0.5625 + 0.0625 + 0.5625 + 1.5625) / 3, std 0.95743
    #   -0.78335, 0.26112, -0.78335, 1.30558
    # turns before the last 1 0 0 0: 1.5, -0.5, -0.5, -0.5
    # totals 1 1 0 2: mean 1, std sqrt(2/3): the rollout of one turn has 1 / 0.81650 = 1.22474
    rewards = [[1, 0], [0, 1], [0, 0, 0], [2]]
    near(
        of_turns(MTGRPO(), rewards),
        [[0.71665, -0.78335], [-0.23888, 0.26112], [-1.28335, -0.78335, -0.78335], [1.22474]],
    )
    near(
        of_turns(MTGRPO(coef=0.2), rewards),
        [[-0.48335, -0.78335], [0.16112, 0.26112], [-0.88335, -0.78335, -0.78335], [1.22474]],
    )


def test_golden_gigpo():
    # gamma 0.5: returns 1/4 1/2 1 and 0 0 0; rewards 1 and 0
    # episode: +-0.5 / 0.70711; state s: 1/4 and 0, the same; state a: 1/2 0 0, mean 1/6, variance
    # (1/9 + 1/36 + 1/36) / 2 = 1/12: (1/3) / 0.28868 = 1.15470 and -0.57735 twice; state b once: 0
    rewards, states = [[0, 0, 1], [0, 0, 0]], [["s", "a", "b"], ["s", "a", "a"]]
    near(
        of_turns(GiGPO(gamma=0.5), rewards, states),
        [[1.41421, 1.86181, 0.70711], [-1.41421, -1.28446, -1.28446]],
    )
    # without dividing: 0.5 and s 0.125, a 1/3 and -1/6
    near(
        of_turns(GiGPO(gamma=0.5, divide_by_std=False), rewards, states),
        [[0.625, 0.83333, 0.5], [-0.625, -0.66667, -0.66667]],
    )
    near(
        of_turns(GiGPO(gamma=0.5, divide_by_std=False, step_weight=2.0), rewards, states),
        [[0.75, 1.16667, 0.5], [-0.75, -0.83333, -0.83333]],
    )
    assert (GiGPO().gamma, GiGPO().step_weight) == (0.95, 1.0)


# a slow reference -----------------------------------------------------------------------------------------------------


def score(value: float, all_of_them: list[float], eps: float = 1e-6, scale: bool = True) -> float:
    if len(set(all_of_them)) < 2:
        return 0.0
    deviation = value - statistics.fmean(all_of_them)
    return deviation / (statistics.stdev(all_of_them) + eps) if scale else deviation


def slow(rule: GroupAdvantage, turn_rewards: Turns, states: list[list[str]]) -> Turns:
    """Return the advantages by a slow reference, one turn at a time."""
    out: Turns = []
    totals = [math.fsum(row) for row in turn_rewards]
    for i, row in enumerate(turn_rewards):
        out.append([])
        for k, reward in enumerate(row):
            if isinstance(rule, TurnGRPO):
                value = score(reward, [other[k] for other in turn_rewards if len(other) > k])
            elif isinstance(rule, MTGRPO):
                value = score(row[-1], [other[-1] for other in turn_rewards])
                if len(row) == 1:
                    value = score(totals[i], totals)
                elif k == 0:
                    earlier = [math.fsum(other) - other[-1] for other in turn_rewards]
                    value += rule.coef * score(earlier[i], earlier)
            else:
                assert isinstance(rule, GiGPO)

                def gain(j: int, n: int, gamma: float = rule.gamma) -> float:
                    return math.fsum(r * gamma**m for m, r in enumerate(turn_rewards[j][n:]))

                alike = [gain(j, n) for j, names in enumerate(states) for n, s in enumerate(names) if s == states[i][k]]
                value = score(totals[i], totals, scale=rule.divide_by_std)
                value += rule.step_weight * score(gain(i, k), alike, scale=rule.divide_by_std)
            out[-1].append(value)
    return out


@st.composite
def groups(draw):
    """Draw rewards on a grid, so that sums are exact and ties are common, and few states, so that they recur."""
    turns = st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=1, max_size=4)
    rewards = draw(st.lists(turns, min_size=2, max_size=8))
    return rewards, [[draw(st.sampled_from("abc")) for _ in row] for row in rewards]


@settings(deadline=None)
@given(groups(), st.sampled_from(RULES))
def test_advantages_equal_a_slow_reference(group, rule):
    if isinstance(rule, GiGPO):  # also on a grid, so that sums are exact
        rule = GiGPO(rule.step_weight, 0.5, rule.divide_by_std)
    for found, wanted in zip(of_turns(rule, *group), slow(rule, *group), strict=True):
        assert found == pytest.approx(wanted, abs=1e-4, rel=1e-4)


@settings(deadline=None)
@given(groups(), st.sampled_from(RULES), st.randoms(use_true_random=False))
def test_the_order_of_rollouts_does_not_matter(group, rule, rng):
    rewards, states = group
    order = rng.sample(range(len(rewards)), len(rewards))
    mixed = of_turns(rule, [rewards[i] for i in order], [states[i] for i in order])
    for found, wanted in zip(mixed, (of_turns(rule, *group)[i] for i in order), strict=True):
        assert found == pytest.approx(wanted, abs=1e-3, rel=1e-3)


def test_rollouts_of_one_turn_have_the_advantage_of_grpo():
    rewards = [[1.0], [0.0], [0.5], [0.0]]
    plain = GRPO()(torch.tensor([1.0, 0.0, 0.5, 0.0])).tolist()
    for rule in (TurnGRPO(), MTGRPO(), GiGPO(step_weight=0.0)):
        assert of_turns(rule, rewards) == [[a] for a in plain]
    near(of_turns(GiGPO(), rewards), [[2 * a] for a in plain])  # all began in one state: both terms are equal


# signal ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_turns_can_have_a_signal_if_the_rollouts_have_equal_rewards(rule):
    assert rule.has_signal(*facts([[0.0, 1.0], [1.0, 0.0]]))
    assert not rule.has_signal(*facts([[0.1, 0.2], [0.1, 0.2], [0.1, 0.2]]))
    assert not rule.has_signal(*facts([[0.3]]))
    assert not rule.has_signal(*facts([]))
    with pytest.raises(UserError, match="group_size=1: "):
        rule.check_group_size(1)


@pytest.mark.parametrize("rule", PLAIN)
def test_advantages_of_rollouts_use_only_rewards(rule):
    assert rule.of_turns(*facts([[0.0, 1.0], [1.0, 0.0]])) is None
    assert not rule.has_signal(*facts([[0.0, 1.0], [1.0, 0.0]]))
    assert rule.has_signal(*facts([[0.0, 1.0], [1.0, 1.0]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MTGRPO(coef=-1.0), "coef=-1.0 must be at least 0"),
        (lambda: GiGPO(gamma=1.5), r"gamma=1.5 is outside \[0, 1\]"),
        (lambda: MTGRPO(coef=math.inf), "coef=inf must be at least 0, and finite"),
        (lambda: GiGPO(step_weight=math.nan), "step_weight=nan must be at least 0"),
        (lambda: GiGPO(step_weight=math.inf), "step_weight=inf must be at least 0, and finite"),
        *[
            (partial(kind, eps=eps), f"{kind.__name__}: eps={eps} must be at least 0, and finite")
            for kind in (GRPO, TurnGRPO, MTGRPO, GiGPO)
            for eps in (-5.0, math.nan, math.inf)
        ],
    ],
)
def test_invalid_settings_are_rejected(make, message):
    with pytest.raises(UserError, match=message):
        make()


# into the batch -------------------------------------------------------------------------------------------------------


class ToldTurns(Told):
    """Generates rollouts whose turns have two tokens each and a following observation. The test sets the turn rewards
    by task and rollout; None is a rollout that failed after two turns."""

    def __init__(self, rewards):
        super().__init__(lambda *_: 0.0)
        self.rewards = rewards

    def generate(self, jobs, stage):
        out = super().generate(jobs, stage)
        for (task, seed), rollout in zip(jobs, out, strict=True):
            found = self.rewards(task.id, seed[-1])
            rollout.status, rewards = ("environment_error", [9.0, 9.0]) if found is None else ("done", found)
            n = len(rewards)
            rollout.tokens = [7, 8] + [9, 10, 11] * n
            rollout.action_mask = [False, False] + [True, True, False] * n
            rollout.turn_ids = [-1, -1] + [t for turn in range(n) for t in (turn, turn, -1)]
            rollout.stop_mask, rollout.decisions = [False] * len(rollout.tokens), []
            rollout.sampler_logprobs = [0.0] * len(rollout.tokens)
            rollout.reward, rollout.turn_rewards, rollout.turns = sum(rewards), rewards, n
            rollout.states = ["start", *["there"] * (n - 1)]
        return out


def iteration(tmp_path, rewards, **options):
    """Return the batch of one iteration, and the data module."""
    options = {"tasks_per_iteration": 1, "group_size": 4, "micro_batch_size": 64, **options}
    source = RolloutDataModule(Finite(2), **options)
    source.trainer, source.generator = trainer(tmp_path), ToldTurns(rewards)
    (batch,) = list(source._iterate())
    return batch, source


SOME = [[1.0, 2.0], [0.0, 4.0, 9.0], [0.0], [0.5, 0.0]]


@pytest.mark.parametrize("rule", RULES)
def test_the_tokens_of_a_turn_have_its_advantage(tmp_path, rule):
    batch, _ = iteration(tmp_path, lambda task, rollout: SOME[rollout], advantage=rule)
    states = [["start", *["there"] * (len(row) - 1)] for row in SOME]
    wanted = slow(rule, SOME, states)
    assert_close(batch.advantages, rule(torch.tensor([3.0, 13.0, 0.0, 0.5]))[batch.index])
    for row, i in enumerate(batch.index.tolist()):
        spread = [0.0, 0.0] + [x for a in wanted[i] for x in (a, a, 0.0)]
        assert batch.base_advantages[row, : len(spread)].tolist() == pytest.approx(spread, abs=1e-4)
        assert (batch.base_advantages[row, len(spread) :] == 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_failed_rollouts_do_not_affect_the_others(tmp_path, rule):
    """Its reward and its state 'there' are excluded from the comparison."""
    batch, source = iteration(tmp_path, lambda task, rollout: [*SOME[:3], None][rollout], advantage=rule)
    assert source.stats.statuses == Counter({"done": 3, "environment_error": 1})
    assert batch.size == 3
    wanted = slow(rule, SOME[:3], [["start", *["there"] * (len(row) - 1)] for row in SOME[:3]])
    for row, i in enumerate(batch.index.tolist()):
        of_turn = batch.base_advantages[row, 2::3][: len(SOME[i])]
        assert of_turn.tolist() == pytest.approx(wanted[i], abs=1e-4)


def test_a_group_whose_signal_is_in_its_turns_is_not_dropped(tmp_path):
    """All rollouts have reward 1; on t0, which is every second task, they get it in different turns."""

    def rewards(task, rollout):
        flat = int(task[1:]) % 2
        return [0.0, 1.0] if flat or rollout % 2 else [1.0, 0.0]

    sizes = {}
    for rule in (GRPO(), *RULES):
        batch, source = iteration(tmp_path, rewards, advantage=rule, zero_spread="drop", tasks_per_iteration=8)
        sizes[rule] = (int((batch.index >= 0).sum()), source.stats.zero_spread)
    assert sizes == {GRPO(): (0, 8), **dict.fromkeys(RULES, (16, 4))}
    batch, source = iteration(tmp_path, rewards, advantage=TurnGRPO(), zero_spread="resample", tasks_per_iteration=4)
    assert batch.size == 16
    assert source.cursor == 8, "two rounds of four tasks must be generated"
    assert (batch.base_advantages[batch.action_mask] != 0).all()


@pytest.mark.parametrize("rule", [TurnGRPO(), GiGPO()])
def test_a_run_trains_on_the_advantages_of_its_recorded_turns(tmp_path, rule):
    watch = watched(tmp_path, policy(), tasks(advantage=rule), talking(), max_epochs=2)
    checked = 0
    for record in read_records(tmp_path):
        tensors = record.tensors
        for group in {r["group_id"] for r in record.rollouts}:
            mine = [r for r in record.rollouts if r["group_id"] == group and r["row"] is not None]
            wanted = slow(rule, [r["turn_rewards"] for r in mine], [r["states"] for r in mine])
            for rollout, advantages in zip(mine, wanted, strict=True):
                turns, row = tensors["turn_ids"][rollout["row"]].tolist(), rollout["row"]
                spread = [advantages[t] if t >= 0 else 0.0 for t in turns]
                for name in ("base_advantages", "token_advantages"):
                    assert tensors[name][row].tolist() == pytest.approx(spread, abs=1e-3)
                checked += len(set(advantages)) > 1
    assert checked, "this test needs turns with different advantages"
    assert len(watch.weights) == 3


class PaysAtTheEnd(Talk):
    """Gives a reward only in the last turn."""

    def step(self, message):
        step = super().step(message)
        return step if step.done else replace(step, reward=0.0)


def test_turn_grpo_warns_if_only_last_turns_are_rewarded(tmp_path):
    assert TurnGRPO().complaint([[0, 0], [0]]) is None, "there is no reward yet"
    assert TurnGRPO().complaint([[0, 0, 1], [0.5, 0]]) is None
    assert "gets a negative advantage in the turn in which" in str(TurnGRPO().complaint([[0, 0, 1], [0, 0]]))
    assert all(rule.complaint([[0, 0, 1], [0, 0]]) is None for rule in [*RULES[1:], *PLAIN])
    played = GenerationCallback(PaysAtTheEnd, budgets=Budgets(4, 80, 24, 250))
    with pytest.warns(UserWarning, match="only last turns were rewarded") as warned:
        watched(tmp_path, policy(), tasks(advantage=TurnGRPO()), played, max_epochs=3)
    assert sum("only last turns" in str(one.message) for one in warned) == 1


class Opens(Environment):
    """Opens with a message that differs for each rollout."""

    def reset(self, task, *, seed):
        return [{"role": "user", "content": "a red door"}, {"role": "user", "content": "a key"}]

    def step(self, message):
        return Step(done=True)


def test_the_opening_messages_name_the_first_state():
    assert answered(Task("t", [{"role": "user", "content": "Go."}]), Opens, "open").states == ["a red door\na key"]
