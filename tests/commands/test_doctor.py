"""``gear-lightning doctor``: the recipe that it reads, its output, the problems that it reports, and its memory."""

import os
import re
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
from chat_templates import CHATML, byte_tokenizer
from tiny_runs import source
from transformers import LlamaConfig

from gear_lightning.commands.doctor import columns, configured_strategy, doctor_command, load_of, setup_of, skeleton_of
from gear_lightning.errors import UserError
from gear_lightning.recipes.checks import Machine, look_at_machine, package_problems, problems
from gear_lightning.recipes.memory import Load
from gear_lightning.recipes.model_shape import model_shape
from gear_lightning.recipes.recipe import configured_gpus, read_recipe

GOOD = {
    "python": "3.11", "torch": "2.13.0", "lightning": "2.6.6", "pytorch-lightning": "2.6.6", "transformers": "5.23.0",
    "deepspeed": "0.19.8", "peft": None, "CUDA": "12.8", "NCCL": "2.27",
}  # fmt: skip
GPU = Machine(GOOD, ("H100 (80 GiB)",), (79.1,), True)
RECIPE = "configs/quickstart.yaml"


@pytest.fixture(autouse=True)
def _in_the_checkout(repository, monkeypatch):
    monkeypatch.chdir(repository)


def recipe(*args: str):
    return read_recipe(["--config", RECIPE, *args])


def found(machine: Machine = GPU, gpus: int = 2, *args: str) -> list[str]:
    """Return the problems of the quickstart with these options."""
    mine = recipe(*args)
    return problems(mine, machine, mine.module.source.skeleton(), gpus, configured_strategy(mine.trainer)[0])


def column(text: str, strategy: str) -> dict[str, str]:
    """Return a strategy's column of the printed table, by row name; the first of rows with the same name."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match("[GM]iB per", line))
    names = [n.rstrip("*") for n in re.split(r"\s{2,}", lines[start].strip())]
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[start + 1 :]]
    cells = {}
    for row in rows:
        if len(row) == len(names):
            cells.setdefault(row[0], row[names.index(strategy)])
    return cells


# -- reading a recipe ------------------------------------------------------------------------------------------------


def test_the_load_of_the_quickstart():
    """8 tasks x 8 rollouts on two GPUs: 32 rollouts each, and 200 of the 400 evaluation rollouts."""
    mine = recipe()
    two = load_of(mine, 2)
    assert two == Load(
        rows=32, length=128, sampled=48, teacher_length=256, micro_batches=1, rollouts=200, prefill=200 * 80
    )
    one = load_of(recipe("--data.micro_batch_size=16", "--data.val_tasks=null", "--model.credit=Uniform"), 1)
    assert (one.rows, one.micro_batches, one.rollouts, one.teacher_length) == (16, 4, 64, 0)


@pytest.mark.parametrize(
    ("args", "state", "foreach"),
    [
        ([], 8, True),
        (["--trainer.precision=bf16-true"], 4, True),
        (["--trainer.precision=bf16-mixed"], 8, True),
        (["--model.optimizer=AdamW", "--model.optimizer.fused=true"], 8, False),
        (["--model.optimizer=SGD", "--model.optimizer.lr=0.1"], 0, True),
        (["--model.optimizer=SGD", "--model.optimizer.lr=0.1", "--model.optimizer.momentum=0.9"], 4, True),
    ],
)
def test_the_size_of_the_optimizer_state_is_measured(args, state, foreach):
    setup = setup_of(recipe(*args), 1000, {}, True)
    assert (setup.state_bytes, setup.foreach) == (state, foreach)
    assert not setup_of(recipe(*args), 1000, {}, False).foreach, "on a CPU, parameters are processed one by one"
    # DeepSpeed's optimizer updates float32 weights
    assert setup.float32_state_bytes == (8 if "bf16-true" in str(args) else state)


@pytest.mark.parametrize(
    ("args", "teacher", "averaged"),
    [
        ([], 1000, True),
        (["--model.teacher.weights=frozen"], 1000, False),
        (["--model.teacher.weights=live"], 0, False),
        (["--config=configs/credit/grpo.yaml"], 0, True),
        (["--config=configs/credit/opsd.yaml"], 1000, False),  # only the distillation needs a teacher
        (["--model.credit=Uniform"], 0, True),
        (["--config=configs/model/lora.yaml"], 1000, True),
        (["--config=configs/model/lora.yaml", "--model.teacher.weights=frozen"], 0, False),
    ],
)
def test_a_teacher_without_own_weights_needs_no_memory(args, teacher, averaged):
    setup = setup_of(recipe(*args), 1000, {}, True)
    assert (setup.teacher_parameters, setup.averaged) == (teacher, averaged)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("auto", "ddp"), ("ddp", "ddp"), ("ddp_spawn", "ddp"), ("fsdp", "fsdp"),
        ("deepspeed", "zero2"), ("deepspeed_stage_1", "zero1"), ("deepspeed_stage_3", "zero3"),
        ("deepspeed_stage_3_offload", "zero3_offload"),
        ({"class_path": "x.DeepSpeedStrategy", "init_args": {"stage": 3}}, "zero3"),
        ({"class_path": "x.ZeRO", "init_args": {"stage": 3, "offload_optimizer": True}}, "zero3"),
        ({"class_path": "x.ZeRO", "init_args": {"stage": 3, "offload_parameters": True}}, "zero3_offload"),
        ({"class_path": "x.ZeRO", "init_args": {"stage": 1}}, "zero1"),
        ({"class_path": "gear_lightning.strategies.FSDP2", "init_args": {"replicas": 2}}, "fsdp"),
        ({"class_path": "x.ModelParallelStrategy", "init_args": None}, "fsdp"),
        ({"class_path": "x.Other", "init_args": {}}, None),
    ],
)  # fmt: skip
def test_the_strategy_of_a_recipe_is_recognized(strategy, expected):
    assert configured_strategy({"strategy": strategy})[0] == expected


@pytest.mark.parametrize(
    ("devices", "nodes", "expected"), [(4, 1, 4), ("4", 2, 8), ([0, 1], 1, 2), ("0,1,2", 1, 3), ("auto", 1, 1)]
)
def test_the_number_of_gpus_of_a_recipe(devices, nodes, expected):
    assert configured_gpus({"devices": devices, "num_nodes": nodes, "accelerator": "cpu"}) == expected


# -- output ----------------------------------------------------------------------------------------------------------


def test_the_table_shows_the_estimates(capsys):
    assert doctor_command(["--config", RECIPE, "--gpus", "4", "--gpu-memory", "0.4", "--trainer.accelerator=gpu"]) == 0
    said = capsys.readouterr().out
    mine = recipe()
    shape = model_shape(mine.module.source.skeleton())
    setup = setup_of(mine, shape.trainable, {}, True)
    for strategy in ("ddp", "fsdp", "zero1", "zero3"):
        numbers = columns(shape, 4, load_of(mine, 4), setup, "ddp", None)[strategy]
        cells = column(said, strategy)
        assert cells["PEAK"] == f"{numbers['total'] / 2**20:.1f}", "all values are below 1 GiB, so the unit is MiB"
        assert cells["update: activations"] == f"{numbers['activations'] / 2**20:.1f}"
        assert cells["in 0.4 GiB"] == ("fits" if numbers["total"] < 0.36 * 2**30 else "no")
    assert {column(said, s)["in 0.4 GiB"] for s in ("ddp", "zero1")} == {"fits", "no"}, "both verdicts must occur"
    assert "ddp*" in said
    assert re.search(r"lightning \d.*pytorch-lightning \d.*transformers \d", said)


def test_options_work_as_in_fit_and_later_ones_win(capsys):
    grpo = ["--config", RECIPE, "--config", "configs/credit/grpo.yaml"]
    assert doctor_command([*grpo, "--model.policy.layers=3", "--gpus=1"]) == 0
    said = capsys.readouterr().out
    assert "teacher none" in said
    assert "3 layers" in said
    assert "teacher  " not in said


def test_options_of_a_strategy_apply_only_to_it():
    mine = recipe(*FSDP, "--trainer.strategy.init_args.replicas=2", "--generation.weights_dtype=bfloat16")
    shape = model_shape(skeleton_of(mine))
    chosen, options = configured_strategy(mine.trainer)
    setup, load = setup_of(mine, shape.trainable, options, True), load_of(mine, 4)
    assert (setup.replicas, setup.generation_bytes, setup.bucket_view) == (2, 2, False)
    found = columns(shape, 4, load, setup, chosen, None)
    assert found["fsdp"]["weights"] == 2 * found["zero3"]["weights"] == 2 * shape.parameters
    assert found["ddp"]["buckets"] == 0, "as in configs/strategy/ddp.yaml"
    zero = recipe("--config=configs/strategy/zero2.yaml", "--trainer.strategy.init_args.bucket_size=1000")
    assert setup_of(zero, 1, configured_strategy(zero.trainer)[1], True).bucket == 1000


def test_weights_are_streamed_if_a_full_copy_does_not_fit():
    mine = recipe(*FSDP)
    shape = model_shape(skeleton_of(mine))
    setup, load = setup_of(mine, shape.trainable, {}, True), load_of(mine, 2)
    whole, streamed = (columns(shape, 2, load, setup, "fsdp", room)["fsdp"]["generation"] for room in (None, 0.001))
    assert whole == 4 * shape.parameters
    assert streamed == 4 * (shape.root + 2 * shape.layer)


def test_adapters_and_a_parked_teacher_in_the_table(capsys):
    lora = ["--config", RECIPE, "--config", "configs/model/lora.yaml", "--gpus=1"]
    assert doctor_command(lora) == 0
    assert re.search(r"1\.3M parameters, 0\.2M of them trained", capsys.readouterr().out)
    assert doctor_command(["--config", RECIPE, "--gpus=1", "--model.teacher.park=true"]) == 0
    said = capsys.readouterr().out
    assert column(said, "ddp")["update: parked teacher"] == "4.1"
    assert "\nteacher  " not in said
    assert column(said, "ddp")["CPU memory: offloaded, parked"] == "4.1"
    assert "<0" not in said, "every number of a small recipe must be readable"


def test_doctor_writes_no_files(tmp_path, capsys):
    assert doctor_command(["--config", RECIPE, f"--trainer.default_root_dir={tmp_path / 'run'}"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_doctor_of_an_8b_model_needs_little_memory(tmp_path):
    """32 GB of weights in float32; the directory holds only a config and a tokenizer."""
    LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    source().tokenizer().save_pretrained(tmp_path)
    done = subprocess.run(
        [
            sys.executable, "-m", "gear_lightning", "doctor", "--config", RECIPE, "--gpus=8", "--gpu-memory=80",
            "--model.policy=gear_lightning.models.Pretrained", f"--model.policy.path={tmp_path}",
            "--model.policy.attn_implementation=sdpa",
        ],
        env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 1.5e9
    assert "8,030.3M parameters" in done.stdout
    assert column(done.stdout, "ddp")["weights"] == f"{4 * 8_030_261_248 / 2**30:.2f}"
    assert column(done.stdout, "ddp")["in 80 GiB"] == "no"


# -- problems --------------------------------------------------------------------------------------------------------


FSDP, ZERO2 = ["--config=configs/strategy/fsdp.yaml"], ["--config=configs/strategy/zero2.yaml"]
LORA = ["--config=configs/model/lora.yaml"]


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload"])
def test_recipes_with_the_shipped_strategies_have_no_problems(name):
    args = [f"--config=configs/strategy/{name}.yaml"]
    assert found(GPU, 2, *args) == []
    assert configured_strategy(recipe(*args).trainer)[0] == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pytorch-lightning": "2.6.5"}, "lightning 2.6.6 and pytorch-lightning 2.6.5 differ"),
        ({"lightning": "2.6.3", "pytorch-lightning": "2.6.3"}, "lightning 2.6.3 is a malicious upload"),
        ({"lightning": "2.6.2", "pytorch-lightning": "2.6.2"}, "lightning 2.6.2 is a malicious upload"),
        ({"deepspeed": None}, "deepspeed is not installed"),
        ({"deepspeed": "0.16.9"}, "deepspeed 0.16.9: zero1 to zero3 are tested with 0.19"),
        ({"deepspeed": "0.190.1"}, "deepspeed 0.190.1"),
    ],
)
def test_problems_of_installed_versions_are_reported(change, message):
    assert package_problems(GOOD) == []
    assert any(message in p for p in package_problems({**GOOD, **change}))


CPU_ONLY = Machine({**GOOD, "CUDA": None})


@pytest.mark.parametrize(
    ("machine", "gpus", "args", "message"),
    [
        (CPU_ONLY, 1, ["--trainer.accelerator=gpu"], "accelerator=gpu, but this torch is built for CPUs only"),
        (Machine(GOOD), 1, ["--trainer.accelerator=gpu"], "no CUDA device is found"),
        (replace(GPU, bf16=False), 1, ["--trainer.accelerator=gpu", "--trainer.precision=bf16-true"], "no bfloat16"),
        (GPU, 3, [], "tasks_per_iteration=8 is not divisible by 3 processes"),
        (GPU, 2, ["--generation.budgets.context=512"], "context=512 is more than the 256 positions"),
        (GPU, 2, ["--generation.budgets.tokens=128"], "tokens=128 leaves no space for a prompt in context=128"),
        (GPU, 2, ["--trainer.strategy=deepspeed_stage_3_offload"], "deepspeed_stage_3_offload is Lightning's own"),
        (GPU, 2, ["--trainer.strategy=fsdp"], "not supported; use --config configs/strategy/fsdp.yaml"),
        (GPU, 2, [], "strategy=auto keeps gradients twice: use --config configs/strategy/ddp.yaml"),
        (GPU, 4, [*FSDP, "--trainer.strategy.replicas=3"], "replicas=3 does not divide 4 processes"),
        (GPU, 4, [*FSDP, "--trainer.strategy.replicas=0"], "replicas=0: must be at least 1"),
        (GPU, 4, [*FSDP, "--trainer.strategy.replicas=4"], "replicas=4 is the number of processes: nothing is sharded"),
        (GPU, 4, [*FSDP, "--trainer.precision=16-mixed"], "precision=16-mixed does not go with trainer.strategy"),
        (GPU, 2, [*ZERO2, "--trainer.strategy.stage=4"], "stage=4: ZeRO has stages 1, 2 and 3"),
        (GPU, 2, [*ZERO2, "--trainer.strategy.offload_parameters=true"], "offload_parameters needs stage 3, not 2"),
        (GPU, 2, [*ZERO2, "--trainer.gradient_clip_algorithm=value"], "ZeRO clips gradients only by norm"),
        (GPU, 2, ["--trainer.accumulate_grad_batches=3"], "accumulate_grad_batches follows from data.micro_batch_size"),
        (GPU, 2, [*LORA, "--model.lora.targets=[nothing_proj]"], "nothing_proj matches no linear layer"),
    ],
)
def test_problems_of_recipes_are_reported(machine, gpus, args, message):
    assert any(message in p for p in found(machine, gpus, *args)), found(machine, gpus, *args)


def test_a_model_without_listed_layers_cannot_be_sharded():
    mine = recipe()
    model = mine.module.source.skeleton()
    assert model._no_split_modules
    model._no_split_modules = None
    assert any("_no_split_modules" in p for p in problems(mine, GPU, model, 2, "ddp"))


def test_problems_do_not_change_the_exit_status(capsys):
    assert doctor_command(["--config", RECIPE, "--gpus", "3", "--gpu-memory", "0.01"]) == 0
    said = capsys.readouterr().out
    assert "Problems and advice:" in said
    assert "is not divisible by 3 processes" in said
    assert "the recipe's strategy, ddp, needs more than 0.01 GiB" in said


def test_all_problems_are_reported_for_a_recipe_without_estimates(capsys):
    lora = ["--config", RECIPE, *LORA, "--model.lora.targets=[nothing_proj]", "--trainer.accumulate_grad_batches=3"]
    assert doctor_command([*lora, "--gpus", "2"]) == 2
    said = capsys.readouterr().out
    assert "lora.targets: nothing_proj matches no linear layer of LlamaForCausalLM; it has down_proj" in said
    assert "accumulate_grad_batches follows" in said
    assert doctor_command(["--config", RECIPE, *FSDP, "--trainer.strategy.replicas=3", "--gpus", "4"]) == 2
    assert "replicas=3 does not divide 4 processes" in capsys.readouterr().out


def test_look_at_machine_describes_this_machine():
    import torch

    seen = look_at_machine()
    assert seen.versions["torch"] == torch.__version__
    assert len(seen.gpus) == torch.cuda.device_count() * torch.cuda.is_available()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--config is missing"),
        (["--config", RECIPE, "--gpus", "0"], "--gpus=0: must be at least 1"),
        (["--config", RECIPE, "--gpus", "many"], "argument --gpus: invalid int value: 'many'"),
        (["--config", RECIPE, "--gpu-memory", "-1"], "--gpu-memory=-1: must be above 0"),
        (["--config", RECIPE, "--trainer.precision", "64-true"], "trainer.precision=64-true"),
        (["--config", RECIPE, "--model.policy=gear_lightning.models.Pretrained", "--model.policy.path=./none"], "none"),
        (["--config", RECIPE, "--data.group_size", "1"], "group_size=1"),
        (["--config", RECIPE, *LORA, "--model.teacher.park=true"], "park does nothing with model.lora"),
    ],
)
def test_invalid_options_give_one_error(args, message):
    with pytest.raises(UserError, match=re.escape(message)):
        doctor_command(args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "none.yaml"], "none.yaml"),
        (["--config", RECIPE, "--model.creditt=GEAR"], "creditt"),
    ],
)
def test_errors_of_the_parser_give_exit_status_2(args, message, capsys):
    with pytest.raises(SystemExit) as end:
        doctor_command(args)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_directory_without_a_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    byte_tokenizer(CHATML).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a causal language model"):
        doctor_command(
            ["--config", RECIPE, "--model.policy=gear_lightning.models.Pretrained", f"--model.policy.path={tmp_path}"]
        )
