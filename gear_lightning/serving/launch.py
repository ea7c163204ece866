"""The command line and the environment of a vLLM server for a recipe."""

import json
import os
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .client import MODEL
from .transfer import Transfer

FOLDER = Path(__file__).parent  # holds gear_vllm.py, gear_broadcast.py
CPU_KV_GIB = 2.0
BLOCK = 32  # tokens that share a place in the cache; vLLM's default of 128 on CPUs caches no short prompt


@dataclass(frozen=True)
class Launch:
    """A vLLM server.

    Attributes:
        python: the Python of vLLM's environment.
        model: directory with the model's configuration and tokenizer.
        dtype: dtype of the weights.
        context: longest context, tokens.
        logprobs_mode: see `gear_lightning.generation.vllm_engine.logprobs_mode`.
        transfer: how it gets new weights.
        host: address to listen at.
        port: port to listen at.
        cpu: whether it runs on CPUs.
        kv_gib: memory of the key-value cache; None: vLLM's default.
        options: further options of vLLM, as on a command line.
    """

    python: Path
    model: Path
    dtype: str
    context: int
    logprobs_mode: str
    transfer: Transfer
    host: str = "127.0.0.1"
    port: int = 8765
    cpu: bool = False
    kv_gib: float | None = None
    options: str = ""

    def command(self) -> list[str]:
        """Return the command that starts the server."""
        kv = CPU_KV_GIB if self.kv_gib is None and self.cpu else self.kv_gib
        given = {
            "model": self.model,
            "served-model-name": MODEL,
            "host": self.host,
            "port": self.port,
            "dtype": self.dtype,
            "max-model-len": self.context,
            "logprobs-mode": self.logprobs_mode,
            "load-format": "dummy",  # the run sends the weights
            "generation-config": "vllm",  # no sampling options of the model's own
            "worker-extension-cls": "gear_vllm.GearWorker",
            "weight-transfer-config": json.dumps({"backend": self.transfer}),
            **({"block-size": BLOCK} if self.cpu else {}),
            **({} if kv is None else {"kv-cache-memory-bytes": int(kv * 2**30)}),
        }
        # on CPUs, vLLM 0.32 ends with an error if a prompt with a seed is computed in parts
        on_cpu = ["--enforce-eager", "--no-enable-chunked-prefill"] if self.cpu else []
        flags = ["--enable-prompt-tokens-details", *on_cpu]
        named = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        # not `vllm serve`, which does not start in the package for CPUs
        start = [str(self.python), "-m", "vllm.entrypoints.openai.api_server"]
        return [*start, *named, *flags, *shlex.split(self.options)]

    def environment(self) -> dict[str, str]:
        """Return the environment variables of the server."""
        path = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
        cpu = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if self.cpu else {}
        own = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": path}
        return {**cpu, **os.environ, **own}


def served_dtype(precision: Any, weights_dtype: str | None) -> str:
    """Return the name of the dtype in which a policy samples.

    Args:
        precision: ``trainer.precision``.
        weights_dtype: ``generation.weights_dtype``.
    """
    kinds = {"bf16": "bfloat16", "16": "float16"}
    computes = next((dtype for start, dtype in kinds.items() if str(precision or "").startswith(start)), "float32")
    return weights_dtype or computes


def write_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write what a server needs to build a model: its configuration and tokenizer, no weights.

    Several servers may write and read the same folder: its files are replaced at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as made:
        model.config.save_pretrained(made)
        tokenizer.save_pretrained(made)
        for file in Path(made).iterdir():
            os.replace(file, folder / file.name)
