"""Data of the first inner epoch for later ones: kept only if needed, small, on the CPU, and usable on any device."""

from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from every_rule import random_rows, watched
from tiny_runs import data, generation, module, trainer
from torch import Tensor

from gear_lightning.batch import Credit, TokenStats, collate
from gear_lightning.credit import GEAR, SCGRPO, CreditAssigner, Uniform
from gear_lightning.distillation import OPSD, SDAR, Distillation
from gear_lightning.errors import UserError
from gear_lightning.learning.frozen import keep, recall
from gear_lightning.loss import ClippedSurrogate
from gear_lightning.runs.checkpoints import read_checkpoint, write_checkpoint

TEMPLATE = " <ref> {reference}"
RULES: list[tuple[CreditAssigner, Distillation | None]] = [
    (GEAR(), None),
    (GEAR("jsd", sign_rule="symmetric", divergence_top_k=8), OPSD(top_k_tokens=3)),
    (SCGRPO(), None),
    (Uniform(), SDAR()),
]


def model(credit: CreditAssigner, distillation: Distillation | None) -> Any:
    return module(credit, distillation=distillation)


def size(kept: Any) -> int:
    """Return the size in bytes."""
    if isinstance(kept, Tensor):
        return kept.numel() * kept.element_size()
    return sum(map(size, kept.values())) if isinstance(kept, dict) else 0


@pytest.mark.parametrize(("credit", "distillation"), RULES)
def test_later_epochs_use_the_scoring_of_the_first_one(tmp_path, credit, distillation):
    watch = watched(tmp_path, model(credit, distillation), data(inner_epochs=2, micro_batch_size=3), max_epochs=1)
    first = {tuple(s.batch.index.tolist()): s.outputs for s in watch.seen if not s.batch.inner_epoch}
    later = [s for s in watch.seen if s.batch.inner_epoch]
    assert len(later) == len(first) > 1
    for s in later:
        then = first[tuple(s.batch.index.tolist())]
        for name, value in vars(then["credit"]).items():
            again = getattr(s.outputs["credit"], name)
            assert value is again is None or (torch.equal(value, again) and value.dtype == again.dtype), name
        if distillation is None:
            assert s.outputs["teacher"] is None, "no later epoch uses it"
            continue
        for name, value in vars(then["teacher"]).items():
            again = getattr(s.outputs["teacher"], name)
            if name.startswith("top_") and value is not None:
                value = value[..., : distillation.top_k] if distillation.top_k else None
            assert value is again is None or (torch.equal(value, again) and value.dtype == again.dtype), name


class Sizes(L.Callback):
    """Records the bytes of the kept data, and the number of its action tokens."""

    def __init__(self) -> None:
        self.kept: list[int] = []
        self.devices: set[str] = set()
        self.tokens = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.tokens += 0 if batch.inner_epoch else int(batch.action_mask.sum())
        self.kept.append(sum(map(size, pl_module._frozen.values())))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        assert not pl_module._frozen, "the data of the previous iteration was not deleted"


@pytest.mark.parametrize(
    ("credit", "distillation", "bytes_per_token"),
    [
        (GEAR(), None, 5 * 4 + 1),  # old log-prob, weight, advantage, divergence, anchor; clipped
        (SCGRPO(), None, 5 * 4 + 1),  # without its 100 most likely tokens
        (GEAR(), OPSD(top_k_tokens=5), 5 * 4 + 1 + 2 * 4 + 5 * 8),
    ],
)
def test_the_data_is_small_and_kept_only_for_later_epochs(tmp_path, credit, distillation, bytes_per_token):
    for inner_epochs in (1, 2):
        sizes, folder = Sizes(), tmp_path / str(inner_epochs)
        run = trainer(folder, generation(), sizes, max_epochs=2)
        run.fit(model(credit, distillation), datamodule=data(inner_epochs=inner_epochs, micro_batch_size=3))
        assert 0 < max(sizes.kept) <= sizes.tokens * bytes_per_token if inner_epochs > 1 else not any(sizes.kept)


class SaveAndStop(L.Callback):
    """Saves in the second inner epoch, after a step; also keeps the data in the format of an older version."""

    def __init__(self, path: Any, inner_epoch: int = 1):
        self.path, self.inner_epoch = path, inner_epoch
        self.old: list[dict[str, Any]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.old.clear()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not batch.inner_epoch:
            teacher = outputs["teacher"]
            self.old.append(
                {
                    "key": batch.index.tolist(),
                    "old_logprobs": outputs["policy"].logprobs.detach(),
                    "teacher": None if teacher is None else dict(vars(teacher)),
                    "credit": dict(vars(outputs["credit"])),
                }
            )
        if trainer.current_epoch == 1 and batch.inner_epoch == self.inner_epoch:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def stopped(folder: Any, rule: tuple[CreditAssigner, Distillation | None], **options: Any) -> SaveAndStop:
    stop = SaveAndStop(folder / "mid.ckpt")
    torch.manual_seed(0)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(folder, generation(), stop, max_epochs=2).fit(model(*rule), datamodule=data(**options))
    return stop


@pytest.mark.parametrize("rule", RULES[:2])
@pytest.mark.parametrize("old", [False, True])
def test_checkpoints_of_this_and_the_previous_version_resume(tmp_path, rule, old):
    options = {"inner_epochs": 3, "micro_batch_size": 3}
    stop = stopped(tmp_path, rule, **options)
    whole, resumed = model(*rule), model(*rule)
    torch.manual_seed(0)
    trainer(tmp_path / "whole", generation(), max_epochs=2).fit(whole, datamodule=data(**options))
    if old:
        checkpoint = read_checkpoint(stop.path)
        assert len(checkpoint["frozen"][0]) == len(stop.old)
        checkpoint["frozen"] = [stop.old]
        write_checkpoint(checkpoint, stop.path.with_name("old.ckpt"))
        stop.path = stop.path.with_name("old.ckpt")
    run = trainer(tmp_path, generation(), max_epochs=2)
    run.fit(resumed, datamodule=data(**options), ckpt_path=stop.path, weights_only=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


OTHERS = [("micro_batch_size", 4), ("inner_epochs", 3), ("inner_epochs", 1), ("group_size", 2), ("truncated", "mask")]


@pytest.mark.parametrize(("name", "value"), OTHERS)
def test_another_split_of_a_partly_trained_iteration_is_rejected(tmp_path, name, value):
    """The position is counted in micro-batches: some would be skipped or trained on twice."""
    options = {"inner_epochs": 2, "micro_batch_size": 3}
    stop = stopped(tmp_path, RULES[0], **options)
    run = trainer(tmp_path, generation(), max_epochs=2)
    message = rf"between two optimizer steps.*data.{name}=.*resume with that value.*data.{name}={value}"
    with pytest.raises(UserError, match=message):
        run.fit(model(*RULES[0]), datamodule=data(**{**options, name: value}), ckpt_path=stop.path, weights_only=True)


def test_only_a_checkpoint_within_an_iteration_contains_the_data(tmp_path):
    options = {"inner_epochs": 2, "micro_batch_size": 3}
    middle = stopped(tmp_path, RULES[0], **options).path
    run = trainer(tmp_path / "whole", generation(), max_epochs=1)
    run.fit(model(*RULES[0]), datamodule=data(**options))
    run.save_checkpoint(tmp_path / "end.ckpt")
    found = torch.load(middle, weights_only=True)["frozen"]  # without map_location: on the device of the save
    assert {tensor.device.type for item in found[0] for tensor in tensors(item)} == {"cpu"}
    assert not read_checkpoint(tmp_path / "end.ckpt").get("frozen")


def tensors(item: Any) -> list[Tensor]:
    if isinstance(item, Tensor):
        return [item]
    return [t for part in item.values() for t in tensors(part)] if isinstance(item, dict) else []


@pytest.mark.parametrize("old", [False, True])
def test_recall_returns_tensors_on_the_device_of_the_batch(tmp_path, old):
    """``meta`` replaces a GPU: combining it with CPU tensors raises the same error."""
    batch = collate(random_rows(0), step_tokens=9, step_rollouts=4, temperature=1.0)
    mask = batch.action_mask
    numbers = torch.where(mask, torch.rand(mask.shape), 0)
    ids = torch.where(mask[..., None], torch.randint(9, (*mask.shape, 2)), 0)
    credit = Credit(torch.where(mask, numbers, 1), numbers, numbers, torch.where(mask, 3, -1), mask)
    teacher = TokenStats(numbers, numbers, ids, -ids.float())
    kept = keep((numbers, teacher, credit), mask, 2)
    if old:
        kept = {"old_logprobs": numbers, "teacher": dict(vars(teacher)), "credit": dict(vars(credit))}
    write_checkpoint({"frozen": [[kept]]}, tmp_path / "mid.ckpt")
    read = torch.load(tmp_path / "mid.ckpt", map_location="cpu", weights_only=True)["frozen"][0][0]

    there = batch.to("meta")
    old_logprobs, stats, moved = recall(read, there.action_mask)
    for value in (old_logprobs, *vars(stats).values(), *vars(moved).values()):
        assert value.device.type == "meta"
    live = torch.zeros(mask.shape, device="meta", requires_grad=True)
    terms = ClippedSurrogate()(
        live,
        old_logprobs,
        moved.token_advantages,
        there.action_mask,
        sampler_logprobs=there.sampler_logprobs,
        step_tokens=there.step_tokens,
        step_rollouts=there.step_rollouts,
    )
    policy = replace(stats, logprobs=live, top_logprobs=stats.top_logprobs.clone().requires_grad_())
    distilled = OPSD(top_k_tokens=2)(
        policy,
        stats,
        old_logprobs,
        there.action_mask,
        privileged=there.privileged,
        advantages=there.base_advantages,
        step_tokens=there.step_tokens,
    )
    (terms.loss + distilled).backward()
    assert live.grad.device.type == "meta"

    here = recall(read, mask)
    assert torch.equal(here[0], numbers)
    for name, value in (vars(teacher) | vars(credit)).items():
        assert torch.equal(value, getattr(here[1], name, getattr(here[2], name, None))), name
