"""Collation of rollouts: a worked example, padding, the teacher's view, and blank rows."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gear_lightning.batch import RolloutBatch, RolloutRow, collate

# prompt 5 6, then action 7, observation 8, action 9 (a stop token); the teacher's prompt is 5 1 2 6
LONG = RolloutRow(
    tokens=[5, 6, 7, 8, 9],
    action_mask=[False, False, True, False, True],
    turn_ids=[-1, -1, 0, -1, 1],
    stop_mask=[False, False, False, False, True],
    sampler_logprobs=[0.0, 0.0, -0.5, 0.0, -0.25],
    prompt_length=2,
    teacher_prompt=[5, 1, 2, 6],
    reward=1.0,
    success=True,
    advantage=0.5,
    group_id=3,
    policy_version=7,
    index=11,
)
# prompt 4, action 3; a teacher prompt shorter than the policy's
SHORT = replace(
    LONG,
    tokens=[4, 4, 3],
    action_mask=[False, False, True],
    turn_ids=[-1, -1, 0],
    stop_mask=[False, False, False],
    sampler_logprobs=[0.0, 0.0, -1.0],
    teacher_prompt=[4],
    reward=0.0,
    success=False,
    advantage=-0.5,
    index=12,
)


def make(rows: list[RolloutRow], **options) -> RolloutBatch:
    return collate(rows, **{"step_tokens": 30, "step_rollouts": 4, "temperature": 0.5, **options})


def test_golden_collate():
    batch = make([LONG, SHORT], inner_epoch=2)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9], [4, 4, 3, 0, 0]]
    assert batch.valid.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert batch.action_mask.tolist() == [[False, False, True, False, True], [False, False, True, False, False]]
    assert batch.turn_ids.tolist() == [[-1, -1, 0, -1, 1], [-1, -1, 0, -1, -1]]
    assert batch.stop_mask.tolist() == [[False] * 4 + [True], [False] * 5]
    assert batch.sampler_logprobs.tolist() == [[0, 0, -0.5, 0, -0.25], [0, 0, -1, 0, 0]]
    assert batch.teacher_tokens.tolist() == [[5, 1, 2, 6, 7, 8, 9], [4, 3, 0, 0, 0, 0, 0]]
    assert batch.teacher_valid.tolist() == [[True] * 7, [True] * 2 + [False] * 5]
    assert batch.teacher_offset.tolist() == [2, -1]
    assert (batch.rewards.tolist(), batch.success.tolist()) == ([1, 0], [True, False])
    assert (batch.advantages.tolist(), batch.index.tolist()) == ([0.5, -0.5], [11, 12])
    assert (batch.group_ids.tolist(), batch.policy_version.tolist()) == ([3, 3], [7, 7])
    assert (batch.step_tokens.item(), batch.step_rollouts.item()) == (30, 4)
    assert (batch.temperature, batch.inner_epoch, batch.size) == (0.5, 2, 2)


def test_dtypes():
    batch = make([LONG, SHORT])
    kinds = {
        f.name: getattr(batch, f.name).dtype for f in fields(batch) if isinstance(getattr(batch, f.name), torch.Tensor)
    }
    booleans = {"privileged", "valid", "action_mask", "stop_mask", "success", "teacher_valid"}
    floats = {"sampler_logprobs", "rewards", "advantages", "base_advantages"}
    for name, dtype in kinds.items():
        expected = torch.bool if name in booleans else torch.float32 if name in floats else torch.int64
        assert dtype == expected, name


def test_turns_may_have_advantages_of_their_own():
    batch = make([replace(LONG, turn_advantages=[2.0, -1.0], decisions=[0, 0, 1, 0, -1], solved=3), SHORT])
    assert batch.base_advantages.tolist() == [[0, 0, 2, 0, -1], [0, 0, batch.advantages[1], 0, 0]]
    assert batch.decisions.tolist() == [[0, 0, 1, 0, -1], [0] * 5]
    assert batch.solved.tolist() == [3, 0]


def test_collating_no_rows_gives_one_blank_row():
    batch = make([], step_tokens=12)
    assert batch.size == 1
    for mask in (batch.valid, batch.action_mask, batch.stop_mask, batch.teacher_valid):
        assert not mask.any()
    assert (batch.turn_ids == -1).all()
    assert batch.index.tolist() == batch.group_ids.tolist() == [-1]
    assert batch.advantages.tolist() == batch.rewards.tolist() == [0]
    assert batch.tokens.shape[1] >= 2  # a model can process it
    assert batch.teacher_tokens.shape[1] >= 1
    assert batch.step_tokens.item() == 12


@st.composite
def random_row(draw) -> RolloutRow:
    prompt, teacher, response = (draw(st.integers(1, 6)) for _ in range(3))
    ids = draw(st.lists(st.integers(1, 99), min_size=prompt + response, max_size=prompt + response))
    mask = [False] * prompt + draw(st.lists(st.booleans(), min_size=response, max_size=response))
    return replace(
        LONG,
        tokens=ids,
        action_mask=mask,
        turn_ids=[0 if m else -1 for m in mask],
        stop_mask=[False] * len(ids),
        sampler_logprobs=[-0.5 * m for m in mask],
        prompt_length=prompt,
        teacher_prompt=draw(st.lists(st.integers(1, 99), min_size=teacher, max_size=teacher)),
        index=draw(st.integers(0, 99)),
    )


@settings(deadline=None)
@given(st.lists(random_row(), min_size=1, max_size=5))
def test_collation_keeps_rows_complete_and_the_teacher_sees_the_same_response(rows):
    batch = make(rows)
    for i, row in enumerate(rows):
        n, offset = len(row.tokens), int(batch.teacher_offset[i])
        assert batch.tokens[i][batch.valid[i]].tolist() == row.tokens
        assert batch.valid[i].tolist() == [True] * n + [False] * (batch.tokens.shape[1] - n)
        assert batch.action_mask[i, :n].tolist() == row.action_mask
        assert not batch.action_mask[i, n:].any()
        for t in range(row.prompt_length, n):  # token t of the policy is token t + offset of the teacher
            assert batch.teacher_tokens[i, t + offset] == batch.tokens[i, t]
        assert batch.teacher_valid[i].sum() == n + offset
        assert batch.teacher_tokens[i, : len(row.teacher_prompt)].tolist() == row.teacher_prompt
        alone = make([row])
        for name in ("tokens", "action_mask", "turn_ids", "stop_mask", "sampler_logprobs"):
            assert torch.equal(getattr(alone, name)[0], getattr(batch, name)[i, :n])
        assert alone.teacher_tokens[0].tolist() == batch.teacher_tokens[i][batch.teacher_valid[i]].tolist()


@settings(deadline=None)
@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=9), st.floats(-1e30, 1e30))
def test_numbers_are_rounded_as_in_torch(values, advantage):
    n = len(values)
    row = replace(
        LONG,
        tokens=[1] * n,
        action_mask=[True] * n,
        turn_ids=[0] * n,
        stop_mask=[False] * n,
        sampler_logprobs=values,
        prompt_length=0,
        advantage=advantage,
    )
    batch = make([row])
    assert torch.equal(batch.sampler_logprobs[0], torch.tensor(values, dtype=torch.float32))
    assert torch.equal(batch.base_advantages[0], torch.tensor([advantage] * n, dtype=torch.float32))


def test_the_lists_of_a_row_are_converted_only_once():
    """Every inner epoch collates the row again, while the device waits."""

    class Once(list):
        read = 0

        def __iter__(self):
            self.read += 1
            return super().__iter__()

    columns = {name: Once(getattr(LONG, name)) for name in ("tokens", "action_mask", "turn_ids", "sampler_logprobs")}
    row = replace(LONG, **columns)
    first, second = make([row, SHORT]), make([row, SHORT], inner_epoch=1)
    assert {name: values.read for name, values in columns.items()} == dict.fromkeys(columns, 1)
    for f in fields(first):
        if isinstance(getattr(first, f.name), torch.Tensor):
            assert torch.equal(getattr(first, f.name), getattr(second, f.name)), f.name
    first.tokens.zero_()  # a batch must not share memory with the row
    assert make([row]).tokens.tolist() == [LONG.tokens]


def test_collate_does_not_modify_its_rows():
    before = repr([LONG, SHORT])
    make([LONG, SHORT])
    assert repr([LONG, SHORT]) == before


def test_to_moves_every_tensor_and_keeps_the_rest():
    batch = make([LONG, SHORT], inner_epoch=1)
    moved = batch.to("meta")
    for f in fields(batch):
        old, new = getattr(batch, f.name), getattr(moved, f.name)
        if isinstance(old, torch.Tensor):
            assert (new.device.type, new.shape, new.dtype) == ("meta", old.shape, old.dtype)
        else:
            assert new == old
    assert batch.tokens.device.type == "cpu"


def test_batches_are_frozen():
    with pytest.raises(AttributeError):
        make([LONG]).tokens = torch.zeros(1, 1)  # type: ignore[misc]
