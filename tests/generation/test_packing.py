"""Compares the split into micro-batches with all possible splits, and measures the padding on real lengths."""

import csv
import itertools
import re

import pytest
import torch
from checkout import ROOT
from every_rule import Sharp, Talk, TalkTasks
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_data import Finite, Told
from tiny_runs import data, generation, trainer

from gear_lightning.credit import GEAR, Uniform
from gear_lightning.data import RolloutDataModule
from gear_lightning.generation.packing import balanced_split
from gear_lightning.module import GearModule

VIEWS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=8)


def padded(rows: list[tuple[int, ...]]) -> int:
    return len(rows) * sum(max(column) for column in zip(*rows, strict=True)) if rows else 0


def worst_and_total(lengths, parts) -> tuple[int, int]:
    sizes = [padded([lengths[i] for i in part]) for part in parts]
    return max(sizes), sum(sizes)


def every_split(rows: int, parts: int):
    """Yield all ways to split a sequence into contiguous parts, including empty ones."""
    for cuts in itertools.combinations_with_replacement(range(rows + 1), parts - 1):
        bounds = (0, *cuts, rows)
        yield [range(a, b) for a, b in itertools.pairwise(bounds)]


def slices(rows: int, parts: int):
    """Split rows into parts of the same number of rows."""
    size = -(-rows // parts)
    return [range(min(i * size, rows), min((i + 1) * size, rows)) for i in range(parts)]


@given(VIEWS, st.integers(1, 5), st.booleans())
@settings(max_examples=300, deadline=None)
def test_no_other_split_has_a_smaller_maximum_or_less_padding_at_the_same_maximum(lengths, parts, ordered):
    lengths = sorted(lengths, key=sum) if ordered else lengths
    found = balanced_split(lengths, parts)
    assert len(found) == parts
    assert [i for part in found for i in part] == list(range(len(lengths))), "rows are missing, repeated or reordered"
    best = min(worst_and_total(lengths, split) for split in every_split(len(lengths), parts))
    assert worst_and_total(lengths, found) == best
    assert worst_and_total(lengths, found) <= worst_and_total(lengths, slices(len(lengths), parts))
    assert found == balanced_split(lengths, parts)


@given(st.integers(0, 8), st.integers(1, 8))
def test_no_part_is_empty_if_there_are_enough_rows(rows, parts):
    found = balanced_split([(3, 4)] * rows, parts)
    assert sum(1 for part in found if part) == min(rows, parts)
    assert all(not part for part in found[rows:]), "empty parts must come last"


def test_at_least_one_part_is_required():
    with pytest.raises(ValueError, match="parts=0"):
        balanced_split([(1, 1)], 0)


def test_splitting_many_rows_is_fast():
    generator = torch.Generator().manual_seed(0)
    lengths = sorted(torch.randint(50, 4000, (2048, 2), generator=generator).tolist(), key=sum)
    for parts in (1, 2, 64, 512, 2048):
        found = balanced_split(lengths, parts)
        assert [i for part in found for i in part] == list(range(2048))
        worst, plain = worst_and_total(lengths, found), worst_and_total(lengths, slices(2048, parts))
        assert worst[0] < plain[0] or parts in (1, 2048)


class Uneven(Told):
    """Generates rollouts whose sampled tokens and teacher prompts grow with their index in the group."""

    def generate(self, jobs, stage):
        rollouts = super().generate(jobs, stage)
        for (_, seed), rollout in zip(jobs, rollouts, strict=True):
            more = 5 * seed[-1] ** 2
            for name, value in {
                "tokens": 9, "action_mask": True, "turn_ids": 0, "stop_mask": False, "sampler_logprobs": -1.0,
            }.items():  # fmt: skip
                getattr(rollout, name).extend([value] * more)
        return rollouts

    def teacher_prompt(self, rollout, peer):
        return [5] * (4 + len(rollout.tokens) % 7), False


def uneven(tmp_path, outcome=lambda task, rollout: float(rollout == 0), **options):
    source = RolloutDataModule(Finite(64), tasks_per_iteration=2, group_size=4, **options)
    source.trainer, source.generator = trainer(tmp_path), Uneven(outcome)
    return list(source._iterate())


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 4, 8])
def test_the_number_of_micro_batches_is_fixed_and_the_largest_is_smaller_than_with_equal_row_counts(
    tmp_path, micro_batch_size
):
    batches = uneven(tmp_path, micro_batch_size=micro_batch_size)
    assert len(batches) == -(-8 // micro_batch_size)
    assert sorted(i for b in batches for i in b.index.tolist()) == list(range(8))
    lengths = sorted(
        ((int(v.sum()), int(t.sum())) for b in batches for v, t in zip(b.valid, b.teacher_valid, strict=True)), key=sum
    )
    largest = max(b.tokens.numel() + b.teacher_tokens.numel() for b in batches)
    plain = worst_and_total(lengths, slices(8, len(batches)))[0]
    assert largest <= plain
    if micro_batch_size in (2, 4):
        assert largest < plain
        assert max(b.size for b in batches) > micro_batch_size, "a micro-batch of short rollouts must have more rows"


def test_fewer_rollouts_than_micro_batches_give_blank_micro_batches(tmp_path):
    batches = uneven(
        tmp_path,
        lambda task, rollout: "environment_error" if rollout > 0 else 1.0,
        micro_batch_size=2,
    )
    assert [b.size for b in batches] == [1, 1, 1, 1]
    assert [bool(b.valid.any()) for b in batches] == [True, True, False, False]
    assert {int(b.step_rollouts) for b in batches} == {2}


@pytest.mark.parametrize("credit", [GEAR(), Uniform()], ids=["teacher", "no teacher"])
def test_the_logged_padding_equals_that_of_the_forward_passes(tmp_path, credit):
    import lightning as L

    class Count(L.Callback):
        places = filled = 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            first_epoch = batch_idx < 2  # two micro-batches; the teacher's scores are cached for the second inner epoch
            for x in [batch.valid, batch.teacher_valid] if credit.needs_teacher and first_epoch else [batch.valid]:
                self.places += x.numel()
                self.filled += sum(map(sum, x.tolist()))

    count = Count()
    fit = trainer(tmp_path, generation(environment=Talk), count, max_epochs=1)
    fit.fit(GearModule(Sharp(), credit), datamodule=data(train_tasks=TalkTasks(), inner_epochs=2))
    expected = 1 - count.filled / count.places
    assert 0 < expected < 1
    assert float(fit.callback_metrics["perf/padding_fraction"]) == pytest.approx(expected, abs=1e-6)


def gsm8k_lengths() -> list[list[tuple[int, int]]]:
    """Return (policy, teacher) lengths of the rollouts of each iteration, recorded by `benchmarks/padding.py`."""
    with (ROOT / "benchmarks" / "results" / "gsm8k_lengths.csv").open() as file:
        rows = list(csv.DictReader(file))
    by_iteration = itertools.groupby(rows, key=lambda row: row["iteration"])
    return [[(int(r["policy"]), int(r["teacher"])) for r in group] for _, group in by_iteration]


def test_padding_of_gsm8k_rollouts_is_below_a_tenth_with_the_configs_settings():
    recipe = (ROOT / "configs" / "smollm2_gsm8k.yaml").read_text()
    tasks, group, micro = (
        int(re.search(rf"{name}: (\d+)", recipe)[1])
        for name in ("tasks_per_iteration", "group_size", "micro_batch_size")
    )
    places = filled = 0
    for lengths in gsm8k_lengths():
        assert len(lengths) == tasks * group
        ordered = sorted(lengths, key=sum)
        places += worst_and_total(ordered, balanced_split(ordered, -(-len(lengths) // micro)))[1]
        filled += sum(map(sum, lengths))
    assert 1 - filled / places < 0.10
