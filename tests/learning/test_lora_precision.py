"""Adapters are float32 on a base of any precision, in training, in sampling and in the teacher."""

import copy

import lightning as L
import pytest
import torch
from every_rule import watched
from lora_runs import SMALL, TEMPLATE, adapted, flat, logits, split, stir
from tiny_runs import data, generation, module, trainer
from torch.nn import functional as F

from gear_lightning.distributed.sharding import fingerprint, whole_copy
from gear_lightning.learning.lora import LoRA, adapter_parameters, is_adapter
from gear_lightning.teacher import TeacherOptions


class Gradients(L.Callback):
    """Records the dtypes of the adapters' gradients."""

    def __init__(self) -> None:
        self.seen: set[torch.dtype] = set()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen |= {p.grad.dtype for p in adapter_parameters(pl_module.policy, "policy")}


def test_adapters_gradients_and_optimizer_are_float32_on_a_bfloat16_base(tmp_path):
    model, gradients = module(lora=SMALL), Gradients()
    trainer(tmp_path, generation(), gradients, max_epochs=2, precision="bf16-true").fit(model, datamodule=data())
    for name, p in model.policy.named_parameters():
        assert p.dtype == (torch.float32 if is_adapter(name) else torch.bfloat16), name
    assert gradients.seen == {torch.float32}
    (optimizer,) = model.trainer.optimizers
    assert {v.dtype for state in optimizer.state.values() for v in state.values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_small_learning_rate_changes_every_element(tmp_path, precision):
    """In bfloat16, a step of 1e-6 is lost for most elements of A."""
    model = module(lora=SMALL, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.0))
    path = split(watched(tmp_path, model, max_epochs=6, precision=precision).weights, model, "policy")
    start, end = path[1], path[-1]  # from the second step on A has gradients: B is no longer 0
    large = start.abs() > 1e-3  # elements of A
    assert (end != start)[large].float().mean() > 0.95
    assert (start.bfloat16() == (start + 1e-6).bfloat16())[large].float().mean() > 0.8, "the test proves nothing"


def test_the_teachers_average_is_its_float32_adapter(tmp_path):
    rate = 1e-3
    model = module(teacher=TeacherOptions("ema", rate, template=TEMPLATE), lora=SMALL)
    path = watched(tmp_path, model, max_epochs=4, precision="bf16-true").weights
    policy, teacher = split(path, model, "policy"), split(path, model, "teacher")
    expected = policy[0]
    for new in policy[1:]:
        expected = (1 - rate) * expected + rate * new
    assert model.teacher.shadow is None, "the average is stored twice"
    assert (teacher[-1] - expected).abs().max() < 1e-6
    assert (teacher[-1] != policy[0]).float().mean() > 0.5


def test_initial_adapters_are_equal_in_every_precision(tmp_path):
    starts = []
    for number, precision in enumerate(["32-true", "bf16-mixed", "bf16-true"]):
        model = module(lora=SMALL)
        path = watched(tmp_path / str(number), model, max_epochs=1, precision=precision).weights
        starts.append(split(path, model, "policy")[0])
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], starts[2])


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16),
        lambda m: copy.deepcopy(m).to("cpu", torch.bfloat16), lambda m: m.bfloat16().float(),
    ],
)  # fmt: skip
def test_a_cast_of_the_model_does_not_cast_adapters(cast):
    model = adapted()
    stir(model)
    before = flat(adapter_parameters(model, "policy"))
    after = adapter_parameters(cast(model), "policy")
    assert {p.dtype for p in after} == {torch.float32}
    assert torch.equal(flat(after), before)
    assert {p.device.type for p in adapter_parameters(model.to("meta"), "policy")} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_computes_in_the_precision_of_its_input(dtype):
    model = adapted(LoRA(rank=3, alpha=12, targets=["q_proj"])).to(dtype)
    stir(model)
    layer = model.model.layers[1].self_attn.q_proj
    a, b = (p.weight.to(dtype) for p in (layer.lora_A["policy"], layer.lora_B["policy"]))
    x = torch.randn(5, 32).to(dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = layer(x.requires_grad_())
    assert found.dtype == dtype
    assert torch.equal(found, F.linear(x, layer.base_layer.weight) + F.linear(F.linear(x, a), b) * 4.0)
    assert not any(t.shape == x.shape and t.dtype != dtype for t in kept), "a copy of the input in another precision"
    found.float().square().sum().backward()
    assert layer.lora_A["policy"].weight.grad.dtype == torch.float32


def test_a_bfloat16_copy_for_sampling_computes_the_same_as_a_bfloat16_policy():
    model = adapted().bfloat16()
    stir(model)
    copied = whole_copy(model, None, "cpu", torch.bfloat16)
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(copied), logits(model))
    assert fingerprint(copied, torch.bfloat16) == fingerprint(model, torch.bfloat16)
    exact = whole_copy(model, None, "cpu")
    assert torch.equal(logits(exact), logits(model))
    assert fingerprint(exact) == fingerprint(model) != fingerprint(copied)


def test_the_fingerprint_of_float32_adapters_detects_changes_below_bfloat16():
    model = adapted().bfloat16()
    before = fingerprint(model)
    with torch.no_grad():
        adapter_parameters(model, "policy")[0].mul_(1 + 1e-6)
    assert fingerprint(model) != before
