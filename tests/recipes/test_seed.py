"""`--seed_everything` sets the seed of tasks and sampling unless `data.seed` is given; a resume reports a new seed."""

import json

import pytest
import yaml
from command_line import FIT, error_of
from save_in_the_middle import SaveInTheMiddle
from tiny_runs import data, generation, module, trainer

from gear_lightning.data import RolloutDataModule
from gear_lightning.environments.lookup_chain import LookupChainTasks
from gear_lightning.errors import UserError
from gear_lightning.recipes.recipe import read_recipe


@pytest.mark.parametrize(
    ("options", "seed"),
    [
        ([], 0),
        (["--seed_everything=3"], 3),
        (["--seed_everything=3", "--data.seed=5"], 5),
        (["--seed_everything=false"], 0),
    ],
)
def test_the_seed_of_tasks_and_sampling_follows_seed_everything(repository, monkeypatch, options, seed):
    monkeypatch.chdir(repository)
    assert read_recipe(["--config", "configs/quickstart.yaml", *options]).data.seed == seed


def test_another_seed_gives_another_run_and_config_yaml_records_it(command, tmp_path):
    drawn = {}
    for name, options in {"plain": [], "everything": ["--seed_everything=1"], "data": ["--data.seed=1"]}.items():
        run = tmp_path / name
        short = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=0", f"--trainer.default_root_dir={run}"]
        status, _, err = command(*FIT, *short, *options)
        assert status == 0, err
        lines = (run / "rollouts" / "iter_000000.rank_0.jsonl").read_text().splitlines()
        drawn[name] = [(r["task_id"], r["messages"]) for r in map(json.loads, lines)]
        assert yaml.safe_load((run / "config.yaml").read_text())["data"]["seed"] == int(bool(options))
    assert drawn["everything"] == drawn["data"]
    assert drawn["everything"] != drawn["plain"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--seed_everything=-1", "seed_everything: -1 is not in bounds"),
        ("--data.seed=-1", "data.seed=-1: must be at least 0 and below 2^32"),
    ],
)
def test_an_invalid_seed_gives_one_error(command, tmp_path, option, message):
    assert message in error_of(command, *FIT, "--trainer.default_root_dir", tmp_path, option)


def test_in_python_the_default_seed_is_0():
    tasks = LookupChainTasks(2)
    assert (RolloutDataModule(tasks).seed, RolloutDataModule(tasks, seed=7).seed) == (0, 7)


def test_a_resume_with_another_seed_warns(tmp_path):
    loop = trainer(tmp_path, generation(), max_epochs=1)
    loop.fit(module(), datamodule=data())
    loop.save_checkpoint(tmp_path / "a.ckpt")
    again = trainer(tmp_path, generation(), max_epochs=2)
    with pytest.warns(UserWarning, match=r"data\.seed=4 .*, but the checkpoint's run used 0: from now on"):
        again.fit(module(), datamodule=data(seed=4), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


def test_an_unfinished_iteration_is_not_resumed_with_another_seed(tmp_path):
    """Otherwise the teacher would see its rollouts with the references of other tasks."""
    loop = trainer(tmp_path, generation(), SaveInTheMiddle(tmp_path / "mid.ckpt"))
    loop.fit(module(), datamodule=data(inner_epochs=2))
    again = trainer(tmp_path, generation())
    with pytest.raises(UserError, match=r"in the middle of an iteration with data\.seed=0; resume with that seed"):
        again.fit(module(), datamodule=data(inner_epochs=2, seed=4), ckpt_path=tmp_path / "mid.ckpt", weights_only=True)
