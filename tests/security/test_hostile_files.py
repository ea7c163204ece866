"""Malicious checkpoints, model directories, runs, tasks and recipes cause an error and no damage."""

import builtins
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import CHATML, byte_tokenizer
from command_line import FIT
from credit_pages import add, fake_rollout
from tiny_runs import data, generation, module, source, trainer

from gear_lightning.callbacks.checkpoint import IterationCheckpoint
from gear_lightning.commands.credit import credit_command
from gear_lightning.environments.jsonl import JsonlTasks
from gear_lightning.errors import UserError, printable
from gear_lightning.export.directory import export_checkpoint
from gear_lightning.generation.chat import Chat
from gear_lightning.lens.page import write_credit_page
from gear_lightning.lens.trace import load_decoder
from gear_lightning.models import Pretrained
from gear_lightning.runs.records import read_records


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(mark: Path) -> dict[str, Any]:
    """Return objects that create the file ``mark`` when they are unpickled without protection."""
    code = f"open({str(mark)!r}, 'w')"
    inner = mark.with_suffix(".inner")
    torch.save(Call(builtins.exec, code), inner)
    return {
        "os.system": Call(os.system, f"touch {mark}"),
        "eval": Call(builtins.eval, code),
        "exec": Call(builtins.exec, code),
        "getattr": Call(builtins.getattr, Call(builtins.__import__, "os"), "system"),
        "torch's loader": Call(torch.storage._load_from_bytes, inner.read_bytes()),
        "a shell": Call(__import__("subprocess").check_output, ["touch", str(mark)]),
        "a class": Call(type, "X", (), {}),
    }


NAMES = ["os.system", "eval", "exec", "getattr", "torch's loader", "a shell", "a class"]


def keeper(folder: Path) -> IterationCheckpoint:
    return IterationCheckpoint(dirpath=folder, filename="{epoch}", save_last="link", save_on_train_epoch_end=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Return the checkpoint of a short run."""
    folder = tmp_path_factory.mktemp("run")
    loop = trainer(folder, generation(), keeper(folder), enable_checkpointing=True, max_epochs=1)
    loop.fit(module(), datamodule=data())
    return folder / "epoch=0.ckpt"


def resume(checkpoint: Path, run: Path, **options: Any) -> None:
    loop = trainer(run, generation(), keeper(run), enable_checkpointing=True, max_epochs=2)
    loop.fit(module(), datamodule=data(), ckpt_path=checkpoint, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["beside", "within", "alone"])
def test_no_pickle_in_a_checkpoint_executes_code(checkpoint, tmp_path, name, place):
    mark, bad = tmp_path / "mark", tmp_path / "bad.ckpt"
    attack = attacks(mark)[name]
    state = torch.load(checkpoint, weights_only=True)
    if place == "within":
        state["policy_files"]["config.json"] = attack
    torch.save(attack if place == "alone" else state if place == "within" else {**state, "x": attack}, bad)
    with pytest.raises(UserError, match=r"bad\.ckpt: not a checkpoint"):
        export_checkpoint(bad, tmp_path / "out")
    for options in ({}, {"weights_only": True}):
        with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported|not a checkpoint"):
            resume(bad, tmp_path / "again", **options)
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_the_attacks_work_without_protection(tmp_path):
    """Loaded without protection, all but the last two attacks succeed."""
    for name, attack in attacks(tmp_path / "mark").items():
        torch.save(attack, tmp_path / "x")
        (tmp_path / "mark").unlink(missing_ok=True)
        torch.load(tmp_path / "x", weights_only=False)
        assert (tmp_path / "mark").exists() == (name not in ("getattr", "a class")), name


def test_no_pickle_executes_code_from_the_command_line(checkpoint, tmp_path, command):
    mark = tmp_path / "mark"
    torch.save({**torch.load(checkpoint, weights_only=True), "x": attacks(mark)["exec"]}, tmp_path / "bad.ckpt")
    for args in (
        [*FIT, "--ckpt_path", tmp_path / "bad.ckpt", "--trainer.default_root_dir", tmp_path / "run"],
        ["validate", *FIT[1:], "--ckpt_path", tmp_path / "bad.ckpt", "--trainer.default_root_dir", tmp_path / "run"],
        ["export", tmp_path / "bad.ckpt", tmp_path / "out"],
    ):
        try:
            status = command(*args)[0]
        except Exception as error:
            status = str(error)
        assert status != 0
    assert not mark.exists()


def test_a_damaged_checkpoint_is_an_error(checkpoint, tmp_path):
    whole, bad, draw = checkpoint.read_bytes(), tmp_path / "bad.ckpt", random.Random(0)
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 4, 64])):
            where = draw.randrange(len(damaged)) if draw.random() < 0.5 else -draw.randrange(1, 4000)
            damaged[where] ^= 1 << draw.randrange(8)
        cut = len(damaged) if draw.random() < 0.7 else draw.randrange(len(damaged))
        bad.write_bytes(damaged[:cut])
        try:
            export_checkpoint(bad, tmp_path / "out")
        except UserError:
            assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)  # no bit that matters was changed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.ckpt"]


BYTES = torch.frombuffer(bytearray(b"import os; os.system('true')"), dtype=torch.uint8)


@pytest.mark.parametrize(
    "name",
    ["../../x", "/tmp/gear_lightning_x", "..", "", "a/b.json", "..\\x.json", "x.json\0", "x.py", "pytorch_model.bin",
     "model.safetensors", "adapter_config.json", ".bashrc", "tokenizer.pkl", "x" * 300 + ".json", 7],
)  # fmt: skip
def test_export_writes_no_unexpected_file_of_a_checkpoint(checkpoint, tmp_path, name):
    state = torch.load(checkpoint, weights_only=True)
    state["policy_files"][name] = BYTES
    torch.save(state, tmp_path / "bad.ckpt")
    folder = tmp_path / "a" / "b" / "out"
    with pytest.raises(UserError, match=r"bad\.ckpt: not a checkpoint"):
        export_checkpoint(tmp_path / "bad.ckpt", folder)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / "bad.ckpt"]
    assert not Path("/tmp/gear_lightning_x").exists()


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": 10**12}, {"num_hidden_layers": 10**9}, {"hidden_size": 10**8}, {"model_type": "no_such"},
     {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "model_type": "evil"}],
)  # fmt: skip
def test_a_configuration_that_does_not_match_its_weights_creates_no_model(checkpoint, tmp_path, change):
    state = torch.load(checkpoint, weights_only=True)
    config = json.loads(state["policy_files"]["config.json"].numpy().tobytes()) | change
    state["policy_files"]["config.json"] = torch.frombuffer(bytearray(json.dumps(config).encode()), dtype=torch.uint8)
    torch.save(state, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match=r"bad\.ckpt: not a checkpoint"):
        export_checkpoint(tmp_path / "bad.ckpt", tmp_path / "out")


@pytest.mark.parametrize("how", ["parent", "protocol", "elsewhere"])
def test_a_checkpoint_can_cause_the_deletion_only_of_older_checkpoints(checkpoint, tmp_path, how):
    run, victim = tmp_path / "run", tmp_path / "precious.ckpt"
    run.mkdir()
    victim.write_text("data")
    path = {"parent": f"{run}/../precious.ckpt", "protocol": f"local://{victim}", "elsewhere": str(victim)}[how]
    state = torch.load(checkpoint, weights_only=True)
    (mine,) = (value for key, value in state["callbacks"].items() if key.startswith("IterationCheckpoint"))
    mine |= {"dirpath": str(run), "best_model_path": path, "kth_best_model_path": path, "last_model_path": path,
             "best_k_models": {path: torch.tensor(0.0)}}  # fmt: skip
    torch.save(state, tmp_path / "bad.ckpt")
    resume(tmp_path / "bad.ckpt", run)
    assert victim.read_text() == "data"
    assert (run / "epoch=1.ckpt").exists()


def test_a_checkpoint_cannot_change_the_recipe(checkpoint, tmp_path, command, monkeypatch):
    (tmp_path / "evil_credit.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    state = torch.load(checkpoint, weights_only=True)
    state["hyper_parameters"] = {"credit": {"class_path": "evil_credit.Evil"}}
    torch.save(state, tmp_path / "bad.ckpt")
    args = ["validate", *FIT[1:], "--ckpt_path", tmp_path / "bad.ckpt", "--trainer.default_root_dir", tmp_path / "run"]
    assert command(*args)[0] == 0
    assert not (tmp_path / "mark").exists()


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model_folder(tmp_path) -> Path:
    folder = tmp_path / "model"
    source().model().save_pretrained(folder)
    source().tokenizer().save_pretrained(folder)
    return folder


def test_a_model_directory_executes_no_code(model_folder, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    (model_folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\n")
    names = {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.C", "evil.C"], "AutoModelForCausalLM": "evil.C"}
    for name in ("config.json", "tokenizer_config.json"):
        file = model_folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": names}))

    asked = []  # the prompt to run remote code
    monkeypatch.setattr(builtins, "input", lambda *words: asked.append(words) or "n")
    run = tmp_path / "run"
    shutil.copytree(model_folder, run / "tokenizer")
    for load in (Pretrained(str(model_folder)).tokenizer, Pretrained(str(model_folder)).model,
                 Pretrained(str(model_folder)).skeleton, lambda: load_decoder(run)):  # fmt: skip
        load()  # transformers' own classes instead of the named ones
    for folder in (model_folder, run / "tokenizer"):  # an error if transformers has no such class
        for file, key in (
            (folder / "config.json", "model_type"),
            (folder / "tokenizer_config.json", "tokenizer_class"),
        ):
            file.write_text(json.dumps({**json.loads(file.read_text()), key: "evil"}))
    for load in (
        Pretrained(str(model_folder)).model,
        Pretrained(str(model_folder)).skeleton,
        lambda: load_decoder(run),
    ):
        with pytest.raises(UserError):
            load()
    assert not mark.exists()
    assert not asked


def test_pickled_weights_execute_no_code(model_folder, tmp_path):
    mark = tmp_path / "mark"
    (model_folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": attacks(mark)["exec"]}, model_folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        Pretrained(str(model_folder)).model()
    assert not mark.exists()


@pytest.mark.parametrize(
    "path",
    ["", "\0.gguf", "a" * 5000 + ".gguf", "package:", "package:.x/y.gguf", "package:os/../../x.gguf", "package:../x",
     "../" * 40 + "etc/passwd", "file:///etc/passwd", "$(touch x).gguf", "/dev/null", "~root/x/y"],
)  # fmt: skip
def test_any_malicious_model_path_is_an_error(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (Pretrained(path).tokenizer, Pretrained(path).model):
        with pytest.raises(UserError):
            load()
    assert not list(tmp_path.iterdir())


def test_any_invalid_gguf_file_is_an_error(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("GEAR_LIGHTNING_CACHE", str(tmp_path / "cache"))
    writer = gguf.GGUFWriter(tmp_path / "whole.gguf", "llama")
    writer.add_chat_template("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    writer.add_block_count(2**31)
    writer.add_tensor("token_embd.weight", torch.zeros(4, 4).numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    whole, draw = (tmp_path / "whole.gguf").read_bytes(), random.Random(0)
    for number in range(12):
        bad = bytearray(whole)
        for _ in range(draw.choice([0, 1, 4])):
            bad[draw.randrange(len(bad))] = draw.randrange(256)
        path = tmp_path / f"bad{number}.gguf"
        path.write_bytes(bad[: draw.choice([len(bad), draw.randrange(len(bad))])])
        with pytest.raises(UserError, match=f"bad{number}"):
            Pretrained(str(path)).model()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(10**12) %}x{% endfor %}", "uses the power operator"),
        ("{% for i in range(1000000000000) %}x{% endfor %}", "Range too big"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "not finished after 1,000,000",
        ),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "not finished after",
        ),
        ("{{ 'x' * 6000000 }}", "6,000,.* characters"),
        ("{{ 'x' * 1000000000000000 }}", "MemoryError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "roles user"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_a_chat_template_is_sandboxed_and_bounded(template, message):
    with pytest.raises(UserError, match=message):
        Chat(byte_tokenizer(template + CHATML))


# -- tasks, recipes, records ------------------------------------------------------------------------------------------


def test_a_task_file_cannot_import_code(tmp_path, monkeypatch):
    (tmp_path / "evil_reward.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\ndef good(*_): return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "tasks.jsonl"
    for reward in ("evil_reward.good", "os.system", "builtins.eval", "gear_lightning.rewards.__builtins__"):
        file.write_text(json.dumps({"prompt": "a", "reward": reward}) + "\n")
        with pytest.raises(UserError, match=r"tasks\.jsonl:1: found reward = .* the config lists under rewards"):
            JsonlTasks(str(file))
    assert not (tmp_path / "mark").exists()
    assert "evil_reward" not in sys.modules
    file.write_text('{"prompt": "a", "reward": "evil_reward.good"}\n')
    assert JsonlTasks(str(file), rewards=["evil_reward.good"])[0].meta["reward"] == "evil_reward.good"


@pytest.mark.parametrize(
    "tag", ["object/apply:os.system [touch {}]", "object/new:os.system [touch {}]", "name:os.system"]
)
def test_yaml_tags_in_a_recipe_create_no_objects(tag, tmp_path, command):
    (tmp_path / "bad.yaml").write_text(f"seed_everything: !!python/{tag.format(tmp_path / 'mark')}\n")
    assert command("fit", "--config", tmp_path / "bad.yaml")[0] == 2
    assert not (tmp_path / "mark").exists()


@pytest.fixture
def run(tmp_path) -> Path:
    """Return a run directory with one record."""
    source().tokenizer().save_pretrained(tmp_path / "tokenizer")
    add(tmp_path, fake_rollout())
    return tmp_path


@pytest.mark.parametrize(
    "line",
    ["[]", "null", '"format"', '{"format": 1}', "{" * 100_000, '{"format": 1, "row": ' + "9" * 5000 + "}", "\udcff",
     json.dumps(fake_rollout(reward=float("nan"))), json.dumps(fake_rollout(status=["\x1b[2J"])),
     json.dumps(fake_rollout(row=True)), json.dumps(fake_rollout(messages=["x"])),
     json.dumps(fake_rollout(reward="1"))],
)  # fmt: skip
def test_an_invalid_record_gives_a_one_line_error(run, line):
    file = run / "rollouts" / "iter_000000.rank_0.jsonl"
    file.write_bytes(line.encode(errors="surrogateescape") + b"\n")
    for show in (lambda: list(read_records(run)), lambda: write_credit_page(run), lambda: credit_command([str(run)])):
        with pytest.raises(UserError, match=r"iter_000000\.rank_0\.jsonl:1: "):
            show()


def test_tensors_of_a_record_are_not_pickled(run):
    torch.save(attacks(run / "mark")["exec"], run / "rollouts" / "iter_000000.rank_0.safetensors")
    with pytest.raises(UserError, match=r"rank_0\.safetensors: cannot be read"):
        list(read_records(run))
    assert not (run / "mark").exists()


def test_errors_contain_no_terminal_control_sequences(run, command):
    add(run, fake_rollout(task_id="\x1b]0;owned\x07\x1b[2J\x9b31m\r"))
    _, _, err = command("credit", run, "--task", "other")
    assert err.startswith("gear-lightning: error: ")
    assert "⟨U+001B⟩]0;owned⟨U+0007⟩" in err
    assert printable(err) == err
