"""Ids without a token are never sampled nor part of a log-prob, and a tokenizer larger than the model is rejected."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tiny_runs import data, generation, module, source, trainer
from tokenizers import AddedToken

from gear_lightning.environments.lookup_chain import LookupChainTasks
from gear_lightning.errors import UserError
from gear_lightning.generation.cached_engine import CachedEngine
from gear_lightning.generation.engine import Sampling, TurnRequest, next_logits
from gear_lightning.generation.generate_engine import GenerateEngine
from gear_lightning.learning.token_stats import check_head, token_stats
from gear_lightning.logits import keep_to_tokenizer, tokenizer_ids
from gear_lightning.models import FromScratch
from gear_lightning.module import GearModule

PADDED = 400  # ids that the model has and the tokenizer has not


@dataclass(frozen=True)
class Resized(FromScratch):
    """A policy whose vocabulary is larger or smaller than its tokenizer's by a number of ids."""

    by: int = PADDED
    added: tuple[Any, ...] = ()

    def tokenizer(self) -> Any:
        tokenizer = super().tokenizer()
        tokenizer.add_tokens(list(self.added))
        return tokenizer

    def config(self) -> Any:
        config = super().config()
        config.vocab_size += self.by
        return config


def policy(**options: Any) -> Resized:
    return Resized(**{**vars(source()), **options})


def padded() -> Any:
    model = policy().model().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model


@pytest.mark.parametrize("engine", [CachedEngine, GenerateEngine])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_p=0.9, top_k=20)])
def test_ids_beyond_the_tokenizer_are_in_no_distribution(engine, sampling):
    model, tokenizer = padded(), policy().tokenizer()
    size = tokenizer_ids(tokenizer)

    def sampled() -> tuple[list[int], list[float]]:
        made = engine()
        made.begin(model, sampling, set())
        for key in range(8):
            made.submit(TurnRequest(key, [6, 7, 8 + key], 8, (key,)))
        turns = []
        while done := made.poll():
            turns += done
            for turn in done:
                made.release(turn.key)
        turns.sort(key=lambda turn: turn.key)
        return [turn.ids for turn in turns], [turn.logprobs for turn in turns]

    assert max(max(ids) for ids in sampled()[0]) >= size, "this test needs a model that samples such ids"
    keep_to_tokenizer(model, tokenizer)
    check_head(model)
    ids, logprobs = sampled()
    assert max(max(turn) for turn in ids) < size
    for key, (turn, told) in enumerate(zip(ids, logprobs, strict=True)):
        tokens = torch.tensor([[6, 7, 8 + key, *turn]])
        wanted = torch.arange(tokens.shape[1])[None] >= 3
        stats = token_stats(
            model, tokens, torch.ones_like(wanted), wanted, temperature=sampling.temperature, top_k=size + PADDED
        )
        torch.testing.assert_close(stats.logprobs[0, 3:], torch.tensor(told), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(stats.top_logprobs.exp().sum(-1)[wanted], torch.ones(len(turn)))
        assert stats.top_ids.max() < size
        assert stats.entropy.isfinite().all()
        logits = model(input_ids=tokens).logits[..., :size] / sampling.temperature
        expected = logits.log_softmax(-1)[0, 2:-1].gather(-1, tokens[0, 3:, None])[:, 0]
        torch.testing.assert_close(stats.logprobs[0, 3:], expected, atol=1e-5, rtol=1e-5)


def test_their_rows_get_no_gradient():
    model = keep_to_tokenizer(padded(), policy().tokenizer())
    tokens = torch.tensor([[6, 7, 8, 9]])
    wanted = torch.arange(4)[None] > 0
    token_stats(model, tokens, torch.ones_like(wanted), wanted).logprobs.sum().backward()
    size = tokenizer_ids(policy().tokenizer())
    assert model.lm_head.weight.grad[:size].abs().min(1).values.gt(0).any()
    assert not model.lm_head.weight.grad[size:].any()


def test_a_run_with_a_padded_vocabulary(tmp_path):
    model = GearModule(policy(), module().credit, teacher=module().teacher_options)
    run = trainer(tmp_path, generation(), max_epochs=2)
    run.fit(model, datamodule=data())
    assert float(run.callback_metrics["train/sampler_gap_max"]) < 1e-5
    size = len(policy().tokenizer())
    assert model.teacher is not None
    for scorer in (model.policy, model.teacher.model):
        logits = next_logits(scorer, torch.tensor([2]), torch.tensor([[6, 7, 8]]), use_cache=False)
        assert logits.shape[-1] == size


def test_an_engine_that_samples_another_id_is_reported(tmp_path):
    class Own(CachedEngine):
        def poll(self):
            turns = super().poll()
            for turn in turns:
                turn.ids[0] = len(policy().tokenizer()) + 7
            return turns

        def fingerprint(self, dtype):
            return None

    callback = generation(engine=Own())
    callback.check_sampling = lambda *args: None
    with pytest.raises(UserError, match=r"task \S+: Own sampled id \d+, but the tokenizer has \d+ ids"):
        trainer(tmp_path, callback, max_epochs=1).fit(GearModule(policy(), module().credit), datamodule=data())


class Marked(LookupChainTasks):
    """Tasks of which the second has the word ``<extra>`` in its prompt."""

    def __getitem__(self, index: int) -> Any:
        task = super().__getitem__(index)
        if index != 1:
            return task
        last = task.messages[-1]
        return replace(task, messages=[*task.messages[:-1], {**last, "content": last["content"] + " <extra>"}])


def refusal(tmp_path: Any, tasks: Any, **options: Any) -> str:
    model = GearModule(policy(**options), module().credit)
    with pytest.raises(UserError, match="the tokenizer does not fit the model") as found:
        trainer(tmp_path, generation(), max_epochs=1).fit(model, datamodule=data(train_tasks=tasks))
    assert not list(tmp_path.rglob("*.jsonl*")), "no rollout must have been generated"
    return str(found.value)


def test_a_tokenizer_with_more_ids_than_the_model_is_rejected(tmp_path):
    extra = {"by": -1, "added": (AddedToken("<extra>", special=False),)}  # the configuration counts the added token
    assert "it has token '<extra>' (id" in refusal(tmp_path, LookupChainTasks(4), **extra)
    told = refusal(tmp_path, Marked(4), **extra)
    assert f"the prompt of task {Marked(4)[1].id} has token '<extra>'" in told
    assert "LlamaForCausalLM has" in told


def test_a_special_token_that_nothing_uses_needs_no_row(tmp_path):
    model = GearModule(policy(by=-1, added=(AddedToken("<image>", special=True),)), module().credit)
    run = trainer(tmp_path, generation(), max_epochs=1)
    run.fit(model, datamodule=data())
    assert float(run.callback_metrics["train/sampler_gap_max"]) < 1e-5
