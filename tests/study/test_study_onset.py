"""Detection of first wrong decisions: by hand, and from the records of a study's runs."""

import pytest
import torch

from gear_lightning.runs.records import Record
from gear_lightning.study.onset import onset_of, onset_scores


def record(divergence: list[list[float]], decisions: list[list[int]], anchor: list[list[int]]) -> Record:
    d = torch.tensor(divergence)
    tensors = {
        "tokens": torch.ones_like(d, dtype=torch.long),
        "teacher_logprobs": d - 1,
        "divergence": d,
        "decisions": torch.tensor(decisions),
        "anchor": torch.tensor(anchor),
    }
    return Record(0, 0, [], tensors)


def test_the_first_wrong_decision_is_compared_with_earlier_right_ones():
    one = record(
        [[0.1, 0.2, 3.0, 2.0, 9.0, 9.0], [0.5, 0.0, 0.0, 0.0, 0.0, 0.3]],
        [[1, 0, -1, -1, 1, -1], [1, 0, 0, 0, 0, 1]],  # a wrong decision of two tokens; a rollout without one
        [[-1, -1, 2, 2, 2, 5], [-1] * 6],
    )
    found = onset_scores(one)
    high, low = found["divergence"]
    assert high.tolist() == [3.0, 2.0]
    assert low.tolist() == pytest.approx([0.1, 0.5, 0.3])  # decisions after the wrong one are excluded
    high, low = found["segment"]
    assert (high.tolist(), low.tolist()) == ([1, 1], [0, 0, 0])


def test_there_are_no_scores_without_a_teacher():
    silent = record([[0.0, 0.0]], [[1, -1]], [[-1, -1]])
    silent.tensors["teacher_logprobs"] = torch.zeros(1, 2)
    assert onset_scores(silent) == {}
    assert onset_of([]) == {}
