"""Several processes share a server: it gets the weights once, under every strategy, and its death ends all of them."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import stand_in_python
import stand_in_server
from checkout import ROOT, SUPPORT
from deadlines import seconds, until
from distributed_runs import Opinions, environment, finish, fit_command, members, start, strategy
from short_runs import train

from gear_lightning.generation import VLLMEngine
from gear_lightning.loss import ClippedSurrogate
from gear_lightning.serving.launch import write_model
from gear_lightning.serving.own import OwnServers
from gear_lightning.serving.transfer import Transfer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("served")
    write_model(Opinions().model(), Opinions().tokenizer(), made)
    return made


def sampled(run: Path, name: str, url: str, transfer: Transfer) -> dict:
    return train(run, name, engine=VLLMEngine([url], transfer=transfer, seconds=seconds(60)), weights="gather")


@pytest.mark.parametrize(
    ("name", "transfer"),
    [("ddp", "file"), ("fsdp", "file"), ("zero3", "file"), ("ddp", "broadcast"), ("fsdp", "broadcast")],
)
def test_processes_share_a_server_that_gets_the_weights_once(pair, tmp_path, folder, name, transfer):
    made = stand_in_server.StandIn(folder, transfer=transfer)
    server = stand_in_server.serve(made)
    try:
        first, second = pair.run(sampled, tmp_path, name, f"http://127.0.0.1:{server.server_port}", transfer)
    finally:
        server.shutdown()
        server.server_close()
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]["train/sampler_gap_max"] < 1e-3
    assert first["tokens"] > 0
    assert second["tokens"] > 0
    updates = [body["update_info"] for path, body in made.seen if path == "/update_weights"]
    assert len(updates) == 3, "for the first rollouts, and after each of two optimizer steps"
    assert len({info.get("path", info.get("port")) for info in updates}) == 3
    salts = {body["cache_salt"] for path, body in made.seen if path == "/v1/completions" and "seed" in body}
    assert len(salts) == 3


def learned_ahead(run: Path, url: str) -> dict:
    objective = {"objective": ClippedSurrogate(sampler_cap=2.0)}
    engine = VLLMEngine([url], seconds=seconds(60))
    return train(run, "ddp", engine=engine, weights="gather", ahead=2, max_epochs=3, model=objective)


def test_processes_sample_ahead_while_they_are_updated(pair, tmp_path, folder):
    made = stand_in_server.StandIn(folder)
    server = stand_in_server.serve(made)
    try:
        first, second = pair.run(learned_ahead, tmp_path, f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert first["metrics"] == second["metrics"]
    assert 1 <= first["metrics"]["train/staleness"] <= 2
    assert first["metrics"]["train/sampler_ratio"] > 0


def started(run: Path, python: Path) -> dict:
    own = OwnServers(python=python, seconds=seconds(120))
    return train(run, "ddp", engine=VLLMEngine(start=own, transfer="broadcast", seconds=seconds(60)))


def test_processes_of_a_machine_share_a_server_that_one_of_them_starts(pair, tmp_path):
    first, second = pair.run(started, tmp_path, stand_in_python.executable(tmp_path))
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]["train/sampler_gap_max"] < 1e-3
    (log,) = tmp_path.rglob("vllm/*/*.log")
    pids = re.findall(r"pids: (\d+) (\d+)", log.read_text())
    assert len(pids) == 1, "one server"
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids[0]), "it ends with the run")


def test_all_processes_end_with_an_error_line_when_the_server_dies_and_the_run_resumes(tmp_path, folder):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", tmp_path / "log.txt"
    engine = [
        "--generation.engine", "gear_lightning.generation.VLLMEngine", "--generation.engine.servers", f"[{url}]"
    ]  # fmt: skip

    def serve() -> subprocess.Popen:
        command = [sys.executable, str(SUPPORT / "stand_in_server.py"), str(folder), str(port)]
        made = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
        assert made.stdout is not None
        assert made.stdout.readline() == "ready\n"
        return made

    server = serve()
    try:
        command = fit_command(tmp_path / "run", *strategy("ddp"), *engine)
        process = start(command, log)
        metrics = tmp_path / "run" / "metrics.csv"
        until(lambda: metrics.exists() or process.poll() is not None, "the first iteration", limit=200)
        os.kill(server.pid, signal.SIGKILL)
        server.wait(seconds(30))
        assert finish(process, log) == 2, log.read_text()[-3000:]
        until(lambda: not members(process.pid), "all processes end")
        said = log.read_text()
        assert 1 <= said.count("gear-lightning: error: the vLLM server") <= 2, "each process finds it itself"
        assert "Traceback" not in said
        server = serve()
        again = start([*command, "--ckpt_path", "last"], tmp_path / "again.txt")
        assert finish(again, tmp_path / "again.txt") == 0
        steps = [line.split(",")[0] for line in metrics.read_text().splitlines()[1:]]
        assert len(steps) == len(set(steps)), "no iteration twice"
    finally:
        server.kill()
        server.wait(seconds(30))
