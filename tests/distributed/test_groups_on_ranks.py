"""Dynamic sampling over several ranks: a rank that lacks groups with a signal gets those of others."""

from pathlib import Path
from typing import Any

from rank_group import connect
from scripted_data import Finite, Told

from gear_lightning.data import RolloutDataModule


def iteration(useful: set[str], rounds: int) -> dict[str, Any]:
    source = RolloutDataModule(
        Finite(64), tasks_per_iteration=4, group_size=2, zero_spread="resample", resample_rounds=rounds
    )
    source.trainer = connect("ddp")._lightning_module.trainer
    source.generator = Told(lambda task, rollout: float(task in useful and rollout))
    source.train_task = lambda position: Finite(64)[position]
    source._generate()
    learned = [(group.group_id, group.task.id, [r.reward for r in group.rollouts]) for group in source.groups]
    return {"learned": learned, "cursor": source.cursor, "counted": source.stats.groups}


def test_a_rank_that_lacks_groups_gets_those_of_another(pair, tmp_path: Path):
    # two tasks per rank and round: the first rank draws 0, 1, 4, 5, the second one 2, 3, 6, 7
    first, second = pair.run(iteration, {"t0", "t1", "t4", "t5"}, 4)
    assert [task for _, task, _ in first["learned"]] == ["t0", "t1"]
    assert [task for _, task, _ in second["learned"]] == ["t4", "t5"]
    assert all(rewards == [0.0, 1.0] for _, _, rewards in first["learned"] + second["learned"])
    assert first["cursor"] == second["cursor"] == 8, "two rounds are enough for all ranks together"
    assert first["counted"] == second["counted"] == 4


def test_groups_without_a_signal_fill_up_what_all_ranks_together_lack(pair):
    first, second = pair.run(iteration, {"t2", "t3", "t6"}, 2)
    assert [task for _, task, _ in second["learned"]] == ["t2", "t3"]
    assert [task for _, task, _ in first["learned"]] == ["t6", "t0"]
