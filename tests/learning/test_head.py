"""The output head in float32: its computation, when it is used, and its effect on rounding."""

import copy
import math

import pytest
import torch
from tiny_runs import data, generation, module, source, trainer
from torch import nn

from gear_lightning.errors import UserError
from gear_lightning.generation.engine import next_logits
from gear_lightning.learning.head import Float32Head, head_in_float32, use_float32_head
from gear_lightning.learning.token_stats import token_stats


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_computes_in_float32_under_autocast_and_with_low_precision_weights(dtype, bias):
    torch.manual_seed(0)
    head = nn.Linear(64, 300, bias=bias).to(dtype)
    hidden = torch.randn(7, 64, dtype=dtype, requires_grad=True)
    exact = hidden.double() @ head.weight.double().T + (head.bias.double() if bias else 0)
    head.__class__ = Float32Head
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = head(hidden)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=1e-5)
    got.sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    assert copy.deepcopy(head)(hidden).dtype == torch.float32


def test_the_float32_head_is_the_default_only_under_mixed_precision():
    trainers = ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"]
    assert [head_in_float32(None, t) for t in trainers] == [False, True, True, False, False]
    assert [head_in_float32("float32", t) for t in trainers] == [False, True, True, True, True]
    assert [head_in_float32("bfloat16", t) for t in ("bf16-mixed", "bf16-true")] == [False, False]
    for t in ("32-true", "16-mixed", "16-true"):
        with pytest.raises(UserError, match=rf"head_precision=bfloat16 cannot be combined with trainer.precision={t}"):
            head_in_float32("bfloat16", t)


def test_a_nonlinear_head_is_rejected():
    model = source().model()
    model.set_output_embeddings(nn.Sequential(model.get_output_embeddings()))
    with pytest.raises(UserError, match=r"output head of LlamaForCausalLM is a Sequential .*head_precision=bfloat"):
        use_float32_head(model)


def confident():
    """Return a small model whose logits are far from 0, as in a trained model."""
    model = source(hidden_size=64).model().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(60)
    return model


def errors(model, tokens) -> torch.Tensor:
    """Return the differences between the log-probs under autocast and those in float64, in nats."""
    everything = torch.ones_like(tokens, dtype=torch.bool)
    wanted = everything.clone()
    wanted[:, 0] = False
    with torch.no_grad():
        exact = token_stats(copy.deepcopy(model).double(), tokens, everything, wanted).logprobs
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = token_stats(model, tokens, everything, wanted).logprobs
    return (exact - low)[wanted].abs()


def test_the_float32_head_reduces_rounding_of_log_probs():
    """If logits are rounded to bfloat16, the head causes most of the error."""
    model = confident()
    tokens = torch.randint(6, model.config.vocab_size, (8, 60), generator=torch.Generator().manual_seed(0))
    before = errors(model, tokens)
    after = errors(use_float32_head(model), tokens)
    assert after.quantile(0.5) < 0.7 * before.quantile(0.5)
    assert after.quantile(0.99) < 0.8 * before.quantile(0.99)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("head", [None, "float32", "bfloat16"])
def test_policy_sampler_and_teacher_use_the_same_head(tmp_path, precision, head):
    wanted = head_in_float32(head, precision)
    seen = []

    class Watch(type(generation())):
        def check_engine(self, model):
            super().check_engine(model)
            ids = torch.tensor([[1, 2, 3]])
            seen.append(next_logits(model, torch.tensor([2]), ids, use_cache=False).dtype)

    model = module(head_precision=head)
    run = trainer(tmp_path, Watch(environment=generation().environment, budgets=generation().budgets), max_epochs=2,
                  precision=precision)  # fmt: skip
    run.fit(model, datamodule=data())
    kinds = {type(m.get_output_embeddings()) for m in (model.policy, model.teacher.model)}
    assert kinds == {Float32Head if wanted else nn.Linear}
    assert seen == [torch.float32 if wanted else torch.bfloat16]
    assert math.isfinite(float(run.callback_metrics["train/loss"]))
    assert float(run.callback_metrics["train/sampler_gap_max"]) < 0.1


def test_doctor_and_fit_reject_an_incompatible_head_precision(tmp_path):
    with pytest.raises(UserError, match="head_precision=bfloat16 cannot be combined with"):
        trainer(tmp_path, generation(), max_epochs=1).fit(module(head_precision="bfloat16"), datamodule=data())
