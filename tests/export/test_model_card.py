"""The model card: its description of the training, and the private values that it omits."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from gear_lightning import __version__
from gear_lightning.export.directory import export_checkpoint
from gear_lightning.export.model_card import model_card
from gear_lightning.runs.provenance import code_version

RECIPE = {
    "seed_everything": 3,
    "trainer": {
        "max_epochs": 12, "precision": "bf16-mixed", "default_root_dir": "/home/someuser/run",
        "logger": {"class_path": "WandbLogger", "init_args": {"project": "secret-project"}},
    },
    "model": {
        "policy": {"class_path": "gear_lightning.models.Pretrained", "init_args": {"path": "Qwen/Qwen3-0.6B"}},
        "credit": {"class_path": "gear_lightning.credit.GEAR", "init_args": {"kappa": 0.5}},
        "objective": {"class_path": "gear_lightning.loss.ClippedSurrogate", "init_args": {}},
        "teacher": {"template": "\n\nLook:\n```\n{reference}\n```"},
        "lora": None,
    },
    "data": {
        "train_tasks": {
            "class_path": "gear_lightning.environments.jsonl.JsonlTasks",
            "init_args": {"path": "/home/someuser/data/train.jsonl", "reward": "math"},
        },
        "val_tasks": {"class_path": "my.Served", "init_args": {"url": "https://me:hunter2@host/x?api_key=abc&n=2"}},
        "group_size": 8,
    },
    "generation": {"environment": {"class_path": "my.Env", "init_args": {"api_key": "sk-1", "auth": {"token": ["t"]}}}},
    "recorder": {"keep_last": 3},
}  # fmt: skip
METRICS = """step,val/success,train/reward,time/rollout_s
0,0.125,,
1,,0.5,3
2,0.25,0.75,3
3,0.5,0.875,3
"""
STATE = {"global_step": 2, "made_by": {"version": "9.9", "commit": "abc123+changes", "base_model": "Qwen/Qwen3-0.6B"}}


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "metrics.csv").write_text(METRICS)
    return folder


def card(run: Path, state: dict = STATE, **options) -> str:
    made = {"name": "out", "adapter": False, "license": None, **options}
    return model_card(run / "checkpoints" / "a.ckpt", state, **made)


def test_the_hub_can_read_the_front_matter(run):
    data = ModelCard(card(run)).data.to_dict()
    assert data == {
        "base_model": "Qwen/Qwen3-0.6B", "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["gear_lightning", "reinforcement-learning"],
    }  # fmt: skip
    adapter = ModelCard(card(run, adapter=True, license="apache-2.0")).data
    assert (adapter.library_name, adapter.license) == ("peft", "apache-2.0")
    assert ModelCard(card(run, {"global_step": 2})).data.base_model is None


def test_the_card_names_model_method_and_code_version(run):
    text = card(run)
    assert "[Qwen/Qwen3-0.6B](https://huggingface.co/Qwen/Qwen3-0.6B) after reinforcement learning with " in text
    assert "gear_lightning 9.9, commit `abc123+changes`: credit `GEAR`, objective `ClippedSurrogate`, 2 opt" in text
    assert (
        "| training | `gear_lightning.environments.jsonl.JsonlTasks` | path='.../train.jsonl', reward='math' |" in text
    )


def test_the_metrics_end_at_the_step_of_the_checkpoint(run):
    text = card(run)
    assert "| val/success | 0.125 | 0.25 | 2 |" in text
    assert "| train/reward | 0.5 | 0.75 | 2 |" in text
    assert "time/rollout_s" not in text
    assert "| val/success | 0.125 | 0.5 | 3 |" in card(run, {**STATE, "global_step": 3})


def test_the_recipe_can_be_parsed_again(run):
    text = card(run)
    shown = yaml.safe_load(text.partition("````yaml\n")[2].partition("````")[0])
    assert shown["model"] == RECIPE["model"]
    assert shown["trainer"] == {"max_epochs": 12, "precision": "bf16-mixed"}
    assert shown["seed_everything"] == 3


def test_secrets_and_paths_are_masked(run):
    text = card(run)
    for secret in ("someuser", "secret-project", "hunter2", "abc&", "sk-1", "- t\n"):
        assert secret not in text
    assert "group_size: 8" in text
    assert "n=2" in text


@pytest.mark.parametrize(
    "config",
    [
        None, "", "[1]", "a: [", "a: &x [*x]", "\x00", "!!python/object/apply:os.system [touch x]",
        "model: {policy: 7, credit: [1]}\ndata: {train_tasks: 3}\ntrainer: 5\n",
        "data:\n  a: &a [x, x, x, x, x, x, x, x]\n"
        + "".join(f"  {y}: &{y} [{', '.join([f'*{x}'] * 8)}]\n" for x, y in zip("abcdefg", "bcdefgh", strict=True)),
    ],
)  # fmt: skip
def test_any_recipe_gives_a_valid_card(run, config):
    (run / "config.yaml").unlink()
    if config is not None:
        (run / "config.yaml").write_text(config)
    (run / "metrics.csv").write_text("step,val/success|<x>\n0,0.5\n1,7")
    text = card(run, {"global_step": "x", "made_by": ["?"]})
    assert len(text) < 5_000
    assert ModelCard(text).data.library_name == "transformers"


def test_an_export_has_a_card_unless_it_is_disabled(tmp_path):
    from tiny_runs import module

    from gear_lightning.runs.checkpoints import write_checkpoint

    mine = module()
    assert mine.chat_format
    mine.policy = mine.source.model()
    weights = {f"policy.{k}": v for k, v in mine.policy.state_dict().items()}
    state = {"policy_files": mine.policy_files(), "state_dict": weights, "lora": None, "global_step": 5}
    write_checkpoint({**state, "made_by": {**code_version(), "base_model": None}}, tmp_path / "a.ckpt")
    export_checkpoint(tmp_path / "a.ckpt", tmp_path / "with", license="mit")
    text = (tmp_path / "with" / "README.md").read_text()
    assert ModelCard(text).data.license == "mit"
    assert "config.yaml` was missing or not readable" in text
    assert f"gear_lightning {__version__}" in text
    export_checkpoint(tmp_path / "a.ckpt", tmp_path / "without", card=False)
    assert not (tmp_path / "without" / "README.md").exists()


def test_a_checkpoint_records_its_code_version(monkeypatch, tmp_path):
    from tiny_runs import data, generation, module, trainer

    loop = trainer(tmp_path, generation(), max_epochs=1)
    loop.fit(module(), datamodule=data())
    loop.save_checkpoint(tmp_path / "a.ckpt")
    made_by = torch.load(tmp_path / "a.ckpt", weights_only=True)["made_by"]
    assert made_by == {**code_version(), "base_model": None}
    assert made_by["version"] == __version__
    import gear_lightning.runs.provenance as provenance

    monkeypatch.setattr(provenance, "ROOT", tmp_path)  # not a git checkout
    installed = {"vcs_info": {"vcs": "git", "commit_id": "0123abc"}, "url": "https://host/repository"}
    for record, commit in ((installed, "0123abc"), ({"dir_info": {}}, None), (None, None)):
        text = None if record is None else json.dumps(record)
        monkeypatch.setattr(
            provenance, "distribution", lambda name, t=text: type("D", (), {"read_text": lambda s, n: t})()
        )
        assert provenance.code_version.__wrapped__() == {"version": __version__, "commit": commit}
