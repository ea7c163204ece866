"""Checkpoints of adapters: without the frozen weights if the base model can be loaded again."""

from pathlib import Path

import pytest
import torch
from lora_runs import SMALL, TEMPLATE, directory, fit, logits, with_peft
from tiny_runs import data, generation, source, trainer
from transformers import AutoConfig, AutoModelForCausalLM

from gear_lightning.commands.export import export_command
from gear_lightning.errors import UserError
from gear_lightning.export.directory import export_checkpoint
from gear_lightning.learning.lora import adapter_parameters, is_adapter
from gear_lightning.models import Pretrained
from gear_lightning.module import GearModule
from gear_lightning.teacher import TeacherOptions


def make(policy: Pretrained, lr: float = 1e-2, **options) -> GearModule:
    return GearModule(
        policy,
        teacher=TeacherOptions(template=TEMPLATE),
        optimizer=lambda p: torch.optim.AdamW(p, lr=lr),
        lora=SMALL,
        **options,
    )


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def held(path: Path) -> list[str]:
    """Return the keys of the frozen weights that a checkpoint holds."""
    return [key for key in load(path)["state_dict"] if key.startswith("policy.") and not is_adapter(key)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained module on a model directory, and its checkpoint."""
    folder = tmp_path_factory.mktemp("lora")
    model = fit(folder, make(directory(folder / "model")), saved=folder / "half.ckpt")
    return model, folder / "half.ckpt", folder


def test_a_checkpoint_holds_the_adapters_and_not_the_base(run):
    model, checkpoint, folder = run
    assert held(checkpoint) == []
    states = load(checkpoint)
    adapters = adapter_parameters(model.policy, "policy") + adapter_parameters(model.policy, "teacher")
    assert sum(v.numel() for v in states["state_dict"].values()) == sum(p.numel() for p in adapters)
    assert states["lora"]["base"] == str(folder / "model")
    base = (folder / "model" / "model.safetensors").stat().st_size
    assert checkpoint.stat().st_size < 4 * 4 * sum(p.numel() for p in adapters) + 60_000 + base / 10


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path, precision):
    policy = directory(tmp_path / "model")
    whole = fit(tmp_path / "whole", make(policy), max_epochs=4, precision=precision)
    half = tmp_path / "half.ckpt"
    fit(tmp_path / "parts", make(policy), saved=half, precision=precision)
    assert held(half) == []
    resumed = fit(tmp_path / "parts", make(policy), resume=half, max_epochs=4, precision=precision)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def other(folder: Path, seed: int, scale: float = 1.0) -> Pretrained:
    """Write a model directory with the same shapes and other weights, and return its `Pretrained`."""
    model = source(seed=seed).model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] *= scale
    model.save_pretrained(folder)
    source().tokenizer().save_pretrained(folder)
    return Pretrained(str(folder))


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize(("seed", "scale"), [(11, 1.0), (7, 1.001)])
def test_adapters_of_another_base_are_refused(run, tmp_path, stage, seed, scale):
    policy = other(tmp_path / "other", seed, scale)
    loop = trainer(tmp_path, generation(), limit_val_batches=1)
    message = rf"without their base weights, and those of {tmp_path}/other differ from the ones used .*{run[2]}/model"
    with pytest.raises(UserError, match=message):
        getattr(loop, stage)(make(policy), datamodule=data(), ckpt_path=run[1], weights_only=True)


def test_a_run_resumes_with_the_same_base_in_another_place(run, tmp_path):
    moved = other(tmp_path / "moved", seed=7)
    model = fit(tmp_path, make(moved), resume=run[1], saved=tmp_path / "c.ckpt", max_epochs=3)
    assert model.base == str(tmp_path / "moved")
    assert load(tmp_path / "c.ckpt")["lora"]["base"] == str(tmp_path / "moved")


@pytest.mark.parametrize(("trained", "evaluated"), [("bf16-true", "32-true"), ("32-true", "bf16-true")])
def test_an_evaluation_in_another_precision_uses_the_base_of_the_training(tmp_path, trained, evaluated):
    policy = directory(tmp_path / "model")
    model = fit(tmp_path, make(policy), saved=tmp_path / "a.ckpt", precision=trained)
    other = make(policy)
    loop = trainer(tmp_path, generation(), limit_val_batches=1, precision=evaluated)
    loop.validate(other, datamodule=data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    trained_on = dict(model.policy.named_parameters())
    for name, mine in other.policy.named_parameters():
        lower = mine.dtype == torch.bfloat16
        assert torch.equal(mine.float(), (trained_on[name].bfloat16() if lower else trained_on[name]).float()), name


# -- whole checkpoints -------------------------------------------------------------------------------------------------


def whole(model: GearModule, checkpoint: Path, path: Path, **changes) -> Path:
    """Write a checkpoint like an older version, with the frozen weights, and return its path."""
    states = load(checkpoint)
    frozen = {f"policy.{k}": v.detach().clone() for k, v in model.policy.state_dict().items() if not is_adapter(k)}
    states["state_dict"] |= frozen
    states["lora"] = {key: states["lora"][key] for key in ("options", "base")}
    torch.save({**states, **changes}, path)
    return path


def test_a_run_resumes_from_an_older_checkpoint_and_writes_small_ones(run, tmp_path):
    model, checkpoint, folder = run
    old = whole(model, checkpoint, tmp_path / "old.ckpt")
    ends = [
        fit(tmp_path / name, make(Pretrained(str(folder / "model"))), resume=path, saved=tmp_path / f"{name}.ckpt",
            max_epochs=4)
        for name, path in (("new", checkpoint), ("old", old))
    ]  # fmt: skip
    for name, value in ends[0].state_dict().items():
        assert torch.equal(ends[1].state_dict()[name], value), name
    assert held(tmp_path / "old" / ".." / "old.ckpt") == []


def test_frozen_weights_that_differ_from_the_base_are_saved(run, tmp_path):
    """The model's directory was overwritten after training."""
    model, checkpoint, _ = run
    old = whole(model, checkpoint, tmp_path / "old.ckpt")
    with pytest.warns(UserWarning, match="frozen weights are not those of .*other, and replace them"):
        resumed = fit(
            tmp_path, make(other(tmp_path / "other", 11)), resume=old, saved=tmp_path / "c.ckpt", max_epochs=3
        )
    assert len(held(tmp_path / "c.ckpt")) > 10
    base = dict(model.policy.named_parameters())
    for name, value in resumed.policy.named_parameters():
        assert is_adapter(name) or torch.equal(value, base[name]), name
    export_checkpoint(tmp_path / "c.ckpt", tmp_path / "out", adapter=True)
    assert torch.equal(logits(with_peft(tmp_path / "out" / "base", tmp_path / "out")), logits(resumed.policy))


def test_bfloat16_adapters_of_an_older_run_resume_in_float32(tmp_path):
    policy = directory(tmp_path / "model")
    model = fit(tmp_path, make(policy), saved=tmp_path / "a.ckpt", precision="bf16-true")
    states = load(tmp_path / "a.ckpt")
    shadow = [p.detach().clone() for p in adapter_parameters(model.policy, "teacher")]
    low = {key: value.bfloat16() for key, value in states["state_dict"].items()}
    for moments in states["optimizer_states"][0]["state"].values():
        moments.update({key: moments[key].bfloat16() for key in ("exp_avg", "exp_avg_sq")})
    changes = {"optimizer_states": states["optimizer_states"], "state_dict": low, "teacher_shadow": shadow}
    torch.save({**states, **changes}, tmp_path / "low.ckpt")
    old = whole(model, tmp_path / "low.ckpt", tmp_path / "old.ckpt")
    found: dict = {}

    class Look(GearModule):
        def on_train_start(self) -> None:
            super().on_train_start()
            found.update({name: p.detach().clone() for name, p in self.policy.named_parameters()})

    resumed = Look(policy, teacher=TeacherOptions(template=TEMPLATE), lora=SMALL)
    fit(tmp_path, resumed, resume=old, max_epochs=3, precision="bf16-true")
    for name, value in found.items():
        assert value.dtype == (torch.float32 if is_adapter(name) else torch.bfloat16)
        if ".policy." in name:
            assert torch.equal(value, low[f"policy.{name}"].float()), name
    for value, exact in zip([v for n, v in found.items() if ".teacher." in n], shadow, strict=True):
        assert torch.equal(value, exact), "the teacher's float32 average was lost"
    (optimizer,) = resumed.trainer.optimizers
    assert {v.dtype for state in optimizer.state.values() for v in state.values()} == {torch.float32}


# -- export ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_an_export_loads_the_base_model(tmp_path, precision):
    model = fit(tmp_path, make(directory(tmp_path / "model")), saved=tmp_path / "a.ckpt", precision=precision)
    assert export_command([str(tmp_path / "a.ckpt"), str(tmp_path / "merged")]) == 0
    assert export_command([str(tmp_path / "a.ckpt"), str(tmp_path / "adapter"), "--adapter"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    exact = model.policy.float()
    torch.testing.assert_close(logits(merged), logits(exact), atol=1e-5, rtol=1e-5)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    if precision == "32-true":
        assert torch.equal(logits(with_peft(tmp_path / "model", tmp_path / "adapter")), logits(model.policy))


@pytest.mark.parametrize("options", [[], ["--adapter"]])
def test_an_export_reports_a_missing_or_changed_base(tmp_path, options):
    policy, moved = directory(tmp_path / "model"), tmp_path / "moved"
    model = fit(tmp_path, make(policy), saved=tmp_path / "a.ckpt", max_epochs=1)
    (tmp_path / "model").rename(moved)
    args = [str(tmp_path / "a.ckpt"), str(tmp_path / "out"), *options]
    with pytest.raises(UserError, match=rf"a\.ckpt: the checkpoint holds adapters.*{tmp_path}/model.*--base"):
        export_command(args)
    other(tmp_path / "model", 11)
    with pytest.raises(UserError, match=rf"a\.ckpt: .*those of {tmp_path}/model differ from the ones used"):
        export_command(args)
    assert not (tmp_path / "out").exists()
    assert export_command([*args, "--base", str(moved)]) == 0
    if options:
        assert torch.equal(logits(with_peft(moved, tmp_path / "out")), logits(model.policy))
        from peft import PeftConfig

        assert PeftConfig.from_pretrained(str(tmp_path / "out")).base_model_name_or_path == str(moved)


def test_an_export_does_not_download_a_model_that_a_checkpoint_names(run, tmp_path, monkeypatch):
    states = load(run[1])
    states["lora"]["base"] = "someone/some-model"
    torch.save(states, tmp_path / "bad.ckpt")
    asked = []
    for kind in (AutoConfig, AutoModelForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", lambda *a, **k: asked.append(k) or 1 / 0)
    with pytest.raises(UserError, match=r"that model, someone/some-model, cannot be loaded"):
        export_checkpoint(tmp_path / "bad.ckpt", tmp_path / "out")
    assert [given["local_files_only"] for given in asked] == [True]


def test_base_is_refused_for_checkpoints_with_all_weights(run, tmp_path):
    old = whole(run[0], run[1], tmp_path / "old.ckpt")
    with pytest.raises(UserError, match=r"old\.ckpt: contains all weights of the model; export it without --base"):
        export_checkpoint(old, tmp_path / "out", base=str(run[2] / "model"))
    export_checkpoint(old, tmp_path / "out")
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) - logits(run[0].policy)).abs().max() < 1e-4
