"""Chunked statistics equal unchunked ones, values and gradients, and never hold all logits."""

import copy

import pytest
import torch
from model_families import LLAMA, Family
from tiny_runs import source

from gear_lightning.errors import UserError
from gear_lightning.generation.engine import next_logits
from gear_lightning.learning import token_stats as room
from gear_lightning.logits import logit_transform


def setup():
    torch.manual_seed(0)
    model = source().model()
    tokens = torch.randint(6, 100, (3, 11))
    valid = torch.arange(11) < torch.tensor([11, 7, 4])[:, None]
    wanted = valid & (torch.rand(3, 11) < 0.6)
    wanted[:, 0] = False
    return model, tokens, valid, wanted


def plain(model, tokens, wanted, temperature=1.0):
    logprobs = (model(input_ids=tokens).logits.float() / temperature).log_softmax(-1)
    picked = torch.zeros(tokens.shape)
    entropy = torch.zeros(tokens.shape)
    for b, t in wanted.nonzero().tolist():  # the distribution of token t is at position t - 1
        picked[b, t] = logprobs[b, t - 1, tokens[b, t]]
        entropy[b, t] = torch.distributions.Categorical(logits=logprobs[b, t - 1]).entropy()
    return picked, entropy, logprobs


@pytest.mark.parametrize("logits", [100, 1 << 24])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_statistics_equal_those_of_full_logits(monkeypatch, logits, temperature):
    monkeypatch.setattr(room, "LOGITS", logits)
    model, tokens, valid, wanted = setup()
    stats = room.token_stats(model, tokens, valid, wanted, temperature=temperature, top_k=3)
    picked, entropy, logprobs = plain(model, tokens, wanted, temperature)
    torch.testing.assert_close(stats.logprobs, picked, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.entropy, entropy, atol=1e-5, rtol=1e-5)
    for b, t in wanted.nonzero().tolist():
        top = logprobs[b, t - 1].topk(3)
        assert stats.top_ids[b, t].tolist() == top.indices.tolist()
        torch.testing.assert_close(stats.top_logprobs[b, t], top.values, atol=1e-5, rtol=1e-5)
    grads = []
    for loss in (stats.logprobs.sum(), picked.sum()):
        model.zero_grad()
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-4)
    assert not stats.entropy.requires_grad


def test_padding_does_not_change_statistics():
    model, tokens, valid, wanted = setup()
    together = room.token_stats(model, tokens, valid, wanted).logprobs
    for row, length in enumerate((11, 7, 4)):
        cut = (slice(row, row + 1), slice(0, length))
        alone = room.token_stats(model, tokens[cut], valid[cut], wanted[cut]).logprobs
        torch.testing.assert_close(together[cut], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [20, 80])
def test_no_tensor_of_all_tokens_times_the_vocabulary_is_created(monkeypatch, length):
    """In forward and backward, tensors that grow with tokens x vocabulary are never larger than one chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor) and x.dim() and x.shape[-1] == vocabulary and x.shape[0] != 32:
                    self.numel = max(self.numel, x.numel())
            return out

    model = source().model()
    vocabulary = model.config.vocab_size
    monkeypatch.setattr(room, "LOGITS", 7 * vocabulary)
    tokens = torch.randint(0, vocabulary, (4, length))
    wanted = torch.ones_like(tokens, dtype=torch.bool)
    wanted[:, 0] = False
    with Largest() as seen:
        room.token_stats(model, tokens, torch.ones_like(wanted), wanted, top_k=3).logprobs.sum().backward()
    assert seen.numel == 7 * vocabulary


def test_log_probs_without_wanted_tokens_have_a_gradient():
    model, tokens, valid, _ = setup()
    stats = room.token_stats(model, tokens, valid, torch.zeros_like(valid))
    stats.logprobs.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_top_ids_select_the_tokens():
    model, tokens, valid, wanted = setup()
    first = room.token_stats(model, tokens, valid, wanted, top_k=4)
    again = room.token_stats(model, tokens, valid, wanted, top_ids=first.top_ids)
    torch.testing.assert_close(first.top_logprobs, again.top_logprobs)


def test_a_model_that_transforms_its_logits_is_rejected():
    model, *_ = setup()
    head = model.get_output_embeddings()

    class Capped(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = torch.tanh(out.logits) + 1
            return out

    model.__class__ = Capped
    with pytest.raises(UserError, match=r"transforms its logits in another way .*scale 1"):
        room.check_head(model)
    assert model.get_output_embeddings() is head


SCALED = [
    ("Gemma2", {"head_dim": 16, "final_logit_softcapping": 3.0}),
    ("Gemma2", {"head_dim": 16, "final_logit_softcapping": 1e3}),
    ("Gemma2", {"head_dim": 16, "final_logit_softcapping": None}),
    ("Granite", {"logits_scaling": 8.0}),
    ("HyperCLOVAX", {"logits_scaling": 8.0}),
    ("Cohere", {"logit_scale": 0.0625}),
    ("FalconH1", {"lm_head_multiplier": 0.5, "head_dim": 16, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16,
                  "mamba_d_state": 8, "mamba_n_groups": 1}),
    ("RecurrentGemma", {"head_dim": 16, "num_hidden_layers": 3, "logits_soft_cap": 3.0, "lru_width": 32}),
    ("NanoChat", {"final_logit_softcapping": 3.0}),
    ("Llama", {}),
]  # fmt: skip


def scaled(kind, options, scale):
    model = Family(kind=kind, options=tuple({**LLAMA, **options}.items())).model().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    return model


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
@pytest.mark.parametrize(("kind", "options"), SCALED)
def test_scales_and_soft_caps_are_those_of_the_model(kind, options, scale):
    model = scaled(kind, options, scale)
    states = {k: v.clone() for k, v in model.state_dict().items()}
    room.check_head(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in states.items())
    _, tokens, valid, wanted = setup()
    stats = room.token_stats(model, tokens, valid, wanted, temperature=0.7, top_k=3)
    picked, entropy, logprobs = plain(model, tokens, wanted, 0.7)
    torch.testing.assert_close(stats.logprobs, picked, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.entropy, entropy, atol=1e-5, rtol=1e-5)
    sampled = next_logits(model, torch.tensor([10, 6]), tokens[:2], use_cache=False)
    torch.testing.assert_close((sampled / 0.7).log_softmax(-1), logprobs[[0, 1], [10, 6]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
@pytest.mark.parametrize(
    ("kind", "options", "key", "value"),
    [
        ("Gemma2", {"head_dim": 16, "final_logit_softcapping": 30.0}, "final_logit_softcapping", None),
        ("Gemma2", {"head_dim": 16, "final_logit_softcapping": 30.0}, "final_logit_softcapping", 29.0),
        ("Granite", {"logits_scaling": 8.0}, "logits_scaling", 1.0),
        ("Llama", {}, "logit_scale", 0.99),
    ],
)
def test_a_configuration_that_names_another_transformation_is_rejected(kind, options, key, value, scale, monkeypatch):
    model = scaled(kind, options, scale)
    wrong = copy.deepcopy(model.config)
    setattr(wrong, key, value)
    monkeypatch.setattr(room, "logit_transform", lambda config: logit_transform(wrong))
    with pytest.raises(UserError, match=f"{kind}ForCausalLM transforms its logits in another way"):
        room.check_head(model)


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
@pytest.mark.parametrize(
    ("kind", "options", "refused"),
    [
        ("MiniCPM3", {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
                      "v_head_dim": 24, "dim_model_base": 16}, "does not apply its output head"),
        ("Rwkv", {"num_hidden_layers": 8, "rescale_every": 2, "attention_hidden_size": 32}, "changes its weights"),
    ],
)  # fmt: skip
def test_other_heads_are_rejected_at_any_size_of_the_logits(kind, options, refused, scale):
    model = scaled(kind, options, scale)
    states = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=f"{kind}ForCausalLM {refused}"):
        room.check_head(model)
    assert refused == "changes its weights" or all(torch.equal(v, model.state_dict()[k]) for k, v in states.items())


def test_dropout_is_switched_off_for_training():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from gear_lightning.models import without_dropout

    small = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    small.attention_dropout = 0.5
    for model in (GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)), LlamaForCausalLM(small)):
        ids = torch.arange(10)[None]
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits), "this test needs a model with dropout"
        without_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)
