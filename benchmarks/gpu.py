"""Measurements on one GPU: engines, the transfer of weights, whole steps (see `gpu.sh`).

Shapes are those of Qwen3 with random weights, built from a configuration; nothing is downloaded. Each part runs in a
process of its own, one after another, and a part for which no time is left is reported as such.

- ``cached``, ``vllm``: an engine samples turns of equal length, in bfloat16 (float32 on a CPU).
- ``weights_s``: seconds from the start of a rollout phase with new weights until the server has them and the check of
  its log-probs has passed; ``fingerprint_s`` and ``file_s`` are parts of it that need no server.
- ``step``: `iteration.py`, with a context of 512 tokens: seconds of rollouts and update, and their peaks.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from doctor_check import machine
from vllm_server import serving, vllm_version

HERE = Path(__file__).parent
RESULT = "RESULT "
KEEP = 30.0  # seconds left for the end of the last part
COLUMNS = {
    "tokens_per_s": "tokens/s", "weights_s": "weights s", "fingerprint_s": "hash s", "file_s": "file s",
    "rollout_s": "rollout s", "update_s": "update s", "peak_gib": "peak GiB",
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What is measured of a shape.

    Attributes:
        case: of `iteration.CASES`.
        prompts: different prompts, each for four conversations.
        prompt: tokens of a prompt.
        tokens: sampled tokens of a conversation.
        context: of the rollouts of whole steps.
    """

    case: str
    prompts: int = 16
    prompt: int = 256
    tokens: int = 256
    context: int = 512


SIZES = {
    "0.6B": Size("0.6B, full"),
    "4B": Size("4B, full"),
    "tiny": Size("tiny, full", prompts=2, prompt=32, tokens=8, context=48),
}


def build(shape: str) -> Any:
    """Return a model with random weights on the GPU in bfloat16; the shape ``tiny`` on the CPU in float32."""
    import torch
    from iteration import Shaped

    if shape == "tiny":
        return Shaped(shape).model().eval()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        return Shaped(shape)._make().eval()


def sample(engine: Any, model: Any, size: Size, tokens: int) -> tuple[float, float]:
    """Sample a turn of each conversation, and return the seconds of ``begin`` and of the turns."""
    import numpy as np
    from torch import cuda

    from gear_lightning.generation.engine import Sampling, TurnRequest

    ids = np.random.Generator(np.random.Philox(0)).integers(0, 1000, (size.prompts, size.prompt)).tolist()
    started = time.perf_counter()
    engine.begin(model, Sampling(), set())  # no token ends a turn
    begun = time.perf_counter()
    for key in range(4 * size.prompts):
        engine.submit(TurnRequest(key, ids[key // 4], tokens, (key,)))
    found = []
    while len(found) < 4 * size.prompts:
        found += engine.poll()
    if cuda.is_available():
        cuda.synchronize()
    ended = time.perf_counter()
    engine.end()
    assert {len(turn.ids) for turn in found} == {tokens}
    return begun - started, ended - begun


def measure_engine(shape: str, url: str) -> dict[str, float]:
    """Return what one engine does: `CachedEngine`, or with an address `VLLMEngine`."""
    import torch

    from gear_lightning.distributed.sharding import fingerprint
    from gear_lightning.generation import CachedEngine, VLLMEngine
    from gear_lightning.serving.client import weights_file
    from gear_lightning.serving.weights import served_weights

    size, model = SIZES[shape], build(shape)
    engine: Any = VLLMEngine(servers=[url]) if url else CachedEngine()
    found: dict[str, float] = {}
    sample(engine, model, size, 2)  # warm
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)  # as after an optimizer step
    begin, seconds = sample(engine, model, size, size.tokens)
    found["tokens_per_s"] = 4 * size.prompts * size.tokens / seconds
    if url:
        found["weights_s"] = begin
        started = time.perf_counter()
        fingerprint(model)
        found["fingerprint_s"] = time.perf_counter() - started
        started = time.perf_counter()
        with weights_file(served_weights(model), engine.folder):
            found["file_s"] = time.perf_counter() - started
    elif torch.cuda.is_available():
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def measure_step(shape: str) -> dict[str, Any]:
    """Return the seconds of the phases of an iteration, and the peak memory."""
    from iteration import one_case

    size = SIZES[shape]
    budgets = [f"--generation.budgets.context={size.context}", f"--generation.budgets.tokens={size.context - 24}"]
    row = one_case(size.case, "cpu" if shape == "tiny" else "gpu", budgets)
    if "failed" in row:
        return row
    found = {"rollout_s": row["time/rollout_s"], "update_s": row["time/update_s"]}
    peaks = [row[name] for name in ("memory/rollout_gib", "memory/update_gib") if name in row]
    return {**found, **({"peak_gib": max(peaks)} if peaks else {}), "all": row}


def run_part(part: str, shape: str, url: str, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own, and return its results, or why there are none."""
    command = [sys.executable, __file__, "--part", part, "--shape", shape, "--url", url]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said, errors = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        return {"failed": f"not finished within the {seconds:.0f} s that were left"}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.wait()
    line = next((x for x in said.splitlines() if x.startswith(RESULT)), None)
    if line is None:
        return {"failed": (errors.strip().splitlines() or ["no message"])[-1]}
    return json.loads(line.removeprefix(RESULT))


def run_vllm(shape: str, python: Path, deadline: float) -> dict[str, Any]:
    """Start a vLLM server for a shape, and measure `VLLMEngine` with it."""
    size, tiny = SIZES[shape], shape == "tiny"
    with tempfile.TemporaryDirectory() as name:
        recipe = Path(name) / "recipe.yaml"
        recipe.write_text(
            yaml.safe_dump(
                {
                    "trainer": {
                        "accelerator": "cpu" if tiny else "gpu",
                        "precision": "32-true" if tiny else "bf16-true",
                    },
                    "model": {"policy": {"class_path": "iteration.Shaped", "init_args": {"shape": shape}}},
                    "data": {"train_tasks": {"class_path": "doctor_check.Talks"}},
                    "generation": {
                        "engine": {"class_path": "gear_lightning.generation.VLLMEngine"},
                        "environment": "doctor_check.Talk",
                        "budgets": {"tokens": size.tokens, "context": size.prompt + size.tokens + 64},
                    },
                }
            )
        )
        options = ["--config", str(recipe), "--kv-gib", "0.5" if tiny else "12"]
        if not tiny:
            options += ["--vllm", "--gpu-memory-utilization 0.6"]
        left = deadline - time.monotonic()
        try:
            with serving(python, options, Path(name), limit=left, PYTHONPATH=str(HERE)) as url:
                return run_part("engine", shape, url, deadline - time.monotonic())
        except SystemExit as error:
            return {"failed": str(error.code)[-1000:]}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as lines of text."""
    width = max(map(len, results)) + 2
    lines = [" " * width + "".join(f"{title:>12}" for title in COLUMNS.values())]
    for name, row in results.items():
        cells = "".join(f"{row[c]:>12.4g}" if c in row else f"{'-':>12}" for c in COLUMNS)
        lines.append(name.ljust(width) + ("  " + row["failed"].splitlines()[-1] if "failed" in row else cells))
    return "\n".join(lines)


def main() -> None:
    """Run the parts in turn, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU: test of the script itself")
    parser.add_argument("--vllm", type=Path, help="the Python of vLLM's environment")
    parser.add_argument("--seconds", type=float, default=585.0, help="limit of all parts together")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    parser.add_argument("--part", choices=("engine", "step"), help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=SIZES, help=argparse.SUPPRESS)
    parser.add_argument("--url", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        found = measure_step(options.shape) if options.part == "step" else measure_engine(options.shape, options.url)
        print(RESULT + json.dumps(found))
        return
    if not options.tiny:
        import torch

        if not torch.cuda.is_available():
            sys.exit("gpu.sh: there is no GPU; --tiny tests the script on a CPU")
    if options.vllm and not options.vllm.exists():
        sys.exit(f"gpu.sh: --vllm {options.vllm}: there is no such Python")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a server ends with this process
    os.environ.setdefault("OMP_NUM_THREADS", "1" if options.tiny else "8")
    deadline, results = time.monotonic() + options.seconds - KEEP, dict[str, dict[str, Any]]()
    for shape in ["tiny"] if options.tiny else ["0.6B", "4B"]:
        for part in ("cached", "step", *(["vllm"] if options.vllm else [])):
            left = deadline - time.monotonic()
            if left <= 0:
                found: dict[str, Any] = {"failed": "not run: no time was left"}
            elif part == "vllm":
                found = run_vllm(shape, options.vllm.absolute(), deadline)
            else:
                found = run_part("step" if part == "step" else "engine", shape, "", left)
            results[f"{shape} {part}"] = found
            print(f"{shape} {part}: done", file=sys.stderr, flush=True)
    print(table(results))
    packages = ("torch", "lightning", "transformers")
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": {p: version(p) for p in packages} | ({"vllm": vllm_version(options.vllm)} if options.vllm else {}),
        "sizes": {s: vars(SIZES[s]) for s in sorted({name.split()[0] for name in results})},
        "results": results,
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if any("failed" in row for row in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
