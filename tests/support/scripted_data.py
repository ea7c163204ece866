"""Data modules with scripted rollouts."""

from tiny_runs import trainer

from gear_lightning.data import RolloutDataModule, RolloutGenerator
from gear_lightning.environments.base import Task, TaskSource
from gear_lightning.rollout import Rollout


class Finite(TaskSource):
    def __init__(self, size: int):
        self.length = size

    @property
    def size(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Task:
        return Task(f"t{index}", [{"role": "user", "content": "e1"}], reference="r1")


class Told(RolloutGenerator):
    """Generates rollouts of three sampled tokens with the test's rewards by task and rollout."""

    temperature = 1.0

    def __init__(self, outcome):
        self.outcome, self.played = outcome, []

    def generate(self, jobs, stage, enough=None):
        out = []
        for task, seed in jobs:
            self.played.append(task.id)
            rollout = Rollout(task, list(task.messages), opening_messages=1, prompt_length=2)
            rollout.add_context([7, 8])
            for name, value in {
                "tokens": [9, 10, 11], "action_mask": [True] * 3, "turn_ids": [0] * 3,
                "stop_mask": [False] * 3, "sampler_logprobs": [-1.0] * 3,
            }.items():  # fmt: skip
                getattr(rollout, name).extend(value)
            found = self.outcome(task.id, seed[-1])
            rollout.reward, rollout.status = (0.0, found) if isinstance(found, str) else (found, "done")
            rollout.success = rollout.reward >= 1
            out.append(rollout)
        return out

    def teacher_prompt(self, rollout, peer):
        self.peers = [*getattr(self, "peers", []), None if peer is None else peer.reward]
        return [5, 6, 7, 8], False

    def check_task(self, task):
        pass


def iteration(tmp_path, outcome, **options):
    """Return the rows of one iteration's batches, and the data module."""
    source = RolloutDataModule(
        **{"train_tasks": Finite(64), "tasks_per_iteration": 2, "group_size": 4, "micro_batch_size": 8, **options}
    )
    source.trainer, source.generator = trainer(tmp_path), Told(outcome)
    return list(source._iterate()), source
