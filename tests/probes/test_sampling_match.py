"""Sampler and trainer compute the same log-probs, and the sampler always has the newest weights."""

import csv
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from every_rule import Sharp, Talk, TalkTasks, Watch, watched
from talking_policies import policy, talking, tasks
from tiny_runs import trainer

from gear_lightning.callbacks.generation import GenerationCallback
from gear_lightning.credit import GEAR
from gear_lightning.errors import UserError
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.cached_engine import CachedEngine
from gear_lightning.generation.engine import Sampling
from gear_lightning.generation.generate_engine import GenerateEngine
from gear_lightning.learning.token_stats import token_stats
from gear_lightning.loss import ClippedSurrogate

SAMPLINGS = [
    Sampling(0.6),
    Sampling(1.4),
    Sampling(1.0, top_p=0.8),
    Sampling(1.0, top_k=5),
    Sampling(0.7, top_p=0.9, top_k=20),
]


def gaps(seen) -> torch.Tensor:
    """Return the policy's minus the sampler's log-prob of every sampled token, nats."""
    policy = seen.outputs["policy"].logprobs.detach()
    return (policy - seen.batch.sampler_logprobs)[seen.batch.action_mask]


def logprobs(model, weights, batch, temperature) -> torch.Tensor:
    """Return the log-probs of the sampled tokens with other weights."""
    named = dict(zip([n for n, _ in model.named_parameters()], weights, strict=True))
    again = Sharp().model()
    again.load_state_dict(named)
    stats = token_stats(again, batch.tokens, batch.valid, batch.action_mask, temperature=temperature)
    return stats.logprobs.detach()[batch.action_mask]


@pytest.mark.parametrize("engine", [CachedEngine, GenerateEngine])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_samplers_logprobs_equal_the_trainers_in_every_iteration(tmp_path, engine, sampling):
    model = policy()
    watch = watched(tmp_path, model, tasks(), talking(engine=engine(), sampling=sampling), max_epochs=3)
    assert {s.steps for s in watch.seen} == {0, 1, 2}
    assert max(int(s.batch.turn_ids.max()) for s in watch.seen) >= 2
    for seen in watch.seen:
        assert seen.batch.temperature == sampling.temperature
        ratio = gaps(seen).exp()
        assert ratio.numel() > 10
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-4, rtol=0)
        sampled = seen.batch.sampler_logprobs[seen.batch.action_mask]
        if sampling.temperature != 1:  # detects a temperature that is missing on one side
            cold = logprobs(model.policy, watch.weights[seen.steps], seen.batch, 1.0)
            assert (cold - sampled).abs().max() > 0.1
        if seen.steps:  # detects an engine that keeps its initial weights
            stale = logprobs(model.policy, watch.weights[0], seen.batch, sampling.temperature)
            assert (stale - sampled).abs().max() > 0.01


@pytest.mark.parametrize("engine", [CachedEngine, GenerateEngine])
def test_an_engine_uses_weights_that_change_between_phases(engine):
    from gear_lightning.generation.agent_loop import AgentLoop
    from gear_lightning.generation.chat import Chat

    model, other = Sharp().model(), Sharp(seed=1).model()
    loop = AgentLoop(Chat(Sharp().tokenizer()), engine(), Talk, Budgets(4, 80, 24, 250), Sampling(0.9))
    jobs = [(TalkTasks()[i], (0, i)) for i in range(4)]

    def play():
        rollouts, _ = loop.run(model, jobs, policy_version=0)
        return [r.tokens for r in rollouts], [r.sampler_logprobs for r in rollouts]

    before, again = play(), play()
    assert before == again
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(other.state_dict())  # in place, like an optimizer step
    after = play()
    assert after[0] != before[0]
    model.load_state_dict(kept)
    assert play() == before


class Ordered(GenerationCallback):
    """Also records when it generates, and with which weights."""

    def generate(self, jobs, stage):
        weights = [p.detach().clone() for p in self._module.policy.parameters()]
        self.watch.events.append(("generate", self._trainer.global_step, weights))
        return super().generate(jobs, stage)


class Steps(Watch):
    """Also records the optimizer steps."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step > self.before:
            self.events.append(("step", trainer.global_step, None))


@pytest.mark.parametrize(("micro_batch_size", "inner_epochs"), [(8, 1), (3, 1), (4, 3)])
def test_generation_and_optimizer_steps_alternate(tmp_path, micro_batch_size, inner_epochs):
    torch.manual_seed(0)
    generate, watch = talking(Ordered), Steps()
    generate.watch, watch.events = watch, []
    source = tasks(micro_batch_size=micro_batch_size, inner_epochs=inner_epochs)
    trainer(tmp_path, generate, watch, max_epochs=4).fit(policy(GEAR()), datamodule=source)
    steps = iter(range(1, 4 * inner_epochs + 1))
    expected = []
    for iteration in range(4):
        expected.append(("generate", iteration * inner_epochs))
        expected += [("step", next(steps)) for _ in range(inner_epochs)]
    assert [(name, count) for name, count, _ in watch.events] == expected
    for name, count, weights in watch.events:  # generation used the weights of the newest step
        if name == "generate":
            assert all(map(torch.equal, weights, watch.weights[count]))
    assert watch.seen
    for seen in watch.seen:
        real = seen.batch.index >= 0
        assert (seen.batch.policy_version[real] + seen.batch.inner_epoch == seen.steps).all()


class Loud(GenerationCallback):
    """Reports log-probs that differ from those of the trainer."""

    def generate(self, jobs, stage):
        rollouts = super().generate(jobs, stage)
        for rollout in rollouts:
            rollout.sampler_logprobs = [x - 0.25 * (i % 3) for i, x in enumerate(rollout.sampler_logprobs)]
        return rollouts


@dataclass(frozen=True)
class Noted(ClippedSurrogate):
    """Records its arguments."""

    calls: list = field(default_factory=list, compare=False)

    def __call__(self, logprobs, old_logprobs, advantages, mask, **options):
        terms = super().__call__(logprobs, old_logprobs, advantages, mask, **options)
        self.calls.append((old_logprobs[mask], options["sampler_logprobs"][mask], terms))
        return terms


def test_the_sampler_ratio_uses_the_frozen_old_logprobs_and_is_logged(tmp_path):
    """This also holds after the first inner epoch, when the policy has changed."""
    loss = Noted(sampler_cap=1.5)
    model = policy()
    model.objective = loss
    watch = watched(tmp_path, model, tasks(inner_epochs=2), talking(Loud), max_epochs=2)
    assert len(loss.calls) == len(watch.seen)
    assert {s.batch.inner_epoch for s in watch.seen} == {0, 1}
    first: dict[tuple[int, ...], torch.Tensor] = {}
    for seen, (old, sampler, terms) in zip(watch.seen, loss.calls, strict=True):
        batch, now = seen.batch, seen.outputs["policy"].logprobs.detach()[seen.batch.action_mask]
        assert torch.equal(sampler, batch.sampler_logprobs[batch.action_mask])
        key = (*batch.policy_version.tolist(), *batch.index.tolist())
        if not batch.inner_epoch:
            first[key] = now
        else:
            assert not torch.equal(old, now)
        assert torch.equal(old, first[key])
        expected = np.minimum(np.exp((first[key] - sampler).double().numpy()), 1.5)
        assert terms.sampler_ratio.item() == pytest.approx(expected.sum(), rel=1e-4)
        assert terms.sampler_truncated == (expected == 1.5).sum()
        assert 0 < terms.sampler_truncated < len(old), "a third of the ratios is exp(0.5), which is above the cap"
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row["train/sampler_ratio"]) == pytest.approx((1 + math.exp(0.25) + 1.5) / 3, rel=0.05)
        assert float(row["train/sampler_truncated_fraction"]) == pytest.approx(1 / 3, abs=0.05)


def test_without_a_cap_the_sampler_ratio_is_not_logged(tmp_path):
    watched(tmp_path, policy(), tasks(), talking(Loud), max_epochs=1)
    with (tmp_path / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert "train/sampler_ratio" not in row
    assert float(row["train/sampler_gap_max"]) == pytest.approx(0.5, abs=1e-4)


def test_stale_rollouts_are_rejected(tmp_path):
    class Late(GenerationCallback):
        """Returns each iteration's rollouts one iteration late, as a prefetching loop would."""

        kept = None

        def generate(self, jobs, stage):
            fresh = super().generate(jobs, stage)
            late, self.kept = self.kept or fresh, fresh
            return late

    with pytest.raises(UserError, match="policy"):
        watched(tmp_path, policy(), tasks(), talking(Late), max_epochs=2)
