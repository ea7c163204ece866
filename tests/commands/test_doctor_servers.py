"""``gear-lightning doctor`` with a recipe that samples with vLLM servers: what they and the training hold."""

import re
from dataclasses import replace

import pytest

from gear_lightning.commands.doctor import doctor_command, load_of
from gear_lightning.recipes.model_shape import ModelShape
from gear_lightning.recipes.recipe import read_recipe
from gear_lightning.recipes.serving_memory import Served

GIB = 1 << 30
SMOLLM2 = ModelShape(
    parameters=134_515_008, trainable=134_515_008, embedding=28_311_552, head=0, layers=30, layer=3_540_096,
    largest=28_311_552, hidden=576, intermediate=1536, gated=True, heads=9, kv_heads=3, head_dim=64, qk_norm=False,
    vocab=49152,
)  # fmt: skip
SERVED = Served(("http://n4:8765", "http://n4:8766"), SMOLLM2, "bfloat16", context=250, together=101, block=32)


@pytest.fixture(autouse=True)
def _in_the_checkout(repository, monkeypatch):
    monkeypatch.chdir(repository)


def test_a_server_holds_weights_and_whole_blocks_of_each_conversation():
    assert SERVED.weights == 2 * 134_515_008
    assert SERVED.token == 2 * 30 * 3 * 64 * 2
    assert SERVED.conversation == 256 * SERVED.token
    assert SERVED.each == 51
    assert SERVED.cache == 51 * SERVED.conversation
    assert SERVED.tokens(GIB / 4) == 11_648, "what vLLM 0.32 reports for --kv-cache-memory-bytes 268435456"
    single = replace(SERVED, dtype="float32")
    assert (single.weights, single.token) == (2 * SERVED.weights, 2 * SERVED.token)
    adapted = replace(SMOLLM2, parameters=135_000_000, trainable=484_992)
    assert replace(SERVED, shape=adapted).weights == SERVED.weights, "adapters are merged"


def test_lines_about_servers_name_places_and_the_size_of_the_cache():
    text = SERVED.describe("8 GPUs", "GPU", 80, 5 * GIB)
    assert "2 vLLM servers (2 on n4), besides the 8 GPUs that train" in text
    assert "22.5 KiB of keys and values per token, 5.6 MiB for a conversation of 250 tokens" in text
    assert "51 conversations at once need 0.28 GiB: gear-lightning serve --kv-gib 0.3" in text
    holds = int(0.9 * 80 * GIB - SERVED.weights) // SERVED.conversation
    assert f"a GPU of 80 GiB holds weights and {holds:,} conversations" in text
    assert "5.00 GiB + 0.53 GiB = 5.53 GiB" in text
    assert "--tensor-parallel-size 2" in SERVED.describe("8 GPUs", "GPU", 0.25, None)
    assert all(len(line) <= 130 for line in text.splitlines())


def test_training_holds_no_keys_and_values_if_servers_sample(capsys):
    args = ["--config", "configs/quickstart.yaml", "--gpus", "2"]
    assert doctor_command(args) == 0
    alone = capsys.readouterr().out
    servers = "--generation.engine.servers=[http://127.0.0.1:9,http://localhost:9]"
    engine = ["--generation.engine", "gear_lightning.generation.VLLMEngine", servers]
    assert doctor_command([*args, *engine]) == 0
    served = capsys.readouterr().out
    for row in ("rollout: KV cache", "rollout: prefill, sampling"):
        assert row in alone
        assert row not in served
    assert "vLLM server" not in alone
    assert "2 vLLM servers (1 on 127.0.0.1, 1 on localhost), besides the 2 processes that train" in served
    wanted = load_of(read_recipe(["--config", "configs/quickstart.yaml", *engine]), 2).rollouts
    assert re.search(rf"\b{wanted:,} conversations at once", served), "two processes, two servers"
