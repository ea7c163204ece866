"""An engine's samples depend only on the request, and its log-probs are those of the model."""

import copy

import numpy as np
import pytest
import torch
from model_families import Family
from published_families import engine_gap
from tiny_runs import source

from gear_lightning.errors import UserError
from gear_lightning.generation.cached_engine import CachedEngine
from gear_lightning.generation.engine import Sampling, TurnRequest, draw
from gear_lightning.generation.generate_engine import GenerateEngine
from gear_lightning.generation.row_cache import RowCache
from gear_lightning.learning.token_stats import token_stats

STOP = {5}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = source().model().eval()
    with torch.no_grad():  # far from uniform, so that tokens differ and some rows stop early
        for p in model.parameters():
            p.mul_(3)
    return model


def play(engine, model, prompts, turns=3, sampling=Sampling(), per_turn=6):
    """Sample ``turns`` turns of each conversation, with observations of different lengths in between."""
    engine.begin(model, sampling, STOP)
    contexts = {key: list(prompt) for key, prompt in enumerate(prompts)}
    done = dict.fromkeys(contexts, 0)
    out = {key: [] for key in contexts}
    for key, context in contexts.items():
        engine.submit(TurnRequest(key, list(context), per_turn, (7, key, 0)))
    while finished := engine.poll():
        for turn in finished:
            key = turn.key
            out[key].append((tuple(turn.ids), tuple(turn.logprobs), turn.stopped))
            done[key] += 1
            contexts[key] += turn.ids + [10 + key % 7] * (1 + 2 * key % 5)
            if done[key] < turns - key % 2:
                engine.submit(TurnRequest(key, list(contexts[key]), per_turn, (7, key, done[key])))
            else:
                engine.release(key)
    engine.end()
    return out


PROMPTS = [
    [6, 7, 8, 9],
    [6, 7, 8, 9],
    [11, 12],
    [6, 7, 8, 9, 10, 11, 12, 13],
    [11, 12],
    *[[20 + i] * (i + 1) for i in range(8)],
]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_p=0.9), Sampling(top_k=5), Sampling(0)])
def test_caching_across_turns_equals_a_forward_of_the_whole_context(model, sampling):
    cached = play(CachedEngine(), model, PROMPTS, sampling=sampling)
    plain = play(GenerateEngine(), model, PROMPTS, sampling=sampling)
    for key in plain:
        assert [t[0] for t in cached[key]] == [t[0] for t in plain[key]]
        for a, b in zip(cached[key], plain[key], strict=True):
            np.testing.assert_allclose(a[1], b[1], atol=1e-4)
            assert a[2] == b[2]


def test_a_conversation_does_not_depend_on_the_batch(model):
    together = play(CachedEngine(), model, PROMPTS)
    small = play(CachedEngine(prefill_tokens=4), model, PROMPTS)
    assert {k: [t[0] for t in v] for k, v in together.items()} == {k: [t[0] for t in v] for k, v in small.items()}
    alone = play(CachedEngine(), model, PROMPTS[:1])
    assert [t[0] for t in alone[0]] == [t[0] for t in together[0]]


def test_turns_end_with_a_stop_token_or_at_max_tokens(model):
    turns = [t for conversation in play(CachedEngine(), model, PROMPTS).values() for t in conversation]
    assert any(stopped for *_, stopped in turns)
    for ids, logprobs, stopped in turns:
        assert len(ids) == len(logprobs) <= 6
        assert stopped == (ids[-1] in STOP)
        assert stopped or len(ids) == 6
        assert not any(i in STOP for i in ids[:-1])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_reported_logprobs_equal_those_of_the_trainer(model, temperature):
    (turn,) = play(CachedEngine(), model, [[6, 7, 8]], turns=1, sampling=Sampling(temperature, top_p=0.8))[0]
    tokens = torch.tensor([[6, 7, 8, *turn[0]]])
    wanted = torch.tensor([[False] * 3 + [True] * len(turn[0])])
    stats = token_stats(model, tokens, torch.ones_like(wanted), wanted, temperature=temperature)
    np.testing.assert_allclose(stats.logprobs[0, 3:].detach().numpy(), turn[1], atol=1e-5)


def test_draw_follows_the_distribution():
    logits = torch.tensor([0.5, 0.2, 0.3]).log().expand(20000, 3)
    ids, logprobs = draw(logits, torch.rand(20000, generator=torch.Generator().manual_seed(0)), Sampling())
    shares = torch.bincount(ids, minlength=3) / 20000
    assert torch.allclose(shares, torch.tensor([0.5, 0.2, 0.3]), atol=0.015)
    assert torch.allclose(logprobs.exp(), torch.tensor([0.5, 0.2, 0.3])[ids])
    # top-p 0.6 keeps tokens 0 and 2 (0.5 + 0.3), and so does top-k 2; greedy takes token 0
    for sampling in (Sampling(top_p=0.6), Sampling(top_k=2)):
        ids, _ = draw(logits, torch.rand(20000), sampling)
        assert set(ids.tolist()) == {0, 2}
    assert (draw(logits, torch.rand(20000), Sampling(0))[0] == 0).all()


def test_drawn_tokens_are_never_out_of_range():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    for u in (0.0, 0.5, 1 - 2**-53):
        token, logprob = draw(logits, torch.tensor([u], dtype=torch.float64), Sampling())
        assert token.item() in (0, 2)
        assert torch.isfinite(logprob)


def test_sampling_options_out_of_range_are_rejected():
    with pytest.raises(UserError, match="top_p"):
        Sampling(top_p=0)


WINDOWS = ["Mistral 7B v0.1", "Phi-3-mini", "Phi-4-mini", "Gemma 3", "Gemma 4", "GPT-OSS", "Ministral", "OLMo 3"]
STATES = ["Qwen3-Next", "Qwen3.5", "Mamba 2", "Nemotron-H", "Nemotron 3", "LFM2", "Jamba"]


@pytest.mark.parametrize("kind", [*WINDOWS, *STATES])
def test_windows_and_states_are_cached_exactly(kind):
    model = Family(kind=kind).model().eval()
    # rounding is larger in a state that is computed in chunks in one case and token by token in the other
    assert engine_gap(model, CachedEngine()) < (2e-5 if kind in STATES else 5e-6)


def test_that_test_needs_the_windows(monkeypatch):
    model = Family(kind="Gemma 3").model().eval()

    def wide(self, *args, masks=RowCache.masks):
        return {name: masks(self, *args)["full_attention"] for name in masks(self, *args)}

    monkeypatch.setattr(RowCache, "masks", wide)
    assert engine_gap(model, CachedEngine()) > 1e-3


@pytest.mark.parametrize("kind", ["Gemma 3", "Qwen3-Next", "Jamba"])
def test_windows_and_states_do_not_depend_on_the_batch(kind):
    model = Family(kind=kind).model().eval()
    together = play(CachedEngine(), model, PROMPTS)
    small = play(CachedEngine(prefill_tokens=4), model, PROMPTS)
    plain = play(GenerateEngine(), model, PROMPTS)
    for key in plain:
        assert [t[0] for t in together[key]] == [t[0] for t in small[key]] == [t[0] for t in plain[key]]


@pytest.mark.parametrize("kind", ["Bloom", "xLSTM", "MiniMax M1", "DeepSeek V3.2"])
def test_a_model_with_an_unsupported_cache_is_rejected(kind):
    model = Family(kind=kind).model().eval()
    with torch.no_grad():  # Bloom derives positions from the attention mask: with small weights it would not matter
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    with pytest.raises(UserError, match=r"CachedEngine .* set generation.engine to .*GenerateEngine"):
        CachedEngine().begin(model, Sampling(), STOP)


def test_an_attention_that_takes_no_mask_is_rejected(model):
    model = copy.deepcopy(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match=r"flash_attention_2 takes no mask: set model.policy.attn_implementation"):
        CachedEngine().check(model)
