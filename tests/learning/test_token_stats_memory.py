"""Chunked scores: equal to those of full logits, and without a tensor of all tokens x vocabulary."""

import importlib.util

import pytest
import torch
from checkout import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from gear_lightning.batch import RolloutBatch, RolloutRow, collate
from gear_lightning.learning import token_stats as room
from gear_lightning.teacher import Teacher, TeacherOptions

VOCABULARY, WIDTH = 500, 16


def model(tied: bool = False, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    built = LlamaForCausalLM(config)
    assert (built.lm_head.weight is built.model.embed_tokens.weight) == tied
    with torch.no_grad():
        for p in built.parameters():
            p.mul_(8 if p.dim() == 2 else 1)  # far from uniform
    return built


def question():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (3, 21), generator=generator)
    valid = torch.arange(21) < torch.tensor([21, 17, 9])[:, None]
    wanted = valid & (torch.rand(tokens.shape, generator=generator) < 0.7)
    wanted[:, 0] = False
    return tokens, valid, wanted


def whole(policy, tokens, wanted, temperature, top_k):
    """Return log-probs, entropy and top-k from all logits at once."""
    logits = policy(input_ids=tokens).logits[:, :-1].float() / temperature
    distribution = torch.distributions.Categorical(logits=logits)
    keep = wanted[:, 1:]

    def shifted(x):
        x = torch.where(keep.reshape(*keep.shape, *[1] * (x.dim() - 2)), x, 0)
        return torch.cat([torch.zeros_like(x[:, :1]), x], 1)

    top = distribution.logits.topk(top_k)
    return (
        shifted(distribution.log_prob(tokens[:, 1:])),
        shifted(distribution.entropy()),
        shifted(top.values),
        shifted(top.indices),
    )


def gradients(policy, logprobs) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    weight = torch.linspace(-1, 1, logprobs.numel()).reshape(logprobs.shape)
    (logprobs * weight).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("pieces", [1, 2, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16"])
def test_scores_equal_those_of_full_logits(monkeypatch, tied, pieces, temperature, mixed):
    policy = model(tied)
    tokens, valid, wanted = question()
    monkeypatch.setattr(room, "LOGITS", -(-int(wanted.sum()) // pieces) * VOCABULARY)
    # without autocast's cache of casts, as in Lightning: the chunks of the head's gradient are added in float32
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed, cache_enabled=False):
        expected = whole(policy, tokens, wanted, temperature, top_k=4)
        there = gradients(policy, expected[0])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed, cache_enabled=False):
        found = room.token_stats(policy, tokens, valid, wanted, temperature=temperature, top_k=4)
        ours = found.logprobs, found.entropy, found.top_logprobs, found.top_ids
        here = gradients(policy, found.logprobs)
        with torch.no_grad():
            given = room.token_stats(policy, tokens, valid, wanted, temperature=temperature, top_ids=found.top_ids)
    assert there["lm_head.weight" if not tied else "model.embed_tokens.weight"].abs().max() > 0.1
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert torch.equal(given.top_logprobs, found.top_logprobs)
    assert torch.equal(given.logprobs, found.logprobs)
    for name, gradient in here.items():
        if not mixed:
            torch.testing.assert_close(gradient, there[name], atol=1e-5, rtol=1e-4)
        else:  # one rounding to bfloat16 (8 bits) on both sides, for any number of chunks
            assert (gradient - there[name]).norm() <= 2**-8 * there[name].norm(), name


class Sizes(TorchDispatchMode):
    """Records the number of elements of every tensor that an operator creates."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.shape = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.numel() > self.largest:
                self.largest, self.shape = x.numel(), tuple(x.shape)
        return out


def long_batch(rows: int = 6, length: int = 60, hint: int = 20) -> RolloutBatch:
    """Return rows of sampled tokens after a prompt of one token; the teacher sees ``hint`` more tokens."""
    made = [
        RolloutRow(
            tokens=[(7 * i + t) % VOCABULARY for t in range(length)],
            action_mask=[False] + [True] * (length - 1),
            turn_ids=[-1] + [0] * (length - 1),
            stop_mask=[False] * length,
            sampler_logprobs=[0.0] * length,
            prompt_length=1,
            teacher_prompt=list(range(hint + 1)),
            reward=0.0,
            success=False,
            advantage=1.0,
            group_id=0,
            policy_version=0,
            index=i,
        )
        for i in range(rows)
    ]
    return collate(made, step_tokens=1, step_rollouts=1, temperature=0.7)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("side", ["policy", "live policy scored as teacher", "teacher"])
def test_no_tensor_is_larger_than_one_chunk(monkeypatch, tied, side):
    """For any shape, in forward and backward; no tensor kept for the backward pass has a vocabulary dimension."""
    policy, batch = model(tied), long_batch()
    piece = 32 * VOCABULARY  # more than the weights and the activations of the body
    monkeypatch.setattr(room, "LOGITS", piece)
    options = TeacherOptions("live" if side.startswith("live") else "frozen")
    teacher = Teacher(policy, options)
    everything = int(batch.action_mask.sum()) * VOCABULARY
    assert everything > 10 * piece
    kept: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x

    with Sizes() as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        if side == "policy":
            room.token_stats(
                policy, batch.tokens, batch.valid, batch.action_mask, temperature=batch.temperature, top_k=5
            ).logprobs.sum().backward()
        else:
            top_ids = torch.zeros((*batch.tokens.shape, 5), dtype=torch.long)
            teacher.score(policy, batch, batch.action_mask, top_ids)
    assert seen.largest == piece, seen.shape
    if side == "policy":
        assert kept
        weights = {p.data_ptr() for p in policy.parameters()}
        assert not [x.shape for x in kept if VOCABULARY in x.shape and x.data_ptr() not in weights]
    else:
        assert not kept, "the teacher keeps nothing for a backward pass"


def test_the_measurement_detects_full_logits():
    policy, batch = model(), long_batch()
    with Sizes() as seen:
        whole(policy, batch.tokens, batch.action_mask, 1.0, 5)
    assert seen.largest >= int(batch.action_mask.sum()) * VOCABULARY


@pytest.fixture(scope="module")
def live_bytes():
    """Return the benchmark's counter of live bytes."""
    path = ROOT / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("benchmarks_memory", path)
    room = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)  # for modules shared by the benchmarks
        spec.loader.exec_module(room)
    return room.LiveBytes


def test_the_counter_counts_live_tensors(live_bytes):
    with live_bytes() as live:
        a = torch.zeros(1000)
        assert (live.now, live.peak) == (4000, 4000)
        b = a[:10]  # shares a's memory
        c = a + 1
        assert (live.now, live.peak) == (8000, 8000)
        del a, c
        assert (live.now, live.peak) == (4000, 8000)
        d = torch.zeros(10, dtype=torch.float64)
        assert (live.now, live.peak) == (4080, 8000)
        del b, d
    assert (live.now, live.peak) == (0, 8000)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("backward", [True, False], ids=["policy", "teacher"])
def test_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch, live_bytes, tied, backward):
    """More tokens only add the memory of the body, for any vocabulary: chunks and head gradients do not accumulate."""
    monkeypatch.setattr(room, "LOGITS", 1 << 16)

    def peak(vocabulary: int, length: int) -> int:
        policy = model(tied, vocabulary)
        tokens = torch.randint(0, vocabulary, (2, length))
        wanted = torch.ones_like(tokens, dtype=torch.bool)
        wanted[:, 0] = False
        with live_bytes() as live, torch.set_grad_enabled(backward):
            logprobs = room.token_stats(policy, tokens, torch.ones_like(wanted), wanted).logprobs
            if backward:
                logprobs.sum().backward()
        return live.peak

    for vocabulary in (1 << 12, 1 << 14):
        pieces = 2 * 512 * vocabulary // room.LOGITS
        assert pieces >= 64
        more = peak(vocabulary, 512) - peak(vocabulary, 256)
        logits, body = 2 * 256 * vocabulary * 4, 2 * 256 * 4 * 40 * WIDTH
        assert more < body < logits / 2
