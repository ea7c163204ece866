"""A stand-in for the Python of vLLM's environment: understands the command line of a server, and serves.

The environment variable ``STAND_IN`` names a fault: ``broken`` (ends with an error), ``silent`` (never answers) or
``stubborn`` (ignores SIGTERM).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path


def executable(folder: Path) -> Path:
    """Write an executable file that stands in for vLLM's Python, and return its path."""
    made = folder / "vllm-python"
    made.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).absolute()}" "$@"\n')
    made.chmod(0o755)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", dest="module")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--port", type=int)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--logprobs-mode")
    parser.add_argument("--weight-transfer-config", type=json.loads)
    given, rest = parser.parse_known_args()
    assert given.module == "vllm.entrypoints.openai.api_server"
    fault = os.environ.get("STAND_IN", "")
    print("options:", *rest, "GPUs:", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
    if fault == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])  # as vLLM's workers
    print("pids:", os.getpid(), helper.pid, flush=True)
    if fault == "broken":
        sys.exit("ValueError: no room for the cache")
    if fault != "silent":
        import stand_in_server
        import torch

        torch.set_num_threads(1)
        made = stand_in_server.StandIn(
            given.model, given.max_model_len, given.logprobs_mode, given.weight_transfer_config["backend"]
        )
        stand_in_server.serve(made, given.port)
    threading.Event().wait()


if __name__ == "__main__":
    main()
