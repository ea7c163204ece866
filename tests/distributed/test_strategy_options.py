"""Options of the strategies, engines with old weights, and errors that stop a run at its start."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from deadlines import until
from distributed_runs import PYTHON, Opinions, finish, fit_command, members, side_by_side, start, strategy
from rank_group import Group
from short_runs import train

from gear_lightning.callbacks.startup import StartupCheck
from gear_lightning.data import RolloutDataModule
from gear_lightning.distributed.sharding import local
from gear_lightning.errors import UserError
from gear_lightning.generation.cached_engine import CachedEngine
from gear_lightning.generation.engine import Sampling
from gear_lightning.parity.steps import compare_steps
from gear_lightning.strategies import FSDP2


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of a single process."""
    run = tmp_path_factory.mktemp("one")
    return {**train(run, "one"), "run": run}


def equal_to_one(one: dict[str, Any], results: list[dict[str, Any]], run: Path) -> None:
    found = compare_steps(one["run"], run)
    assert not found.faults, found
    assert found.steps, "no step had a gradient"
    for mine in results:
        for key, value in one["metrics"].items():  # the sampler's gap is only rounding
            tolerance = 1e-5 if "sampler_gap" in key else 1e-6
            assert mine["metrics"][key] == pytest.approx(value, rel=1e-4, abs=tolerance), key


class Scaled(L.Callback):
    """Makes rank 1's gradients 2 % too large, so that those of the run are off by 1 %."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        step, factor = pl_module.training_step, 1.02 if trainer.global_rank else 1.0

        def scaled(*args: Any) -> dict[str, Any]:
            out = step(*args)
            return {**out, "loss": out["loss"] * factor}

        pl_module.training_step = scaled


class HalfUpdated(L.Callback):
    """Reverts the first step for rank 1's part of one tensor."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.part = local(next(p for n, p in pl_module.policy.named_parameters() if "up_proj" in n))
        self.before = self.part.clone()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1:
            self.part.copy_(self.before)


@pytest.mark.parametrize(("name", "fault"), [("ddp", Scaled), ("zero3", Scaled), ("zero3", HalfUpdated)])
def test_an_error_on_one_rank_is_found_in_the_records_of_its_steps(pair, one, tmp_path, name, fault):
    pair.run(with_options, tmp_path, name, {"callbacks": [fault()]})
    told = {Scaled: "step 1: the gradient differs by", HalfUpdated: "up_proj.weight has an update that its gradient d"}
    assert told[fault] in compare_steps(one["run"], tmp_path).faults[0]


def with_options(run: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    return train(run, name, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fsdp", {"reshard_after_forward": False}),
        ("fsdp", {"teacher": {"park": True}}),
        ("zero3", {"teacher": {"park": True}}),
        ("zero3_offload", {"teacher": {"park": True}}),
        ("zero2", {"offload_optimizer": True}),
        ("zero3", {"bucket_size": 1000, "weights": "stream"}),
        ("fsdp", {"logits": 1000, "weights": "stream"}),
    ],
    ids=str,
)
def test_options_that_affect_only_memory_and_time_do_not_change_results(pair, one, tmp_path, name, options):
    equal_to_one(one, pair.run(with_options, tmp_path, name, options), tmp_path)


def test_hybrid_sharding_trains_like_one_process(one, tmp_path):
    four = Group(4)
    try:
        results = four.run(with_options, tmp_path, "fsdp", {"replicas": 2})
    finally:
        four.stop()
    equal_to_one(one, results, tmp_path)


# -- checks at the start ----------------------------------------------------------------------------------------------


class FullCopies(FSDP2):
    """Claims that each process holds a half, but gives each a full copy."""

    def setup_environment(self) -> None:
        self.replicas = self.num_nodes * self.num_processes
        super().setup_environment()
        self.replicas = 1


class SameGroupIds(RolloutDataModule):
    """Numbers the groups of every process from 0, as if each were the first process."""

    def _generate(self) -> None:
        super()._generate()
        first = self.groups[0].group_id
        for group in self.groups:
            group.group_id -= first


def checked(run: Path, what: str) -> str:
    if what == "unspread":
        return told(partial(train, run, FullCopies(), callbacks=[StartupCheck()]))
    return told(partial(train, run, "ddp", callbacks=[StartupCheck()], data=SameGroupIds))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("unspread", "FullCopies should shard the policy over 2 processes, but one holds"),
        ("same", "ranks 0 and 1 both hold the rollouts of group 0"),
    ],
)
def test_the_startup_check_ends_the_run(pair, tmp_path, what, message):
    for said in pair.run(checked, tmp_path, what):
        assert message in said
    pair.stop()


def evaluated(run: Path, name: str, weights: str) -> Any:
    try:
        return train(run, name, weights=weights, only_evaluate=True)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(("name", "weights"), [("zero3", "auto"), ("fsdp", "stream"), ("zero3", "stream")])
def test_evaluation_without_training_samples_sharded_weights_or_is_refused(pair, tmp_path, name, weights):
    results = pair.run(evaluated, tmp_path, name, weights)
    if (name, weights) == ("zero3", "stream"):  # DeepSpeed gathers layers only in training
        assert all("works under ZeRO-3 only in training; evaluate with gather" in said for said in results)
        pair.stop()
        return
    alone = train(tmp_path, "one", only_evaluate=True)[0]
    assert alone["val/response_tokens"] > 1
    for metrics in results:
        assert metrics[0] == pytest.approx(alone, rel=1e-5)


# -- wrong weights ----------------------------------------------------------------------------------------------------


class Stale(CachedEngine):
    """Keeps using the model of its second `begin` (the first is the start-up check)."""

    kept: Any = None
    looks = 0

    def begin(self, model: Any, sampling: Sampling, stop_ids: set[int]) -> None:
        self.looks += 1
        if self.kept is None and self.looks > 1:
            self.kept = model
        super().begin(self.kept or model, sampling, stop_ids)


def stale(run: Path, name: str) -> str:
    return told(partial(train, run, name, engine=Stale(), weights="gather"))


class Drift(L.Callback):
    """Changes one weight of rank 1 after the first step."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_rank == 1:
            with torch.no_grad():
                next(pl_module.policy.parameters())[3, 3] += 1e-6


def drifting(run: Path, name: str) -> str:
    return told(partial(train, run, name, callbacks=[Drift()]))


def told(function: Any) -> str:
    try:
        function()
    except UserError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_an_engine_with_old_weights_raises_on_all_ranks(pair, tmp_path, name):
    for message in pair.run(stale, tmp_path, name):
        assert "stale engine: Stale samples with weights" in message
    pair.stop()  # the error left the strategy in an undefined state


@pytest.mark.parametrize("name", ["ddp", "zero2"])
def test_different_weights_on_ranks_raise_an_error(pair, tmp_path, name):
    for message in pair.run(drifting, tmp_path, name):
        assert "the policy's weights differ between processes" in message
    pair.stop()


# -- bad input --------------------------------------------------------------------------------------------------------


class Unsplit(Opinions):
    """A model that does not list its layers."""

    def model(self) -> Any:
        model = super().model()
        model._no_split_modules = None
        return model

    def skeleton(self) -> Any:
        model = super().skeleton()
        model._no_split_modules = None
        return model


BAD = {
    "stage": ("zero2", ["--trainer.strategy.stage=4"], "trainer.strategy.stage=4: ZeRO has stages 1, 2 and 3"),
    "offload": (
        "zero2",
        ["--trainer.strategy.offload_parameters=true"],
        "trainer.strategy.offload_parameters needs stage 3, not 2",
    ),
    "none": ("fsdp", ["--trainer.strategy.replicas=0"], "trainer.strategy.replicas=0: must be at least 1"),
    "replicas": ("fsdp", ["--trainer.strategy.replicas=3"], "trainer.strategy.replicas=3 does not divide 2 processes"),
    "layers": (
        "fsdp",
        ["--model.policy=tests.distributed.test_strategy_options.Unsplit"],
        "LlamaForCausalLM does not list its decoder layers",
    ),
    "targets": (
        "ddp",
        ["--config=configs/model/lora.yaml", "--model.lora.targets=[nothing_proj]"],
        "lora.targets: nothing_proj matches no linear layer of LlamaForCausalLM",
    ),
    "clip": (
        "zero2",
        ["--trainer.gradient_clip_algorithm=value"],
        "trainer.gradient_clip_algorithm=value: ZeRO clips gradients only by norm",
    ),
    "accumulate": (
        "fsdp",
        ["--trainer.accumulate_grad_batches=3"],
        "trainer.accumulate_grad_batches follows from data.micro_batch_size",
    ),
    "tasks": ("zero1", ["--data.tasks_per_iteration=3"], "data.tasks_per_iteration=3 is not divisible by 2 processes"),
}


AS_A_USER = ("stage", "layers")  # started like by a user, in a process group that the test can inspect


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """Map the name of an invalid option to (exit status, output), after all processes have ended."""
    folder = tmp_path_factory.mktemp("bad")

    def run(name: str) -> tuple[int, str]:
        which, options, _ = BAD[name]
        log, python = folder / name / "log.txt", PYTHON if name in AS_A_USER else None
        process = start(fit_command(folder / name, *strategy(which), *options, python=python), log)
        status = finish(process, log)
        until(lambda: not members(process.pid), "all processes end, because each finds the error itself")
        return status, log.read_text()

    return side_by_side({name: partial(run, name) for name in BAD})


@pytest.mark.parametrize("name", BAD)
def test_an_invalid_option_gives_one_error_and_all_processes_end(refused, name):
    status, text = refused[name]
    assert status == 2, text
    assert text.count(f"gear-lightning: error: {BAD[name][2]}") == 1, "raised by a second process too"
    assert "Traceback" not in text
    assert "[WARNING]" not in text, "a warning of DeepSpeed"
