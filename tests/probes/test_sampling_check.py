"""Sampling and training agree: no model is random in training, and a start-up check compares their log-probs."""

import copy
import csv
import json
from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import torch
from every_rule import Talk, TalkTasks, untrained
from model_families import FAMILIES, RANDOM, Family
from tiny_runs import data, generation, trainer

from gear_lightning.credit import Uniform
from gear_lightning.environments.lookup_chain import LookupChainDemonstrations
from gear_lightning.errors import UserError
from gear_lightning.generation.cached_engine import CachedEngine
from gear_lightning.generation.engine import Sampling
from gear_lightning.generation.generate_engine import GenerateEngine
from gear_lightning.learning.lora import LoRA
from gear_lightning.learning.token_stats import check_head, token_stats
from gear_lightning.learning.warm_start import WarmStart, run_warm_start
from gear_lightning.models import checkpoint_activations, without_dropout
from gear_lightning.module import GearModule
from gear_lightning.probes.sampling_check import compare, make_trial, sample, tried_length

TOKENS = torch.arange(6, 54).reshape(2, 24)
WANTED = torch.arange(24).expand(2, 24) > 0


def logprobs(model: Any) -> torch.Tensor:
    return token_stats(model, TOKENS, torch.ones_like(WANTED), WANTED).logprobs


# -- nothing is random in training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RANDOM)
def test_no_family_is_random_in_training(kind):
    """Covers dropout, layerdrop, jitter and sampling routers, under any name."""
    torch.manual_seed(0)
    model = Family(kind=kind).model().train()
    before = model.config.to_dict()
    with torch.no_grad():
        noise = max(float((logprobs(model) - logprobs(model)).abs().max()) for _ in range(5))
    assert noise > 1e-3, "this test needs a model that is random in training"
    model = without_dropout(model)
    for changed in (model, copy.deepcopy(model)):
        trained = logprobs(changed.train())
        assert torch.equal(trained, logprobs(changed))
        assert torch.equal(trained, logprobs(changed.eval()))
        assert torch.equal(trained, logprobs(changed.train(True)))
    trained.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in changed.parameters())
    assert model.config.to_dict() == before, "the rates of the published model must be kept"


def test_a_run_disables_dropout_and_exports_the_original_rates(tmp_path):
    rates = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    model = GearModule(Family(kind="gpt2"), Uniform(), optimizer=lambda p: torch.optim.SGD(p, lr=1e-2))
    fit = trainer(tmp_path, generation())
    fit.fit(model, datamodule=data())
    model.train()
    assert torch.equal(logprobs(model.policy), logprobs(model.policy))
    written = json.loads(model.policy_files()["config.json"].numpy().tobytes())
    assert {name: written[name] for name in rates} == rates
    with (tmp_path / "metrics.csv").open() as file:
        gaps = [float(row["train/sampler_gap_max"]) for row in csv.DictReader(file)]
    assert max(gaps) < 1e-5


def test_adapters_are_not_random_either(tmp_path):
    model = untrained(GearModule(Family(kind="llama"), lora=LoRA(rank=2, alpha=4)), tmp_path)
    model.train()
    assert torch.equal(logprobs(model.policy), logprobs(model.policy))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt layerdrop", "mixtral", "phimoe", "bloom"])
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    grads, kept = [], []
    for checkpointed in (False, True):
        model = without_dropout(Family(kind=kind).model()).train()
        if checkpointed:
            checkpoint_activations(model)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.numel()), x)[1], lambda x: x):
            loss = logprobs(model).sum()
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        kept.append(sum(sizes))
    assert kept[1] < 0.7 * kept[0]
    assert torch.equal(*grads)


# -- the check --------------------------------------------------------------------------------------------------------


def checked(model: Any, engine: Any = None, context: int = 96, teacher: int = 0, turns: int = 4, **options: Any) -> Any:
    """Return the result of the check, and the rows that it compared."""
    trial = make_trial(list(range(6, 100)), model.config, context, teacher, turns)
    rows = sample(engine or CachedEngine(), model, Sampling(**options), trial)
    return compare(model, model, rows, trial.filler, options.get("temperature", 1.0)), rows


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_model_family_passes(kind):
    model = without_dropout(Family(kind=kind).model()).train()
    check_head(model)
    try:
        engine = CachedEngine()
        engine.begin(model.eval(), Sampling(), set())
    except UserError:
        engine = GenerateEngine()
    states, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.train()
    assert checked(model, engine)[0] is None
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in states.items())


@pytest.mark.parametrize("options", [{"temperature": 0.7, "top_p": 0.8}, {"temperature": 1.5, "top_k": 5}])
def test_other_sampling_options_pass(options):
    assert checked(without_dropout(Family(kind="llama").model()), **options)[0] is None


@pytest.mark.parametrize("precision", ["mixed", "true"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe", "phimoe", "deepseek_v3", "smollm3"])
def test_rounding_in_bfloat16_is_not_reported(kind, precision):
    model = without_dropout(Family(kind=kind).model())
    model = model.to(torch.bfloat16) if precision == "true" else model
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "mixed"):
        assert checked(model)[0] is None


class Off(CachedEngine):
    """Reports log-probs that are off by ``nats`` if the context is longer than ``beyond`` tokens."""

    nats, beyond, at_temperature = 0.01, 11, False

    def submit(self, request: Any) -> None:
        self.lengths = {**getattr(self, "lengths", {}), request.key: len(request.ids)}
        super().submit(request)

    def poll(self) -> Any:
        done = super().poll()
        for turn in done:
            if self.lengths[turn.key] > self.beyond:
                turn.logprobs = [x + self.nats for x in turn.logprobs]
        return done


def off(nats: float, beyond: int) -> CachedEngine:
    engine = Off()
    engine.nats, engine.beyond = nats, beyond
    return engine


@pytest.mark.parametrize("beyond", [11, 24, 80])
def test_an_engine_that_is_wrong_beyond_some_length_is_detected(beyond):
    model = without_dropout(Family(kind="llama").model())
    found, rows = checked(model, off(1e-3, beyond))
    assert found is not None
    assert found.what == "engine"
    assert found.nats == pytest.approx(1e-3, rel=0.1)
    assert max(len(row.ids) for row in rows) == 96
    assert checked(model, off(0.0, beyond))[0] is None


@pytest.mark.parametrize("precision", ["mixed", "true"])
def test_a_wrong_engine_is_detected_in_bfloat16(precision):
    model = without_dropout(Family(kind="llama").model())
    model = model.to(torch.bfloat16) if precision == "true" else model
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "mixed"):
        found, _ = checked(model, off(0.2, 11))
    assert found is not None
    assert found.what == "engine"


def test_a_cache_that_does_not_support_the_models_attention_is_detected():
    """Doge keeps the keys with the largest scores of a window; up to the window's length there is no difference."""
    for window, wrong in ((1000, False), (48, True)):
        model = without_dropout(Family(kind="doge", options=(("keep_window_size", window),)).model())
        found, _ = checked(model)
        assert (found is not None and found.what == "engine") == wrong


def rope(kind: str, original: int, positions: int = 256, **options: Any) -> tuple:
    factors = {"short_factor": [1.0] * 8, "long_factor": [8.0] * 8} if kind == "longrope" else {"factor": 4.0}
    options = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": original, **factors, **options}
    found = (("rope_parameters", options), ("max_position_embeddings", positions))
    return (*found, ("original_max_position_embeddings", original)) if kind == "longrope" else found


@pytest.mark.parametrize("engine", [CachedEngine, GenerateEngine])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("phi3", rope("longrope", 48)), ("llama", rope("longrope", 48)), ("llama", rope("dynamic", 48, 48))],
    ids=["phi3 longrope", "llama longrope", "dynamic"],
)
def test_rotary_frequencies_that_depend_on_the_longest_row_are_detected(kind, options, engine):
    model = without_dropout(Family(kind=kind, options=options).model())
    found, _ = checked(model, engine(), context=96)
    assert found is not None
    assert found.what == "alone"
    assert found.nats > 1e-3
    assert checked(model, engine(), context=48)[0] is None
    found, _ = checked(model, engine(), context=40, teacher=90)  # only the teacher's view is too long
    assert found is not None
    assert found.what == "alone"


@dataclass(frozen=True)
class Restless(Family):
    """A model whose last norm adds noise, only in training mode or always."""

    always: bool = False
    size: float = 0.1

    def model(self) -> Any:
        model = super().model()
        always, size = self.always, self.size

        def shake(root: Any, output: torch.Tensor) -> torch.Tensor:
            return output + size * torch.randn_like(output) if root.training or always else output

        model.model.norm.register_forward_hook(lambda part, args, output: shake(model, output))
        return model.eval()


@pytest.mark.parametrize("always", [False, True])
def test_a_random_model_is_detected(always):
    torch.manual_seed(0)
    found, _ = checked(without_dropout(Restless(kind="llama", always=always).model()), GenerateEngine())
    assert found is not None
    assert found.what == "mode"


def test_log_probs_that_are_not_finite_are_detected():
    model = without_dropout(Family(kind="llama").model())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.inf
    trial = make_trial(list(range(6, 100)), model.config, 96, 0, 2)
    rows = sample(CachedEngine(), Family(kind="llama").model(), Sampling(), trial)
    found = compare(model, model, rows, trial.filler, 1.0)
    assert found is not None
    assert found.what == "finite"


def test_the_tried_lengths_come_from_the_configuration_and_are_bounded():
    config = Family(kind="llama").config()
    assert tried_length(config, 100) == 100
    assert tried_length(config, 32768) == 256
    for name, length, tried in [("sliding_window", 1024, 1040), ("attention_chunk_size", 8192, 256)]:
        config = Family(kind="llama", options=((name, length),)).config()
        assert tried_length(config, 32768) == tried
        assert tried_length(config, 1000) == 256
    config = Family(kind="phi3", options=rope("longrope", 300, 32768)).config()
    assert tried_length(config, 32768) == 316


@pytest.mark.parametrize("context", [8, 16, 24, 40, 300])
@pytest.mark.parametrize("turns", [1, 4])
def test_rows_stay_within_the_context(context, turns):
    model = without_dropout(Family(kind="gpt2", options=(("n_positions", context),)).model())
    found, rows = checked(model, context=context, turns=turns)
    assert found is None
    longest = max(len(row.ids) for row in rows)
    assert longest == min(context, 256)
    assert all(any(t >= 0 for t in row.turns) for row in rows)


# -- in a run ---------------------------------------------------------------------------------------------------------


def fit(run: Any, policy: Any, generate: Any = None, precision: str = "32-true", **options: Any) -> GearModule:
    model = GearModule(policy, Uniform(), optimizer=lambda p: torch.optim.SGD(p, lr=1e-3), **options)
    generate = generate or generation(environment=Talk)
    tasks = data(train_tasks=TalkTasks(turns=2), val_tasks=None)
    trainer(run, generate, max_epochs=1, precision=precision).fit(model, datamodule=tasks)
    return model


def test_a_run_stops_before_its_first_rollout_with_the_difference_and_a_solution(tmp_path):
    class Never(Talk):
        def reset(self, task: Any, *, seed: int) -> Any:
            raise AssertionError("a rollout was made")

    with pytest.raises(UserError, match=r"LlamaForCausalLM.* sampling mode .*up to \d\.\d+ nats.*model\.policy"):
        fit(tmp_path, Restless(kind="llama"), generation(environment=Never))
    with pytest.raises(UserError, match=r"LlamaForCausalLM is random"):
        fit(tmp_path, Restless(kind="llama", always=True), generation(environment=Never))
    with pytest.raises(UserError, match=r"LlamaForCausalLM: log-probs of Off .*differ by up to 0\.2 nats.*softmax"):
        fit(tmp_path, Family(kind="llama"), generation(environment=Never, engine=off(0.2, 11)))


def test_a_difference_that_is_not_reproducible_is_ignored(tmp_path):
    class Once(Off):
        times = 0

        def poll(self) -> Any:
            self.nats = 0.1 if self.times < 3 else 0.0
            self.times += 1
            return super().poll()

    fit(tmp_path, Family(kind="llama"), generation(environment=Talk, engine=Once()))


def test_the_warm_start_is_checked_before_its_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv("GEAR_LIGHTNING_CACHE", str(tmp_path / "cache"))
    options = WarmStart(LookupChainDemonstrations(hops=2), steps=2, batch_size=2, max_length=10_000)

    def warm(policy: Any, check: Any = None) -> Any:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        stage = L.Trainer(accelerator="cpu", max_steps=2, enable_model_summary=False, **quiet)
        gear = GearModule(policy, Uniform())
        return run_warm_start(options, gear, stage, "32-true", lambda model: None, check)

    with pytest.raises(UserError, match="in training mode and in sampling mode"):
        warm(Restless(kind="llama"), generation().check_sampling)
    assert (warm(Family(kind="gpt2"), generation().check_sampling) / "model.safetensors").exists()
    with pytest.raises(UserError, match=r"the model scores rows of up to 8 tokens: 100 demonstrations"):
        warm(Family(kind="gpt2", options=(("n_positions", 8),)))
