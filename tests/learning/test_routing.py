"""The load of experts, and the loss that makes it even."""

import pytest
import torch
from model_families import Family
from published_families import PUBLISHED
from tiny_runs import data, generation, module, trainer

from gear_lightning.credit import Uniform
from gear_lightning.errors import UserError
from gear_lightning.learning.metrics import ExpertLoad
from gear_lightning.learning.routing import Routed, balance_loss, expert_counts, routers, watched
from gear_lightning.learning.token_stats import token_stats
from gear_lightning.models import checkpoint_activations, without_dropout
from gear_lightning.module import GearModule

MOE = ["Llama 4", "Qwen3-MoE", "Qwen3-Next", "Mixtral", "Phi-3.5-MoE", "GPT-OSS", "Granite 4 hybrid", "Jamba",
       "Nemotron 3", "LFM2-MoE", "DeepSeek V3", "GLM-4.5", "MiniMax M1", "MiniMax M2"]  # fmt: skip
TOKENS = torch.randint(6, 100, (3, 20), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([20, 13, 5])
VALID = torch.arange(20) < LENGTHS[:, None]


def routed(model, tokens=TOKENS, valid=VALID):
    wanted = valid.clone()
    wanted[:, 0] = False
    with watched(model, tokens.shape) as seen:
        stats = token_stats(model, tokens, valid, wanted)
    return seen, stats


@pytest.mark.parametrize("kind", MOE)
def test_the_routers_of_each_family_are_found(kind):
    model = Family(kind=kind).model().eval()
    seen, _ = routed(model)
    assert len(seen) == len(routers(model)) > 0
    counts, chosen = expert_counts(seen, VALID), seen[0].experts.shape[-1]
    text = model.config.get_text_config()
    assert chosen == text.num_experts_per_tok
    assert (counts.sum(-1) == LENGTHS.sum() * chosen).all(), "padding must not count"
    alone = sum(
        expert_counts(routed(model, TOKENS[i : i + 1, :n], VALID[i : i + 1, :n])[0], VALID[i : i + 1, :n])
        for i, n in enumerate(LENGTHS.tolist())
    )
    assert torch.equal(alone, counts)
    assert not any(part._forward_hooks for part, _ in routers(model))


def test_a_dense_model_has_none():
    assert not routers(Family(kind="Qwen3").model())
    assert {kind for kind in PUBLISHED if "MoE" in kind} <= {*MOE, "Qwen3.5-MoE"}


def slow(seen, valid):
    """The definition, with loops."""
    total = 0.0
    for layer in seen:
        for row, length in enumerate(valid.sum(1).tolist()):
            experts, k = layer.logits.shape[-1], layer.experts.shape[-1]
            for e in range(experts):
                sent = sum(e in layer.experts[row, t].tolist() for t in range(length))
                probability = sum(float(layer.logits[row, t].softmax(-1)[e]) for t in range(length)) / length
                total += experts * sent / (k * length) * probability
    return total / len(seen)


def test_the_loss_is_its_definition():
    seen, _ = routed(Family(kind="Qwen3-MoE").model().eval())
    assert float(balance_loss(seen, VALID)) == pytest.approx(slow(seen, VALID), rel=1e-5)


def test_an_even_use_has_loss_and_load_1_and_a_single_expert_has_the_largest():
    even = Routed(torch.zeros(1, 4, 4), torch.arange(4).reshape(1, 4, 1))
    single = Routed(torch.tensor([[[50.0, 0, 0, 0]] * 4]), torch.zeros(1, 4, 1, dtype=torch.long))
    everything = torch.ones(1, 4, dtype=torch.bool)
    for layer, expected in ((even, 1.0), (single, 4.0)):
        load = ExpertLoad()
        load.update(expert_counts([layer], everything))
        load.update(expert_counts([layer], everything))
        assert float(load.compute()) == pytest.approx(expected)
        assert float(balance_loss([layer], everything)) == pytest.approx(expected)
    assert float(ExpertLoad().compute()) == 1.0
    assert float(balance_loss([even], ~everything)) == 0.0


@pytest.mark.parametrize("checkpointed", [False, True])
def test_no_split_into_micro_batches_changes_the_gradient(checkpointed):
    model = without_dropout(Family(kind="Qwen3-MoE").model()).train()

    def gradient(parts):
        model.zero_grad()
        for part in parts:
            width = int(LENGTHS[part].max())
            seen, stats = routed(model, TOKENS[part, :width], VALID[part, :width])
            (balance_loss(seen, VALID[part, :width]) + 0 * stats.logprobs.sum()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole = gradient([[0, 1, 2]])
    if checkpointed:
        checkpoint_activations(model)
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(gradient([[0], [1], [2]]), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradient([[2, 0], [1]]), whole, atol=1e-5, rtol=1e-4)


def test_the_loss_makes_the_load_more_even(tmp_path):
    loads = []
    for coefficient in (0.0, 1.0):
        options = {"expert_balance": coefficient, "optimizer": module().optimizer}
        model = GearModule(Family(kind="Qwen3-MoE"), Uniform(), **options)
        run = trainer(tmp_path / str(coefficient), generation(), max_epochs=5)
        run.fit(model, datamodule=data())
        loads.append(float(run.callback_metrics["train/expert_load"]))
    assert 1 <= loads[1] < loads[0] - 0.1


def test_the_option_is_rejected_where_it_does_nothing(tmp_path):
    with pytest.raises(UserError, match="expert_balance does nothing: LlamaForCausalLM has no experts"):
        trainer(tmp_path, generation(), max_epochs=1).fit(module(expert_balance=0.1), datamodule=data())
    with pytest.raises(UserError, match="expert_balance=-1"):
        module(expert_balance=-1.0)


def test_a_dense_model_logs_no_load(tmp_path):
    run = trainer(tmp_path, generation(), max_epochs=1)
    run.fit(module(), datamodule=data())
    assert "train/expert_load" not in run.callback_metrics
