"""Parts of parameters and full tensors, the teacher's average on parts, and errors that all ranks raise."""

import copy
from typing import Any

import pytest
import torch
from rank_group import Group, connect
from torch.distributed.tensor import DTensor

from gear_lightning.distributed.collective import gather, gather_on_first, run_on_all_ranks
from gear_lightning.distributed.sharding import (
    fill,
    fingerprint,
    full,
    is_sharded,
    local,
    part_of,
    replace_parameters,
    shape,
    skeleton,
    state_bytes,
    whole_of,
)
from gear_lightning.errors import UserError
from gear_lightning.teacher import Teacher, TeacherOptions


@pytest.fixture(scope="module")
def four():
    group = Group(4)
    yield group
    group.stop()


def llama(tied: bool = True, seed: int = 0) -> Any:
    """Return a Llama whose sizes are not divisible by the number of processes: 37 words, width 6, one hidden unit."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=37,
        hidden_size=6,
        intermediate_size=1,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def sharded(kind: str, model: Any) -> Any:
    """Return the model sharded over the ranks, with rank 0's values; unchanged for ``whole``."""
    if kind == "whole":
        connect("ddp")
        return model
    options = {"replicas": 2} if kind == "hybrid" else {}
    return connect("fsdp" if kind == "hybrid" else kind, **options).shard(model)


def random_like(model: Any, seed: int) -> list[torch.Tensor]:
    """Return the same random tensors on every rank, one for each parameter."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape(p), generator=generator) for p in model.parameters()]


# -- parts and full tensors -------------------------------------------------------------------------------------------


@torch.no_grad()
def round_trip(kind: str, tied: bool) -> int:
    """Check all conversions between parts and full tensors. Return the bytes that this rank holds."""
    original = llama(tied)
    model = sharded(kind, copy.deepcopy(original))
    assert is_sharded(model) == (kind != "whole")
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in original.named_parameters()]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    wholes = random_like(original, seed=1)
    for mine, theirs, whole in zip(model.parameters(), original.parameters(), wholes, strict=True):
        assert shape(mine) == theirs.shape
        assert torch.equal(full(mine), theirs)
        part = part_of(mine, whole)
        assert part.shape == local(mine).shape
        assert torch.equal(whole_of(mine, part), whole)
        fill(mine, whole)
        assert torch.equal(full(mine), whole)
        assert torch.equal(local(mine), part)
        local(mine).mul_(2)  # the parameter's own memory
        assert torch.equal(full(mine), 2 * whole)
        assert torch.equal(whole_of(mine, local(mine).double()), 2 * whole.double())
    return state_bytes(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["whole", "fsdp", "zero3"])
def test_full_tensors_and_parts_convert_both_ways(pair, kind, tied):
    held = pair.run(round_trip, kind, tied)
    whole = state_bytes(llama(tied))
    if kind == "whole":
        assert held == [whole, whole]
    elif kind == "fsdp":
        assert sum(held) == whole, "nothing is held twice"
        assert max(held) < 0.6 * whole
    else:
        padding = 4 * len(list(llama(tied).parameters()))  # at most one float per parameter
        assert whole <= sum(held) <= whole + padding


def test_full_tensors_and_parts_convert_under_hybrid_sharding(four):
    held = four.run(round_trip, "hybrid", True)
    assert sum(held) == 2 * state_bytes(llama()), "each of the two replicas holds everything once"


@torch.no_grad()
def fingerprints(kind: str) -> dict[str, Any]:
    """Return fingerprints of a sharded model, of the same model unsharded, and after small changes."""
    original = llama()
    model = sharded(kind, copy.deepcopy(original))
    found = {"whole": fingerprint(original), "sharded": fingerprint(model)}
    found["rounded"] = fingerprint(model, torch.bfloat16), fingerprint(original.bfloat16(), torch.bfloat16)
    found["last"] = []
    for p in model.parameters():
        rank = int(torch.distributed.get_rank())
        values = local(p).flatten()
        before = values.clone()
        if rank == 0:  # the smallest change of one number, on one rank
            values[:1] = torch.nextafter(values[:1], torch.tensor(9.0))
        local(p).copy_(values.view(local(p).shape))
        found["last"].append(fingerprint(model))
        local(p).copy_(before.view(local(p).shape))
    found["again"] = fingerprint(model)
    return found


@pytest.mark.parametrize("kind", ["fsdp", "zero3"])
def test_a_fingerprint_does_not_depend_on_sharding_and_detects_one_changed_bit(pair, kind):
    one, other = pair.run(fingerprints, kind)
    assert one == other
    assert one["whole"] == one["sharded"] == one["again"]
    assert one["rounded"][0] == one["rounded"][1] != one["whole"]
    assert len({one["whole"], *one["last"]}) == 1 + len(one["last"]), "a change was not detected"


def test_a_fingerprint_does_not_depend_on_replicas(four):
    found = four.run(fingerprints, "hybrid")
    assert all(mine["whole"] == mine["sharded"] == found[0]["whole"] for mine in found)


def unsharded_fingerprint(seeds: list[int]) -> str:
    connect("ddp")
    return fingerprint(llama(seed=seeds[torch.distributed.get_rank()]))


def test_different_unsharded_models_have_different_fingerprints(pair):
    one, other = pair.run(unsharded_fingerprint, [0, 1])
    assert one != other


@torch.no_grad()
def check_skeleton(kind: str) -> None:
    """Check that a skeleton has the modules, ties, buffers and flags but no values, and that values can be set."""
    model = llama()
    model.model.layers[0].requires_grad_(False)
    model.register_buffer("seen", torch.arange(3))
    model = sharded(kind, model) if kind != "before" else model
    empty = skeleton(model)
    assert all(p.is_meta for p in empty.parameters())
    assert not is_sharded(empty) or kind == "fsdp"
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    assert [p.requires_grad for p in empty.parameters()] == [p.requires_grad for p in model.parameters()]
    assert torch.equal(empty.seen, model.seen)
    assert empty.seen.data_ptr() != model.seen.data_ptr()
    calls = []

    def make(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        calls.append(parameter)
        return torch.nn.Parameter(torch.zeros(shape(parameter)))

    replace_parameters(empty, make)
    assert len(calls) == len({id(c) for c in calls}) == len(list(model.parameters()))
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    assert not any(p.any() for p in empty.parameters())
    assert any(full(p).any() for p in model.parameters()), "the model itself was changed"


@pytest.mark.parametrize("kind", ["before", "whole", "zero3"])
def test_a_skeleton_is_the_model_without_its_values(pair, kind):
    pair.run(check_skeleton, kind)


# -- the teacher ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def teacher_frees_gathered_weights() -> bool:
    """Return whether a teacher holds only its own parts after a forward, although the policy keeps gathered weights."""
    strategy = connect("fsdp", reshard_after_forward=False)
    blank, policy = skeleton(llama()), strategy.shard(llama())
    teacher = strategy.shard(blank, like=policy)
    for model in (policy, teacher):
        model(input_ids=torch.zeros(1, 3, dtype=torch.long))
    assert not all(isinstance(p, DTensor) for p in policy.parameters())
    return all(isinstance(p, DTensor) for p in teacher.parameters())


def test_a_teacher_frees_its_gathered_weights_even_if_the_policy_keeps_them(pair):
    assert pair.run(teacher_frees_gathered_weights) == [True, True]


@torch.no_grad()
def averaged(kind: str, low: bool, park: bool) -> dict[str, Any]:
    """Take fifty small steps with a policy and its teacher, and compute the same with full tensors in float64."""
    rate, dtype = 0.05, torch.bfloat16 if low else torch.float32
    blank = skeleton(llama())
    strategy = connect("ddp" if kind == "whole" else kind, precision="bf16-true" if low else "32-true")
    whole = llama().to(dtype)

    def duplicate(policy: Any) -> Any:
        if kind == "whole":
            return copy.deepcopy(policy)
        return strategy.shard(copy.deepcopy(blank).to(dtype), like=policy)

    policy = copy.deepcopy(whole) if kind == "whole" else strategy.shard(copy.deepcopy(whole))
    teacher = Teacher(policy, TeacherOptions(rate=rate), low_precision=low, duplicate=duplicate)
    newest = [p.detach().clone() for p in whole.parameters()]
    expected = [p.double() for p in newest]
    start = [e.clone() for e in expected]
    if park:
        teacher.park()
    for step in range(1, 51):
        for mine, value, direction in zip(
            policy.parameters(), newest, random_like(whole, seed=2 if not low else step), strict=True
        ):
            # float32: steps of 1e-6 in one direction, like Adam; bfloat16: steps large enough to survive rounding
            value.add_((1e-6 * direction.sign()) if not low else 0.01 * direction.to(dtype) * value)
            fill(mine, value)
        teacher.update(policy, step)
        expected = [(1 - rate) * e + rate * v.double() for e, v in zip(expected, newest, strict=True)]
    scoring = [full(p).clone() for p in teacher.model.parameters()]
    averages = teacher.shadow_state(policy) if low else scoring
    again = Teacher(policy, TeacherOptions(rate=rate), low_precision=low, duplicate=duplicate)
    again.load_shadow(policy, teacher.shadow_state(policy))
    return {
        "error": max(float((a.double() - e).abs().max()) for a, e in zip(averages, expected, strict=True)),
        "moved": min(float((e - s).abs().max()) for e, s in zip(expected, start, strict=True)),
        "rounded": all(torch.equal(a.to(dtype), s) for a, s in zip(averages, scoring, strict=True)),
        "dtype": scoring[0].dtype,
        "loaded": again.shadow is None
        or all(torch.equal(a, b) for a, b in zip(again.shadow, teacher.shadow, strict=True)),
    }


@pytest.mark.parametrize("park", [False, True])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("kind", ["whole", "fsdp", "zero3"])
def test_the_average_of_parts_equals_that_of_full_tensors(pair, kind, low, park):
    one, other = pair.run(averaged, kind, low, park)
    assert one == other
    assert one["error"] < (1e-6 if low else 1e-7)
    assert one["moved"] > 2e-5, "the average did not move"
    assert one["rounded"]
    assert one["dtype"] == (torch.bfloat16 if low else torch.float32)
    assert one["loaded"]


# -- errors -----------------------------------------------------------------------------------------------------------


class ReadOnFirst:
    """Can be unpickled only on rank 0."""

    def __init__(self, rank: int):
        self.rank = rank

    def __reduce__(self) -> Any:
        return _read_on_first, (self.rank,)


def _read_on_first(rank: int) -> ReadOnFirst:
    assert torch.distributed.get_rank() == 0, f"rank {torch.distributed.get_rank()} read what rank {rank} has"
    return ReadOnFirst(rank)


def gathered_on_first() -> Any:
    connect("ddp")
    rank = torch.distributed.get_rank()
    found = gather_on_first((ReadOnFirst(rank), torch.arange(rank + 1)))
    return found and [(read.rank, values.tolist(), str(values.device)) for read, values in found]


def test_gather_on_first_unpickles_only_on_rank_zero(four):
    expected = [(rank, list(range(rank + 1)), "cpu") for rank in range(4)]
    assert four.run(gathered_on_first) == [expected, None, None, None]


def all_or_none(failing: list[int], kind: str) -> str:
    connect("ddp")
    rank = torch.distributed.get_rank()

    def work() -> int:
        if rank in failing:
            raise UserError("bad path") if kind == "user" else KeyError("weight")
        return rank

    try:
        return f"done {run_on_all_ranks(work)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_an_error_on_one_rank_is_raised_on_all(pair):
    assert pair.run(all_or_none, [], "user") == ["done 0", "done 1"]
    assert pair.run(all_or_none, [1], "user") == ["UserError: bad path (rank 1)", "UserError: bad path"]
    assert pair.run(all_or_none, [0, 1], "user") == ["UserError: bad path", "UserError: bad path"]
    assert pair.run(all_or_none, [0], "other") == ["KeyError: 'weight'", "UserError: KeyError: 'weight' (rank 0)"]


def gathered() -> list:
    connect("ddp")
    rank = torch.distributed.get_rank()
    return gather({"rank": rank, "text": "x" * (rank * 1000)})


def test_gather_returns_the_states_of_all_ranks(pair):
    one, other = pair.run(gathered)
    assert one == other == [{"rank": 0, "text": ""}, {"rank": 1, "text": "x" * 1000}]


def test_one_process_needs_no_process_group():
    assert gather(3) == [3]
    assert run_on_all_ranks(lambda: 4) == 4
    with pytest.raises(UserError, match="bad"):
        run_on_all_ranks(lambda: (_ for _ in ()).throw(UserError("bad")))
