"""Low-rank adapters: only they are trained, the teacher shares the base weights, and a resume is exact."""

import csv

import lightning as L
import pytest
import torch
from every_rule import Sharp, random_rows, untrained, watched
from lora_runs import SMALL, TEMPLATE, adapted, fit, flat, logits, split, stir, tied
from tiny_runs import data, generation, module, source, trainer

from gear_lightning.batch import collate
from gear_lightning.errors import UserError
from gear_lightning.learning.lora import LoRA, active, adapter_parameters
from gear_lightning.learning.token_stats import token_stats
from gear_lightning.module import GearModule
from gear_lightning.recipes.cli import GearCLI
from gear_lightning.teacher import TeacherOptions


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained module, its checkpoint, and its folder."""
    folder = tmp_path_factory.mktemp("lora")
    return fit(folder, module(lora=SMALL), saved=folder / "last.ckpt", max_epochs=4), folder / "last.ckpt", folder


def batch_of(*hints: int):
    return collate(random_rows(1, hints=hints), step_tokens=1, step_rollouts=1, temperature=1.0)


def score(model: GearModule, batch):
    return model.teacher.score(model.policy, batch, batch.action_mask)


def stats(model, batch):
    return token_stats(model, batch.tokens, batch.valid, batch.action_mask)


# -- the adapters ------------------------------------------------------------------------------------------------------


def test_an_adapted_layer_computes_the_papers_formula():
    base, model = source().model(), adapted(LoRA(rank=3, alpha=12, targets=["q_proj"]))
    stir(model)
    plain, layer = base.model.layers[1].self_attn.q_proj, model.model.layers[1].self_attn.q_proj
    x = torch.randn(5, 32)
    a, b = layer.lora_A["policy"].weight, layer.lora_B["policy"].weight
    assert (a.shape, b.shape) == ((3, 32), (32, 3))
    torch.testing.assert_close(layer(x), x @ plain.weight.T + 12 / 3 * (x @ a.T @ b.T), atol=1e-5, rtol=1e-5)
    assert not hasattr(model.model.layers[1].self_attn.k_proj, "lora_A")


def test_adapters_start_without_effect_and_only_they_are_trained():
    base, model = source().model(), adapted()
    assert type(model) is type(base)
    assert torch.equal(logits(model), logits(base))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    linear = [name for name, part in base.named_modules() if isinstance(part, torch.nn.Linear) and name != "lm_head"]
    assert trained == {f"{name}.lora_{ab}.policy.weight" for name in linear for ab in "AB"}
    assert not any(isinstance(part, torch.nn.Dropout) for part in model.modules())


def test_initial_adapters_do_not_depend_on_or_change_the_random_state():
    torch.manual_seed(1)
    one = adapted()
    after = torch.rand(1)
    torch.manual_seed(1)
    source().model()
    assert torch.equal(torch.rand(1), after), "the run's random state has changed"
    torch.manual_seed(2)
    other = adapted()
    for a, b in zip(adapter_parameters(one, "policy"), adapter_parameters(other, "policy"), strict=True):
        assert torch.equal(a, b)
    assert (flat(p for n, p in one.named_parameters() if ".lora_A." in n) != 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["nothing"]}, r"nothing matches no linear layer of LlamaForCausalLM; it has .*down_proj.*q_proj"),
        ({"targets": ["q_proj", "qq", "norm"]}, r"lora\.targets: qq, norm matches no linear layer"),
        ({"targets": ["proj"]}, r"proj matches no linear layer"),  # a part of a name does not match
        ({"targets": ["lm_head"]}, r"output head of LlamaForCausalLM shares its weight"),
        ({"targets": []}, r"lora\.targets=\[\] must be all-linear, or a list"),
        ({"targets": "q_proj"}, r"lora\.targets='q_proj' must be all-linear, or a list"),
        ({"rank": 0}, r"lora\.rank=0 must be at least 1"),
        ({"alpha": 0}, r"lora\.alpha=0 must be above 0"),
    ],
)
def test_invalid_options_are_user_errors(options, message):
    with pytest.raises(UserError, match=message):
        LoRA(**options).adapt(tied())


def test_a_target_can_be_one_layer_of_one_block():
    model = adapted(LoRA(targets=["layers.1.mlp.up_proj", "lm_head"]))
    found = {name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert found == {"model.layers.1.mlp.up_proj", "lm_head"}


def test_the_missing_extra_peft_is_named(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    with pytest.raises(UserError, match=r"'peft' is not installed: pip install 'gear_lightning\[lora\]'"):
        module(lora=SMALL)
    module()


# -- the teacher -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["ema", "live", "frozen"])
def test_the_initial_teacher_equals_the_policy_bit_for_bit(tmp_path, weights):
    model = GearModule(Sharp(), teacher=TeacherOptions(weights, template=TEMPLATE), lora=SMALL)
    untrained(model, tmp_path)
    batch = batch_of(0, 0, 0)
    ours, theirs, base = stats(model.policy, batch), score(model, batch), stats(Sharp().model(), batch)
    for field in ("logprobs", "entropy"):
        assert torch.equal(getattr(ours, field), getattr(theirs, field))
        assert torch.equal(getattr(ours, field), getattr(base, field))
    hinted = batch_of(5, 5, 5)
    assert not torch.equal(stats(model.policy, hinted).logprobs, score(model, hinted).logprobs)


@pytest.mark.parametrize(("every", "lr"), [(1, 1e-6), (7, 1e-3)])
def test_the_average_matches_the_recurrence_over_fifty_steps(tmp_path, every, lr):
    rate = 0.05
    options = TeacherOptions("ema", rate, every, template=TEMPLATE)
    model = module(teacher=options, optimizer=lambda p: torch.optim.AdamW(p, lr=lr), lora=SMALL)
    path = watched(tmp_path, model, data(inner_epochs=10), max_epochs=5).weights
    policy, teacher = split(path, model, "policy"), split(path, model, "teacher")
    assert len(path) == 51
    expected = policy[0]
    for step, (new, average) in enumerate(zip(policy, teacher, strict=True)):
        if step and step % every == 0:
            expected = (1 - rate) * expected + rate * new
        assert (average - expected).abs().max() <= 1e-6, step
    assert (policy[0] - expected).abs().max() > 20 * (teacher[-1] - expected).abs().max()
    base = dict(source().model().named_parameters())
    for name, p in model.policy.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, base[name.replace(".base_layer", "")]), f"{name} changed"


def test_the_teacher_scores_with_its_own_adapters(tmp_path):
    """The reference is a model whose own weights are the teacher's."""
    for weights in ("ema", "frozen", "live"):
        model = GearModule(Sharp(), teacher=TeacherOptions(weights, template=TEMPLATE), lora=SMALL)
        untrained(model, tmp_path)
        stir(model.policy)
        reference = Sharp().model()
        SMALL.adapt(reference)
        if weights != "frozen":
            stir(reference)
        if weights == "ema":
            stir(model.policy, "teacher", 0.1)
            average = adapter_parameters(model.policy, "teacher")
            for own, theirs in zip(adapter_parameters(reference, "policy"), average, strict=True):
                own.data = theirs.data
        batch = batch_of(0, 0)
        assert torch.equal(score(model, batch).logprobs, stats(reference, batch).logprobs), weights
        assert not torch.equal(stats(model.policy, batch).logprobs, score(model, batch).logprobs) or weights == "live"


@pytest.mark.parametrize("weights", ["ema", "frozen"])
def test_the_teachers_pass_changes_no_gradient_of_the_policy(tmp_path, weights):
    def gradients(between: bool) -> list[torch.Tensor]:
        model = GearModule(Sharp(), teacher=TeacherOptions(weights, template=TEMPLATE), lora=SMALL)
        untrained(model, tmp_path)
        stir(model.policy)
        batch = batch_of(0, 3, 9)
        trained = [name for name, p in model.policy.named_parameters() if p.requires_grad]
        loss = stats(model.policy, batch).logprobs.square().sum()
        if between:
            score(model, batch)
        assert [name for name, p in model.policy.named_parameters() if p.requires_grad] == trained
        loss.backward()
        for name, p in model.policy.named_parameters():
            assert (p.grad is not None) == (".policy." in name), name
        return [p.grad for p in adapter_parameters(model.policy, "policy")]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(a, b)
        assert a.abs().max() > 0


def test_an_error_in_the_teachers_pass_restores_the_policys_adapters(tmp_path):
    model = untrained(module(lora=SMALL), tmp_path)
    stir(model.policy)
    before = logits(model.policy)
    with active(model.policy, "teacher"):
        assert not torch.equal(logits(model.policy), before)
    batch = batch_of(0, 0)
    batch.teacher_tokens[0, 0] = 10**6  # not in the vocabulary
    with pytest.raises(IndexError):
        score(model, batch)
    assert torch.equal(logits(model.policy), before)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_rollouts_are_sampled_with_the_policys_adapters(run):
    with (run[2] / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert all(float(row["train/sampler_gap_max"]) < 1e-5 for row in rows)
    assert float(rows[-1]["credit/divergence_p95"]) > float(rows[0]["credit/divergence_p95"]) > 0
    model = run[0]
    batch = batch_of(0, 0)
    gap = (stats(model.policy, batch).logprobs - stats(model.source.model(), batch).logprobs).abs().max()
    assert gap > 1e-3, "the adapters have no effect, so the test proves nothing"


def test_the_base_is_stored_once(run):
    model, checkpoint, _ = run
    base = sum(p.numel() for p in model.source.model().parameters())
    adapter = sum(p.numel() for p in adapter_parameters(model.policy, "policy"))
    assert 0 < adapter < base / 2
    assert sum(p.numel() for p in model.parameters()) == base + 2 * adapter
    state = torch.load(checkpoint, weights_only=True)
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in state["state_dict"].values()}
    floats = sum(v.numel() for k, v in state["state_dict"].items() if k.startswith(("policy.", "teacher.")))
    assert floats == base + 2 * adapter
    assert sum(storages.values()) < 4 * (base + 2 * adapter) + 1000
    (moments,) = state["optimizer_states"]
    assert sum(s["exp_avg"].numel() for s in moments["state"].values()) == adapter


@pytest.mark.parametrize(
    ("weights", "precision"), [("ema", "32-true"), ("ema", "bf16-true"), ("frozen", "32-true"), ("live", "32-true")]
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, weights, precision):
    def make() -> GearModule:
        return module(lora=SMALL, teacher=TeacherOptions(weights, template=TEMPLATE))

    whole = fit(tmp_path / "whole", make(), max_epochs=4, precision=precision)
    half = tmp_path / "half.ckpt"
    fit(tmp_path / "parts", make(), saved=half, precision=precision)
    resumed = fit(tmp_path / "parts", make(), resume=half, max_epochs=4, precision=precision)
    states = resumed.state_dict()
    assert states.keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(states[name], value), name
    assert any(".teacher." in name for name in states) == (weights == "ema")


def test_evaluation_loads_the_policys_adapters_from_the_checkpoint(run, tmp_path):
    model, checkpoint, _ = run
    other = module(lora=SMALL)
    loop = trainer(tmp_path, generation(), limit_val_batches=1)
    loop.validate(other, datamodule=data(), ckpt_path=checkpoint, weights_only=True, verbose=False)
    assert other.teacher is None
    assert torch.equal(logits(other.policy), logits(model.policy))


def test_training_after_an_evaluation_starts_from_the_same_weights(tmp_path):
    evaluated = module(lora=SMALL)
    loop = trainer(tmp_path / "a", generation(), limit_val_batches=1)
    torch.manual_seed(0)
    loop.validate(evaluated, datamodule=data(), verbose=False)
    fit(tmp_path / "b", evaluated)
    alone = fit(tmp_path / "c", module(lora=SMALL))
    for name, value in alone.policy.state_dict().items():
        assert torch.equal(evaluated.policy.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (LoRA(rank=8, alpha=8), "rank 8, alpha 8, targets all-linear"),
        (LoRA(rank=4, alpha=16), "rank 4, alpha 16, targets all-linear"),
        (LoRA(4, 8, targets=["q_proj"]), "rank 4, alpha 8, targets q_proj"),
        (None, "null"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_resuming_with_other_adapters_is_one_clear_error(run, tmp_path, lora, said, stage):
    message = rf"made with model\.lora=\(rank 4, alpha 8, targets all-linear\), and this run has \(?{said}"
    loop = trainer(tmp_path, generation(), limit_val_batches=1)
    with pytest.raises(UserError, match=message):
        getattr(loop, stage)(module(lora=lora), datamodule=data(), ckpt_path=run[1], weights_only=True)


def test_a_run_with_adapters_rejects_a_checkpoint_without_them(tmp_path):
    fit(tmp_path / "full", module(), saved=tmp_path / "full.ckpt", max_epochs=1)
    with pytest.raises(UserError, match=r"made with model\.lora=null, and this run has \(rank 4"):
        fit(tmp_path, module(lora=SMALL), resume=tmp_path / "full.ckpt")


def test_the_lora_config_changes_a_recipe_to_lora(tmp_path, repository):
    class Built(GearCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            """Skip the training."""

    files = [repository / "configs" / name for name in ("quickstart.yaml", "model/lora.yaml")]
    args = ["fit", *(part for file in files for part in ("--config", str(file)))]
    args.append(f"--trainer.default_root_dir={tmp_path}")
    assert Built(args).model.lora == LoRA(16, 32, "all-linear")
    assert Built([*args, "--model.lora.targets=[q_proj,v_proj]"]).model.lora == LoRA(16, 32, ["q_proj", "v_proj"])
    assert Built([*args, "--model.lora=null"]).model.lora is None


class Names(L.Callback):
    """Records the parameters of the optimizer."""

    def on_train_start(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        self.given = [id(p) for group in optimizer.param_groups for p in group["params"]]


def test_the_optimizer_gets_only_the_policys_adapters(tmp_path):
    names, model = Names(), module(lora=SMALL)
    trainer(tmp_path, generation(), names, max_epochs=1).fit(model, datamodule=data())
    assert names.given == [id(p) for p in adapter_parameters(model.policy, "policy")]
