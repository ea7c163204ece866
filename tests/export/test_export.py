"""Checkpoints contain only plain data, and an export is a model directory that transformers loads."""

import os
import pickle
import pickletools
import zipfile
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from save_in_the_middle import SaveInTheMiddle
from tiny_runs import data, generation, module, source, trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from gear_lightning.commands.export import export_command
from gear_lightning.errors import UserError
from gear_lightning.export.directory import export_checkpoint
from gear_lightning.models import Pretrained
from gear_lightning.module import GearModule
from gear_lightning.teacher import TeacherOptions

TOKENS = torch.arange(6, 46)[None]


def tied(folder: Path) -> Pretrained:
    """A policy with tied input and output embeddings."""
    from transformers import LlamaForCausalLM

    config = source().model().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    source().tokenizer().save_pretrained(folder)
    return Pretrained(str(folder))


def fit(run: Path, model: GearModule, *callbacks: L.Callback, inner_epochs: int = 1, **options) -> GearModule:
    torch.manual_seed(0)
    keeper = ModelCheckpoint(run / "checkpoints", save_last=True, save_on_train_epoch_end=True)
    loop = trainer(run, generation(), keeper, *callbacks, enable_checkpointing=True, **options)
    loop.fit(model, datamodule=data(inner_epochs=inner_epochs))
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a trained module and its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    return fit(folder, module()), folder / "checkpoints" / "last.ckpt"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize(("kind", "precision"), [("untied", "32-true"), ("untied", "bf16-true"), ("tied", "32-true")])
def test_an_exported_policy_gives_bitwise_the_trained_logits(tmp_path, kind, precision):
    model = module()
    if kind == "tied":
        options = {"teacher": TeacherOptions(template=" {reference}"), "optimizer": model.optimizer}
        model = GearModule(tied(tmp_path / "model"), **options)
    start = logits(model.source.model())
    fit(tmp_path, model, precision=precision)
    export_checkpoint(tmp_path / "checkpoints" / "last.ckpt", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model.policy)), "the export is not the trained policy"
    assert (logits(loaded).float() - start).abs().max() > 0.05, "training did not change the policy"
    assert loaded.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert loaded.config.tie_word_embeddings == (kind == "tied")
    assert loaded.generation_config.eos_token_id == model.policy.config.eos_token_id


def test_rotary_frequencies_stay_float32_with_bfloat16_weights(tmp_path):
    """Rounded to bfloat16, they are off by a radian within some hundred tokens, unlike in any loaded model."""
    model = fit(tmp_path, module(), precision="bf16-true", max_epochs=1)
    right = model.source.model().model.rotary_emb.inv_freq
    for trained in (model.policy, model.teacher.model):
        assert trained.lm_head.weight.dtype == torch.bfloat16
        assert torch.equal(trained.model.rotary_emb.inv_freq, right)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_weights_are_written_in_the_requested_dtype(run, tmp_path, dtype):
    model, checkpoint = run
    export_checkpoint(checkpoint, tmp_path / "out", dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {getattr(torch, dtype)}
    for ours, theirs in zip(model.policy.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours.to(theirs.dtype), theirs)


def test_weights_that_overflow_float16_are_rejected(run, tmp_path):
    state = torch.load(run[1], weights_only=True)
    state["state_dict"]["policy.lm_head.weight"][0, 0] = 1e6
    torch.save(state, tmp_path / "large.ckpt")
    export_checkpoint(tmp_path / "large.ckpt", tmp_path / "out")
    with pytest.raises(
        UserError, match=r"lm_head\.weight contains values that are not finite in float16; use --dtype bf"
    ):
        export_checkpoint(tmp_path / "large.ckpt", tmp_path / "half", dtype="float16")
    state["state_dict"]["policy.lm_head.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.ckpt")
    with pytest.raises(UserError, match=r"nan\.ckpt.*lm_head\.weight .* not finite"):
        export_checkpoint(tmp_path / "nan.ckpt", tmp_path / "nan")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large.ckpt", "nan.ckpt", "out"]


def test_weights_are_split_into_files_of_the_requested_size(run, tmp_path):
    assert export_command([str(run[1]), str(tmp_path / "out"), "--shard-size", "40KB", "--dtype", "bfloat16"]) == 0
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 1
    assert not (tmp_path / "out" / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, run[0].policy.lm_head.weight.bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": "5"}, "--shard-size 5: use a number and a unit"),
        ({"shard_size": "0GB"}, "--shard-size 0GB"),
        ({"dtype": "int8"}, "--dtype int8: use one of auto, float32"),
        ({"card": False, "license": "mit"}, "--license is written to the model card"),
    ],
)
def test_an_invalid_option_is_reported_before_anything_is_read(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        export_checkpoint(tmp_path / "none.ckpt", tmp_path / "out", **options)


def test_file_permissions_follow_the_umask(run, tmp_path):
    """safetensors writes files that only their owner can read, but a team shares its exports."""
    before = os.umask(0o027)
    try:
        export_checkpoint(run[1], tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o640}


def test_a_full_disk_gives_a_one_line_error_and_leaves_no_files(run, disk):
    (disk / "ballast").write_bytes(b"x" * 550_000)
    with pytest.raises(UserError, match=r"out: cannot be written \(.*No space left"):
        export_checkpoint(run[1], disk / "out")
    assert [p.name for p in disk.iterdir()] == ["ballast"]


def test_the_tokenizer_and_its_chat_template_are_exported(run, tmp_path):
    model, checkpoint = run
    export_checkpoint(checkpoint, tmp_path / "out")
    ours, theirs = model.chat_format.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "e1 w2"}, {"role": "assistant", "content": "look r1 e1"}]
    assert theirs.chat_template == ours.chat_template
    assert theirs.get_vocab() == ours.get_vocab()
    for options in ({"tokenize": False}, {"add_generation_prompt": True}):
        assert theirs.apply_chat_template(messages, **options) == ours.apply_chat_template(messages, **options)
    again = GearModule(Pretrained(str(tmp_path / "out")), teacher=model.teacher_options)
    assert again.chat_format.prompt(messages) == model.chat_format.prompt(messages)


def test_the_command_writes_the_directory_and_prints_how_to_load_it(run, tmp_path, capsys):
    assert export_command([str(run[1]), str(tmp_path / "deep" / "out")]) == 0
    assert f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'deep' / 'out')!r})" in capsys.readouterr().out
    assert (tmp_path / "deep" / "out" / "config.json").is_file()


def test_a_nonempty_folder_is_never_written_to(run, tmp_path):
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    file.write_text("mine too")
    for path in (full, file):
        with pytest.raises(UserError, match="is not an empty directory"):
            export_checkpoint(run[1], path)
    assert [p.name for p in full.iterdir()] == ["notes.txt"]
    assert ((full / "notes.txt").read_text(), file.read_text()) == ("mine", "mine too")
    empty.mkdir()
    export_checkpoint(run[1], empty)
    assert (empty / "model.safetensors").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full"], "something was left behind"


class Dangerous:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def broken(kind: str, path: Path, marker: Path, checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    files, text = state["policy_files"], torch.frombuffer(bytearray(b"{}"), dtype=torch.uint8)
    if kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "other":
        torch.save({"state_dict": state["state_dict"]}, path)
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Dangerous(marker)))
    elif kind == "cut":
        path.write_bytes(checkpoint.read_bytes()[:1000])
    else:
        state |= {
            "danger": {"note": Dangerous(marker)},
            "no config": {"policy_files": {k: v for k, v in files.items() if k != "config.json"}},
            "bad config": {"policy_files": {**files, "config.json": text}},
            "files are a list": {"policy_files": [1]},
            "no weights": {"state_dict": {}},
            "too few weights": {"state_dict": dict(list(state["state_dict"].items())[:3])},
        }[kind]
        torch.save(state, path)


KINDS = ["text", "other", "tensor", "pickle", "cut", "danger"]
INSIDE = ["no config", "bad config", "files are a list", "no weights", "too few weights"]


@pytest.mark.parametrize("kind", KINDS + INSIDE)
def test_a_foreign_checkpoint_is_a_user_error_and_runs_no_code(kind, run, tmp_path):
    path, marker = tmp_path / "broken.ckpt", tmp_path / "marker"
    broken(kind, path, marker, run[1])
    with pytest.raises(UserError, match=r"broken\.ckpt: not a checkpoint of gear_lightning"):
        export_checkpoint(path, tmp_path / "out")
    assert not marker.exists(), "code from the file was executed"
    assert [p.name for p in tmp_path.iterdir()] == ["broken.ckpt"], "something was left behind"
    if kind in ("danger", "pickle"):  # the reason for the check: a plain load executes the code
        torch.load(path, weights_only=False) if kind == "danger" else pickle.loads(path.read_bytes())
        assert marker.exists()


def test_a_missing_checkpoint_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint file"):
        export_checkpoint(tmp_path / "none.ckpt", tmp_path / "out")


def test_code_that_a_checkpoints_config_names_is_not_executed(run, tmp_path):
    """A model directory can name its own Python files, but no code from a checkpoint may be executed."""
    state, marker = torch.load(run[1], weights_only=True), tmp_path / "marker"
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass C: pass\n"
    config = b'{"model_type": "strange", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.C"}}'
    for name, text in (("config.json", config), ("code.py", code.encode()), ("../escaped.txt", b"out")):
        state["policy_files"][name] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    torch.save(state, tmp_path / "strange.ckpt")
    with pytest.raises(UserError, match="not a checkpoint of gear_lightning"):
        export_checkpoint(tmp_path / "strange.ckpt", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["strange.ckpt"]


def names(checkpoint: Path) -> set[str]:
    """Return every name that unpickling the checkpoint would import."""
    found, strings = set(), []
    with zipfile.ZipFile(checkpoint) as archive:
        (inside,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        for code, value, _ in pickletools.genops(archive.read(inside)):
            if isinstance(value, str):
                strings.append(value)
            if code.name == "GLOBAL":
                found.add(value.replace(" ", "."))
            elif code.name == "STACK_GLOBAL":
                found.add(".".join(strings[-2:]))
    return found


def test_checkpoints_contain_only_plain_data_and_tensors(run, tmp_path):
    fit(tmp_path, module(), SaveInTheMiddle(tmp_path / "mid.ckpt"), inner_epochs=2)
    middle = torch.load(tmp_path / "mid.ckpt", weights_only=True)
    (rank,) = middle["RolloutDataModule"]["ranks"]
    assert rank["groups"], "this checkpoint must contain rollouts"
    assert middle["frozen"]
    for path in (run[1], tmp_path / "mid.ckpt"):
        torch.load(path, weights_only=True)
        found = names(path)
        tensors = {"torch._utils._rebuild_tensor_v2", "collections.OrderedDict"}
        assert tensors <= found
        left = {n for n in found - tensors if not (n.startswith("torch.") and n.endswith("Storage"))}
        assert not left, "checkpoints must not refer to code"
