"""Optimizer configs: a stacked config changes only the optimizer; fused and 8-bit AdamW train, save and resume."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from checkout import ROOT
from shipped_configs import CONFIGS, QUICKSTART, RECIPES, Built, arguments, printed
from tiny_runs import data, generation, source, trainer

from gear_lightning.errors import UserError
from gear_lightning.module import GearModule, adamw
from gear_lightning.optimizers import adamw_8bit
from gear_lightning.teacher import TeacherOptions

OPTIMIZERS = CONFIGS / "optimizer"
SCHEDULE = """
model:
  lr_scheduler:
    class_path: torch.optim.lr_scheduler.LinearLR
    init_args: {start_factor: 0.1, total_iters: 7}
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Write runs to a temporary folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
@pytest.mark.parametrize("piece", ["fused_adamw", "adamw_8bit"])
def test_a_stacked_optimizer_does_not_change_the_rest_of_the_recipe(recipe, piece):
    Path("schedule.yaml").write_text(SCHEDULE)
    files = recipe, Path("schedule.yaml")
    before = yaml.safe_load(printed(*arguments(*files)))
    after = yaml.safe_load(printed(*arguments(*files, OPTIMIZERS / f"{piece}.yaml")))
    old, new = before["model"].pop("optimizer"), after["model"].pop("optimizer")
    assert after == before
    assert after["model"]["lr_scheduler"]["init_args"]["total_iters"] == 7
    given = yaml.safe_load(recipe.read_text())["model"]["optimizer"]["init_args"]
    assert {"lr", "weight_decay"} <= set(given)
    for key, value in given.items():
        assert new["init_args"][key] == value == old["init_args"][key]
    expected = {"fused_adamw": "torch.optim.AdamW", "adamw_8bit": "gear_lightning.optimizers.adamw_8bit"}
    assert new["class_path"] == expected[piece]
    assert new["init_args"].get("fused") == (True if piece == "fused_adamw" else None)


@pytest.mark.parametrize("piece", ["fused_adamw", "adamw_8bit"])
def test_a_recipe_without_an_optimizer_keeps_the_default_rate(piece):
    bare = yaml.safe_load(QUICKSTART.read_text())
    del bare["model"]["optimizer"]
    Path("bare.yaml").write_text(yaml.safe_dump(bare))
    default = adamw([torch.nn.Parameter(torch.zeros(1))]).defaults
    for files in ((Path("bare.yaml"),), (Path("bare.yaml"), OPTIMIZERS / f"{piece}.yaml")):
        found = yaml.safe_load(printed(*arguments(*files)))["model"]["optimizer"]["init_args"]
        assert (found["lr"], found["weight_decay"]) == (default["lr"], default["weight_decay"])


def test_another_optimizer_gets_configured_options_and_not_the_previous_defaults():
    Path("first.yaml").write_text(
        "model: {optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.02, betas: [0.5, 0.6]}}}"
    )
    files = QUICKSTART, Path("first.yaml")

    def options(kind: str) -> dict:
        return yaml.safe_load(printed(*arguments(*files), f"--model.optimizer={kind}"))["model"]["optimizer"][
            "init_args"
        ]

    sgd, rmsprop, nadam = map(options, ("torch.optim.SGD", "torch.optim.RMSprop", "torch.optim.NAdam"))
    assert (sgd["lr"], sgd["momentum"], sgd["weight_decay"]) == (0.02, 0.0, 0.0)
    assert (rmsprop["lr"], rmsprop["alpha"]) == (0.02, 0.99)
    assert (nadam["lr"], nadam["betas"], nadam["momentum_decay"]) == (0.02, [0.5, 0.6], 0.004)


# -- training ----------------------------------------------------------------------------------------------------


def learner(optimizer) -> GearModule:
    """Return a module with tensors large enough for 8 bits, and a schedule."""
    return GearModule(
        source(hidden_size=64),
        teacher=TeacherOptions(template=" <ref> {reference}"),
        optimizer=optimizer,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.5, total_iters=4),
    )


def fit(run: Path, model: GearModule, epochs: int, checkpoint: Path | None = None, **options):
    torch.manual_seed(0)
    made = trainer(run, generation(), max_epochs=epochs, gradient_clip_val=1.0, **options)
    made.fit(model, datamodule=data(), ckpt_path=checkpoint, weights_only=True)
    return made


def weights(model: GearModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()])


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


@pytest.fixture
def eight_bit():
    pytest.importorskip("torchao")
    torch.compiler.set_stance("force_eager")  # its kernels take half a minute to compile
    yield adamw_8bit(lr=1e-2)
    torch.compiler.set_stance("default")


@pytest.fixture(params=["fused", "8-bit"])
def optimizer(request):
    return fused if request.param == "fused" else request.getfixturevalue("eight_bit")


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, optimizer):
    whole, model = learner(optimizer), learner(optimizer)
    rates = [fit(tmp_path / "whole", whole, 4).optimizers[0].param_groups[0]["lr"]]
    first = fit(tmp_path / "parts", learner(optimizer), 2)
    assert float(first.optimizers[0].param_groups[0]["lr"]) == pytest.approx(0.75e-2), "the schedule is at its midpoint"
    first.save_checkpoint(tmp_path / "half.ckpt")
    rates.append(fit(tmp_path / "parts", model, 4, tmp_path / "half.ckpt").optimizers[0].param_groups[0]["lr"])
    assert list(map(float, rates)) == pytest.approx([1e-2, 1e-2])
    assert torch.equal(weights(whole), weights(model))
    assert (weights(whole) - weights(learner_at_start(tmp_path, optimizer))).abs().max() > 1e-3


def learner_at_start(run: Path, optimizer) -> GearModule:
    model = learner(optimizer)
    model.trainer = trainer(run / "start")
    model.configure_model()
    return model


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_fused_optimizer_clips_and_steps_like_the_plain_one(tmp_path, precision):
    """Lightning alone refuses to clip for it under bf16-mixed."""
    plain, quick = learner(lambda p: torch.optim.AdamW(p, lr=1e-2, fused=False)), learner(fused)
    for name, model in (("plain", plain), ("fused", quick)):
        fit(tmp_path / name, model, 1, precision=precision)
    torch.testing.assert_close(weights(plain), weights(quick), atol=1e-6, rtol=1e-5)


def test_the_8_bit_optimizer_matches_the_plain_one_in_a_quarter_of_the_bytes(eight_bit):
    torch.manual_seed(0)
    start, data = torch.randn(64, 256), [torch.randn(64, 256) for _ in range(20)]
    ends, sizes = [], []
    for make in (lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0), eight_bit):
        weight = torch.nn.Parameter(start.clone())
        optimizer = make([weight])
        for x in data:
            weight.grad = 0.1 * weight.detach() + x
            optimizer.step()
        state = optimizer.state_dict()["state"][0]
        ends.append(weight.detach() - start)
        sizes.append(sum(map(stored_bytes, (state["exp_avg"], state["exp_avg_sq"]))))
    assert (ends[0] - ends[1]).norm() < 0.05 * ends[0].norm()
    assert sizes[0] == 8 * start.numel()
    assert sizes[1] < 2.3 * start.numel()


@pytest.mark.slow
def test_compiled_steps_equal_eager_steps(eight_bit):
    ends = []
    for stance in ("force_eager", "default"):
        torch.compiler.set_stance(stance)
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(64, 256))
        optimizer = eight_bit([weight])
        for _ in range(3):
            weight.grad = torch.randn_like(weight)
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, atol=1e-5, rtol=1e-5)


def stored_bytes(x: torch.Tensor) -> int:
    """Return the bytes of a tensor, or of the plain tensors inside a wrapper."""
    if not hasattr(x, "__tensor_flatten__"):
        return x.nbytes
    return sum(getattr(x, name).nbytes for name in x.__tensor_flatten__()[0])


def test_a_checkpoint_with_eight_bit_averages_is_plain_tensors(tmp_path, eight_bit):
    """The checkpoint can be exported and evaluated without torchao."""
    from torchao.optim.subclass_8bit import OptimState8bit

    made = fit(tmp_path / "run", learner(eight_bit), 1)
    made.save_checkpoint(tmp_path / "one.ckpt")
    states = made.optimizers[0].state_dict()["state"]
    assert any(isinstance(x, OptimState8bit) for state in states.values() for x in state.values())
    blocked = "import sys; sys.modules['torchao'] = None\n"
    code = f"{blocked}from gear_lightning.__main__ import main; main()"
    command = [sys.executable, "-c", code, "export", str(tmp_path / "one.ckpt"), str(tmp_path / "model")]
    root = ROOT
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "model.safetensors").exists()
    model = learner(fused)
    torch.manual_seed(0)
    trainer(tmp_path / "again", generation(), limit_val_batches=1).validate(
        model, datamodule=data(), ckpt_path=tmp_path / "one.ckpt", weights_only=True, verbose=False
    )


def test_a_missing_package_is_reported_first(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else there(name))
    with pytest.raises(UserError, match=r"pip install 'gear_lightning\[torchao\]'"):
        Built(arguments(QUICKSTART, OPTIMIZERS / "adamw_8bit.yaml"))


@pytest.mark.parametrize(
    ("make", "precision", "message"),
    [
        (torch.optim.LBFGS, "32-true", "LBFGS computes the loss several times in a step"),
        (torch.optim.AdamW, "16-true", "eps=1e-08 is 0 in float16.*at least 1e-7"),
    ],
)
def test_an_optimizer_that_can_take_no_step_here_is_refused(make, precision, message):
    with pytest.raises(UserError, match=message):
        GearModule(source(), optimizer=make).check_optimizer(precision)


def test_an_optimizer_that_can_take_steps_is_not_refused():
    for make, precision in (
        (torch.optim.AdamW, "bf16-true"),
        (lambda p: torch.optim.AdamW(p, eps=1e-7), "16-true"),
        (torch.optim.SGD, "16-true"),
    ):
        GearModule(source(), optimizer=make).check_optimizer(precision)
