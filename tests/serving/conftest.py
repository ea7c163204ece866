"""A server that speaks vLLM's protocol, and an engine that uses it."""

import pytest
import stand_in_server as stand_in
from deadlines import seconds
from stand_in_server import StandIn
from tiny_runs import source

from gear_lightning.generation import VLLMEngine
from gear_lightning.serving.launch import write_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("served")
    write_model(source().model(), source().tokenizer(), made)
    assert not list(made.glob("*.safetensors"))
    return made


@pytest.fixture
def served(folder):
    """Return the model behind a server, and an engine that uses it."""
    made = StandIn(folder)
    server = stand_in.serve(made)
    yield made, VLLMEngine([f"http://127.0.0.1:{server.server_port}"], seconds=seconds(20))
    server.shutdown()
    server.server_close()
