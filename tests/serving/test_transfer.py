"""`VLLMEngine` with ``transfer: broadcast`` and a server that speaks vLLM's protocol: no file, no hanging update."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import stand_in_server as stand_in
import torch
from checkout import ROOT, SUPPORT
from deadlines import seconds
from failed_updates import check_failed_update
from stand_in_server import StandIn
from tiny_runs import data, generation, module, source, trainer

from gear_lightning.errors import UserError
from gear_lightning.generation import Sampling, VLLMEngine
from gear_lightning.learning.lora import LoRA
from gear_lightning.serving.client import ServerError
from gear_lightning.serving.launch import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("served")
    write_model(source().model(), source().tokenizer(), made)
    return made


@pytest.fixture
def served(folder):
    """Return the model behind a server, and an engine that sends it weights."""
    made = StandIn(folder, transfer="broadcast")
    server = stand_in.serve(made)
    url = f"http://127.0.0.1:{server.server_port}"
    yield made, VLLMEngine([url], transfer="broadcast", seconds=seconds(20))
    server.shutdown()
    server.server_close()


@pytest.fixture
def policy():
    torch.manual_seed(3)
    return source().model().eval()


def files() -> set[Path]:
    return set(Path("/dev/shm").glob("gear-weights-*"))


def test_the_server_gets_the_weights_without_a_file(served, policy):
    made, engine = served
    before = files()
    for _ in range(2):
        with torch.no_grad():
            policy.get_output_embeddings().weight.mul_(1.1)
        engine.begin(policy, Sampling(), {5})
        assert engine.fingerprint(None) == made.version
        engine.end()
        for name, tensor in made.model.state_dict().items():
            torch.testing.assert_close(tensor, policy.state_dict()[name], atol=0, rtol=0)
    updates = [body["update_info"] for path, body in made.seen if path == "/update_weights"]
    assert len(updates) == 2
    assert all("path" not in info for info in updates)
    assert files() <= before


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["all weights", "LoRA"])
def test_training_samples_with_the_newest_weights(served, tmp_path, lora):
    made, engine = served
    runs = trainer(tmp_path, generation(engine=engine), max_epochs=2)
    runs.fit(module(lora=lora), datamodule=data())
    assert runs.global_step == 2
    assert len([path for path, _ in made.seen if path == "/update_weights"]) >= 2
    assert runs.callback_metrics["train/sampler_gap_max"] < 1e-3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (stand_in.FAILED_UPDATE, "refuses /update_weights: 500: layers do not match"),
        (stand_in.HALF_UPDATE, r"refuses /update_weights: 500: .* does not fit"),
        (stand_in.STALE_HEAD, "does not compute what the policy computes"),
    ],
)
def test_an_update_that_fails_is_reported_with_the_servers_reason(served, policy, fault, message):
    check_failed_update(*served, policy, fault, message)


def test_a_server_that_hangs_in_an_update_is_reported(served, policy):
    made, engine = served
    made.fault = stand_in.HANGING_UPDATE
    hasty = VLLMEngine(engine.servers, transfer="broadcast", seconds=seconds(1))
    with pytest.raises(ServerError, match=r"has not answered /update_weights within [\d.]+ s"):
        hasty.begin(policy, Sampling(), {5})


def test_a_server_that_dies_in_an_update_is_reported(folder, policy):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, str(SUPPORT / "stand_in_server.py"), str(folder), str(port)]
    server = subprocess.Popen(
        [*command, stand_in.DEADLY_UPDATE, "broadcast"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        engine = VLLMEngine([f"http://127.0.0.1:{port}"], transfer="broadcast", seconds=seconds(60))
        with pytest.raises(ServerError, match=r"cannot be reached .*start it with `gear-lightning serve"):
            engine.begin(policy, Sampling(), {5})
    finally:
        server.kill()
        server.wait(seconds(20))


def test_a_server_that_was_started_for_another_transfer_is_refused(served, policy):
    made, engine = served
    with pytest.raises(ServerError, match=r"for weights by broadcast, and generation\.engine\.transfer=file; start it"):
        VLLMEngine(engine.servers).begin(policy, Sampling(), {5})
    made.transfer = "file"
    with pytest.raises(ServerError, match=r"for weights by file, and generation\.engine\.transfer=broadcast"):
        engine.begin(policy, Sampling(), {5})
    assert [path for path, _ in made.seen] == [], "the server's weights are not touched"


def test_a_folder_without_files_is_refused():
    with pytest.raises(UserError, match="folder does nothing with transfer=broadcast"):
        VLLMEngine(transfer="broadcast", folder="/dev/shm")
