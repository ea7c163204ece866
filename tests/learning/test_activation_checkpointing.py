"""Activation checkpointing: the same training in less memory."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from every_rule import untrained
from tiny_runs import WORDS, data, generation, module, source, trainer

from gear_lightning.errors import UserError
from gear_lightning.learning.token_stats import token_stats
from gear_lightning.learning.warm_start import WarmStart, WarmStartModule
from gear_lightning.models import FromScratch, checkpoint_activations
from gear_lightning.module import GearModule
from gear_lightning.teacher import TeacherOptions

ROWS, LENGTH, WIDTH = 4, 40, 32


def scored(model: Any) -> torch.Tensor:
    tokens = torch.randint(6, 100, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    wanted = torch.ones_like(tokens, dtype=torch.bool)
    wanted[:, 0] = False
    return token_stats(model.train(), tokens, torch.ones_like(wanted), wanted).logprobs.sum()


def saved_bytes(layers: int, checkpointed: bool) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, without parameters."""
    model = source(layers=layers).model()
    if checkpointed:
        checkpoint_activations(model)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, Any] = {}  # kept, so that no address is reused

    def keep(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = scored(model)
    found = sum(s.nbytes() for address, s in storages.items() if address not in parameters)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    return found


def test_a_layer_keeps_only_its_input():
    one_input = ROWS * LENGTH * WIDTH * 4
    assert (saved_bytes(8, True) - saved_bytes(4, True)) / 4 == one_input
    assert (saved_bytes(8, False) - saved_bytes(4, False)) / 4 > 10 * one_input


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_are_bitwise_equal(precision):
    grads = []
    for checkpointed in (False, True):
        model = source(layers=3).model()
        if checkpointed:
            checkpoint_activations(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = scored(model)
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert grads[0].abs().max() > 0.01
    assert torch.equal(*grads)


@pytest.mark.parametrize("weights", ["ema", "live"])
def test_a_run_gives_the_same_weights(tmp_path, weights):
    """The run has an evaluation in inference mode, then rollouts, teacher passes and updates."""

    def run(checkpointed: bool) -> GearModule:
        torch.manual_seed(0)
        teacher = TeacherOptions(weights, template=" <ref> {reference}")
        model = module(teacher=teacher, activation_checkpointing=checkpointed)
        fit, source = trainer(tmp_path / str(checkpointed), generation(), limit_val_batches=1), data()
        fit.validate(model, datamodule=source, verbose=False)
        fit.fit(model, datamodule=source)
        return model

    plain, checkpointed = run(False), run(True)
    assert checkpointed.policy.is_gradient_checkpointing
    assert not plain.policy.is_gradient_checkpointing
    for name, value in plain.state_dict().items():
        assert torch.equal(value, checkpointed.state_dict()[name]), name


def test_the_teachers_copy_does_not_checkpoint_activations(tmp_path):
    model = untrained(module(activation_checkpointing=True), tmp_path)
    assert model.policy.is_gradient_checkpointing
    assert not model.teacher.model.is_gradient_checkpointing


def test_the_warm_start_checkpoints_activations(tmp_path):
    gear = GearModule(source(), activation_checkpointing=True)
    module = WarmStartModule(gear, WarmStart.__new__(WarmStart), lambda policy: None)
    module.trainer = trainer(tmp_path)
    module.configure_model()
    assert module.policy.is_gradient_checkpointing


@dataclass(frozen=True)
class Unable(FromScratch):
    words: str = WORDS

    def model(self) -> Any:
        model = super().model()
        model.__class__ = type("OldModel", (type(model),), {"supports_gradient_checkpointing": False})
        return model


def test_a_model_without_support_is_rejected(tmp_path):
    model = GearModule(Unable(), activation_checkpointing=True)
    with pytest.raises(UserError, match=r"OldModel cannot checkpoint.*model\.activation_checkpointing"):
        trainer(tmp_path, generation()).fit(model, datamodule=data())
