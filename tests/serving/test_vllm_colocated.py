"""`ColocatedVLLM`: a vLLM in the training process, in the environment of ``make vllm-colocated``."""

import csv
import importlib.util
import pickle
import subprocess

import pytest
import torch
from checkout import ROOT
from deadlines import seconds
from tiny_runs import generation, module, source

from gear_lightning.errors import UserError
from gear_lightning.generation import ColocatedVLLM, Sampling

PYTHON = ROOT / ".venv-colocated" / "bin" / "python"
RUN = ["-m", "gear_lightning", "fit", "--generation.engine", "gear_lightning.generation.ColocatedVLLM"]
SMOLLM2 = [
    "--config", "configs/smollm2_arithmetic.yaml", "--data.val_limit", "4", "--data.tasks_per_iteration", "2",
    "--data.group_size", "4", "--data.micro_batch_size", "4", "--trainer.precision", "32-true",
]  # fmt: skip
QUICKSTART = [
    "--config", "configs/quickstart.yaml", "--warm_start.steps", "20", "--data.val_limit", "8",
    "--data.tasks_per_iteration", "4",
]  # fmt: skip


def fit(folder, recipe, *options):
    arguments = [*RUN, *recipe, "--generation.engine.kv_gib", "0.5", "--trainer.default_root_dir", str(folder)]
    done = subprocess.run(
        [str(PYTHON), *arguments, "--trainer.max_epochs", "3", *options],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds(1200), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    rows = [row for row in csv.DictReader((folder / "metrics.csv").open()) if row.get("train/sampler_gap_max")]
    assert len(rows) == 3
    assert all(float(row["train/sampler_gap_max"]) <= 1e-3 for row in rows)
    assert any(float(row["perf/prefix_hit_rate"]) > 0 for row in rows)
    return done.stdout


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(seconds(1500))
def test_a_shared_head_is_renewed(tmp_path):
    fit(tmp_path, SMOLLM2)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(seconds(1500))
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_each_process_has_its_own(tmp_path, strategy):
    options = ["--config", f"configs/strategy/{strategy}.yaml", "--trainer.devices", "2"]
    fit(tmp_path, [*QUICKSTART, *options], "--generation.weights", "gather")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is in this environment")
def test_without_vllm_the_run_is_refused_with_what_to_do(tmp_path):
    callback = generation(engine=ColocatedVLLM())

    class Run:
        default_root_dir, precision = str(tmp_path), "32-true"

    callback.prepare_engine(module(), Run())  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"vLLM cannot be imported .* make vllm-colocated makes, or use VLLMEngine"):
        callback.engine.begin(source().model().eval(), Sampling(), {5})


def test_what_it_cannot_sample_is_refused():
    with pytest.raises(UserError, match=r"kv_gib=0: must be above 0"):
        ColocatedVLLM(kv_gib=0)
    engine = pickle.loads(pickle.dumps(ColocatedVLLM(1.5, {"max_num_seqs": 8})))
    assert (engine.kv_gib, engine.options) == (1.5, {"max_num_seqs": 8})
    with pytest.raises(UserError, match="needs a GenerationCallback"):
        engine.begin(source().model().eval(), Sampling(), {5})
    with pytest.raises(UserError, match=r"temperature=0\.7 together with top_p=0\.9"):
        engine.begin(source().model().eval(), Sampling(temperature=0.7, top_p=0.9), {5})
    assert not torch.distributed.is_initialized()
