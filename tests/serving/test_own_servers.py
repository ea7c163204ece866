"""Servers that a run starts itself: they answer, use the GPUs that are left, and end with the run in any case."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import stand_in_python
import torch
from checkout import ROOT, SUPPORT
from deadlines import seconds, until
from tiny_runs import data, generation, module, trainer

from gear_lightning.errors import UserError
from gear_lightning.generation import VLLMEngine
from gear_lightning.serving.client import ServerError
from gear_lightning.serving.own import GUARD, OwnServers, visible
from gear_lightning.serving.pool import share


@pytest.fixture
def own(tmp_path):
    return OwnServers(python=stand_in_python.executable(tmp_path), seconds=seconds(60))


def log(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("vllm/*/server*.log")))


def pids(folder: Path) -> list[int]:
    return [int(pid) for line in re.findall(r"pids: (.*)", log(folder)) for pid in line.split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone(folder: Path, count: int) -> bool:
    found = pids(folder)
    return len(found) == count and not any(map(alive, found))


def fit(folder: Path, engine: VLLMEngine, *callbacks, **options):
    runs = trainer(folder, generation(engine=engine), *callbacks, max_epochs=2)
    runs.fit(module(**options), datamodule=data())
    return runs


@pytest.mark.parametrize("transfer", ["file", "broadcast"])
def test_a_run_samples_with_its_own_server_and_ends_it(own, tmp_path, transfer):
    engine = VLLMEngine(start=own, transfer=transfer, seconds=seconds(60))
    runs = fit(tmp_path, engine)
    assert runs.global_step == 2
    assert runs.callback_metrics["train/sampler_gap_max"] < 1e-3
    assert gone(tmp_path, 2), "the server and its helper ended with the run"
    assert "--dtype float32" in log(tmp_path)
    runs = fit(tmp_path, engine)
    assert runs.global_step == 2, "another run of the same process starts another server"
    assert gone(tmp_path, 4)


def test_a_server_that_dies_at_its_start_is_reported_with_the_end_of_its_log(own, tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN", "broken")
    with pytest.raises(ServerError, match=r"ended while it started; the end of its log .*\n(.*\n)*ValueError: no room"):
        fit(tmp_path, VLLMEngine(start=own))
    until(lambda: gone(tmp_path, 2), "the helper ends")


def test_a_server_that_does_not_answer_is_reported_and_ended(own, tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN", "silent")
    hasty = OwnServers(python=own.python, seconds=seconds(1))
    with pytest.raises(ServerError, match=r"does not answer after [\d.]+ s \(generation\.engine\.start\.seconds\)"):
        fit(tmp_path, VLLMEngine(start=hasty))
    until(lambda: gone(tmp_path, 2), "the server ends")


def test_a_server_that_dies_later_ends_the_run_with_its_log(own, tmp_path):
    import lightning as L

    class Kill(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            os.kill(pids(tmp_path)[0], signal.SIGKILL)

    with pytest.raises(UserError, match=r"cannot be reached .* look at .*server0\.log, and resume with --ckpt"):
        fit(tmp_path, VLLMEngine(start=own, seconds=seconds(60)), Kill())
    until(lambda: gone(tmp_path, 2), "what the server has left behind ends")


RUN = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from gear_lightning.serving.launch import Launch
from gear_lightning.serving.own import OwnServers
own = OwnServers(python=Path(sys.argv[1]), seconds=float(sys.argv[4]))
launch = Launch(own.python, Path("none"), "float32", 64, "raw_logprobs", "file", cpu=True)
import gear_lightning.serving.own as module
module.OwnServer.wait = lambda self, seconds: None
made = own.start(launch, [[]], Path(sys.argv[3]) / "vllm" / "host", 60.0)
print("started", flush=True)
sys.stdin.read()
if sys.argv[5] == "error":
    raise ValueError("stop")
"""


@pytest.mark.parametrize(
    ("end", "fault"),
    [
        ("exit", "silent"),
        ("error", "silent"),
        ("SIGTERM", "silent"),
        ("SIGKILL", "stubborn"),
        ("SIGKILL to the group", "silent"),
    ],
)
def test_the_server_ends_with_the_process_in_any_case(own, tmp_path, end, fault):
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(own.python), str(SUPPORT), str(tmp_path), str(seconds(60)), end],
        cwd=ROOT, env={**os.environ, "STAND_IN": fault}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "started\n"
    until(lambda: len(pids(tmp_path)) == 2, "the server runs")
    assert all(map(alive, pids(tmp_path)))
    if end == "SIGTERM":
        os.kill(process.pid, signal.SIGTERM)
    elif end == "SIGKILL":
        os.kill(process.pid, signal.SIGKILL)
    elif end == "SIGKILL to the group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.stdin.close()
    process.wait(seconds(60))
    until(lambda: gone(tmp_path, 2), "the server and its helper end", limit=30)


def test_a_guard_that_is_killed_takes_the_server_with_it(tmp_path):
    guard = subprocess.Popen(
        [sys.executable, "-I", str(GUARD), str(os.getpid()), "5", sys.executable, "-c",
         "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert guard.stdout is not None
    pid = int(guard.stdout.readline())
    guard.kill()
    guard.wait(seconds(20))
    until(lambda: not alive(pid), "the server ends")


def test_gpus_that_the_run_trains_on_are_refused():
    seen = [f"GPU-{i}" for i in range(8)]
    assert OwnServers(gpus=[6, 7]).shares(seen, {"GPU-0"}) == [[6], [7]]
    assert OwnServers(gpus=[4, 5, 6, 7], gpus_per_server=2).shares(seen, {"GPU-0"}) == [[4, 5], [6, 7]]
    assert OwnServers().shares([], set()) == [[]], "one on CPUs"
    with pytest.raises(UserError, match=r"gpus=\[6, 7\]: the run trains on GPU 7"):
        OwnServers(gpus=[6, 7]).shares(seen, {"GPU-7"})
    with pytest.raises(UserError, match=r"there is no GPU 8; this process sees 8"):
        OwnServers(gpus=[8]).shares(seen, set())
    with pytest.raises(UserError, match="the run trains on GPUs; name other GPUs"):
        OwnServers().shares(seen, {"GPU-0"})
    with pytest.raises(UserError, match=r"gpus_per_server=2 does not divide the 3 GPUs"):
        OwnServers(gpus=[1, 2, 3], gpus_per_server=2)
    with pytest.raises(UserError, match=r"give each GPU once"):
        OwnServers(gpus=[1, 1])


def test_each_server_sees_its_gpus_alone(tmp_path, own, monkeypatch):
    from gear_lightning.serving.launch import Launch

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv("STAND_IN", "silent")
    monkeypatch.setattr("gear_lightning.serving.own.OwnServer.wait", lambda self, limit: None)
    assert visible(2) == "6"
    launch = Launch(own.python, tmp_path, "bfloat16", 64, "raw_logprobs", "broadcast")
    two = OwnServers(python=own.python, gpus=[0, 1, 2, 3], gpus_per_server=2, vllm="--seed 3")
    made = two.start(launch, two.shares([f"GPU-{i}" for i in range(4)], set()), tmp_path / "vllm" / "host", 60.0)
    until(lambda: len(pids(tmp_path)) == 4, "both run")
    options = re.findall("options: (.*)", log(tmp_path))
    assert ["4,5" in options[0], "6,7" in options[1]] == [True, True]
    assert all("--tensor-parallel-size 2" in text and "--seed 3" in text for text in options)
    assert len({server.server.url for server in made}) == 2
    for server in made:
        server.end()
    assert gone(tmp_path, 4)


def test_processes_and_servers_are_assigned_in_turn():
    assert [share(["a", "b"], rank, 3) for rank in range(3)] == [(["a"], True), (["b"], True), (["a"], False)]
    assert share(["a", "b", "c"], 1, 2) == (["b"], True)
    assert share(["a", "b", "c"], 0, 2) == (["a", "c"], True)


def test_options_that_exclude_each_other_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"servers and \.start exclude each other"):
        VLLMEngine(["http://127.0.0.1:9"], start=OwnServers())
    with pytest.raises(UserError, match=r"start\.seconds=-[\d.]+: must be above 0"):
        OwnServers(seconds=-seconds(1))
    with pytest.raises(UserError, match=r"kv_gib=-1: must be above 0"):
        OwnServers(kv_gib=-1)
    with pytest.raises(UserError, match="No closing quotation"):
        OwnServers(vllm="'")
    with pytest.raises(UserError, match=r"start\.python=none/python: there is no such Python; install vLLM"):
        fit(tmp_path, VLLMEngine(start=OwnServers(python=Path("none/python"))))
    assert torch.cuda.is_available() or not list(tmp_path.glob("vllm/*/server*"))


def test_serve_is_refused_for_a_recipe_that_starts_its_servers(own, command):
    engine = [
        "--generation.engine",
        "gear_lightning.generation.VLLMEngine",
        "--generation.engine.start",
        "{gpus: [6, 7]}",
    ]
    status, _, err = command("serve", "--config", "configs/quickstart.yaml", "--python", own.python, *engine)
    assert status == 2
    assert "the run starts its servers itself (generation.engine.start)" in err
