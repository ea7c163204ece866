"""Ranks with very different work call the same collectives: no rank waits forever for another."""

import os
from pathlib import Path
from typing import Any

import pytest
from distributed_runs import Chatter
from short_runs import train

from gear_lightning.errors import UserError
from gear_lightning.generation.cached_engine import CachedEngine
from gear_lightning.generation.engine import Sampling

STRATEGIES = ["ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload"]
MODES = [(name, "auto") for name in STRATEGIES[:1] + STRATEGIES[2:4]] + [
    (name, mode) for name in ("fsdp", "zero3", "zero3_offload") for mode in ("gather", "stream")
]


def rank() -> int:
    return int(os.environ["LOCAL_RANK"])


class Uneven(CachedEngine):
    """On rank 0 any token ends a turn, so that every rollout ends at its first token; on rank 1 none does."""

    def begin(self, model: Any, sampling: Sampling, stop_ids: set[int]) -> None:
        super().begin(model, sampling, set(range(1000)) if rank() == 0 else set())


class OneRankLearns(Chatter):
    """Every rollout of rank 0 has the same reward."""

    def step(self, message: dict) -> Any:
        step = super().step(message)
        step.reward = 0.5 if rank() == 0 else step.reward
        return step


class Raises(Chatter):
    """Fails in every rollout of rank 0, at once."""

    def reset(self, task: Any, *, seed: int) -> list[dict]:
        if rank() == 0:
            raise ValueError("no such world")
        return super().reset(task, seed=seed)


def uneven(run: Path, name: str, mode: str) -> dict[str, Any]:
    return train(run, name, engine=Uneven(), weights=mode)


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_one_rank_ends_at_the_first_token_and_the_other_at_the_limit(pair, tmp_path, name, mode):
    short, long = pair.run(uneven, tmp_path, name, mode)
    assert short["tokens"] == 4 * 3, "one token in each turn"
    assert long["tokens"] == 4 * 40
    assert short["metrics"] == long["metrics"]


class WrongOnOneRank(CachedEngine):
    """Returns wrong log-probs on rank 1."""

    def poll(self) -> Any:
        turns = super().poll()
        for turn in turns if rank() == 1 else []:
            turn.logprobs = [x - 0.1 for x in turn.logprobs]
        return turns


def wrong(run: Path, name: str, mode: str) -> str:
    try:
        train(run, name, engine=WrongOnOneRank(), weights=mode)
    except UserError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(("name", "mode"), [("ddp", "auto"), ("fsdp", "stream"), ("zero3", "gather")])
def test_log_probs_that_are_wrong_on_one_rank_stop_all_before_the_first_rollout(pair, tmp_path, name, mode):
    for message in pair.run(wrong, tmp_path, name, mode):
        assert "log-probs of WrongOnOneRank and of the trainer differ by up to 0.1 nats" in message
    pair.stop()  # the strategy is in an undefined state


def failing(run: Path, name: str, mode: str) -> dict[str, Any]:
    return train(run, name, environment=Raises, weights=mode)


@pytest.mark.parametrize(
    ("name", "mode"), [("ddp", "auto"), ("fsdp", "stream"), ("zero3", "stream"), ("zero3", "gather")]
)
def test_all_environments_of_one_rank_fail(pair, tmp_path, name, mode):
    none, some = pair.run(failing, tmp_path, name, mode)
    assert none["tokens"] == 0 < some["tokens"]


def chunked(run: Path, name: str, logits: int | None) -> dict[str, Any]:
    return train(run, name, engine=Uneven(), logits=logits)


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_ranks_with_different_numbers_of_logits_chunks(pair, tmp_path, name):
    whole, _ = pair.run(chunked, tmp_path, name, None)
    pieces, _ = pair.run(chunked, tmp_path, name, 1000)  # few tokens per chunk: rank 1 has many chunks, rank 0 one
    assert pieces["metrics"] == pytest.approx(whole["metrics"], rel=1e-4, abs=1e-6)


def nothing(run: Path, name: str) -> dict[str, Any]:
    return train(run, name, environment=OneRankLearns, zero_spread="drop")


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_rank_has_nothing_to_learn_from(pair, tmp_path, name):
    idle, busy = pair.run(nothing, tmp_path, name)
    assert idle["spread"] == 0 < busy["spread"]
    assert idle["metrics"]["train/grad_norm"] == busy["metrics"]["train/grad_norm"] > 0
