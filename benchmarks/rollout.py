"""Rollouts side by side: this project's engines and TRL, and a training step with rollouts ahead of it.

    python benchmarks/rollout.py --vllm .venv-vllm/bin/python   # everything; writes benchmarks/results/rollout.json
    python benchmarks/rollout.py --sides cached,trl --ahead ''  # without vLLM; other parts of the file stay as they are

32 conversations (8 prompts x 4) of SmolLM2-135M-Instruct, 4 turns of 64 sampled tokens with a tool, float32. All sides
(`rollout_sides.py`) load the model once and wait; in each round they play one after another, so that changes of the
machine's speed affect all of them equally. Before each round VLLMEngine's server gets new weights, as in training.

TRL plays with ``GRPOTrainer(tools=...)``, its own batched path for several turns, in its transformers mode. With
``vllm serve`` it cannot play on CPUs (see ``trl_vllm`` in the results). Environments that wait: `environments.py`.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ahead import measure_ahead
from hardware import cpu_name
from rollout_sides import READY, RESULT, SIDES, Setting
from vllm_server import serving, vllm_version

RESULTS = Path(__file__).parent / "results" / "rollout.json"
ROOT = Path(__file__).parent.parent
RATIOS = [("cached", "trl"), ("vllm", "trl"), ("vllm", "cached")]
TRL_VLLM = (
    "not run: TRL gives weights to `vllm serve` over NCCL only, and GRPOTrainer ends at its start on a CPU "
    "(NotImplementedError in VLLMClient.init_communicator)"
)


class Side:
    """A process that plays the rollouts of one side.

    Args:
        name: a key of `SIDES`.
        setting: size of the rollouts.
        url: address of the vLLM server.
        log: file for its messages.
    """

    def __init__(self, name: str, setting: Setting, url: str, log: Path):
        self.name, self.log = name, log
        command = [sys.executable, str(Path(__file__).with_name("rollout_sides.py")), name]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, json.dumps(asdict(setting)), url],
                env={**os.environ, **environment(setting.threads)},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
            )  # fmt: skip

    def ready(self) -> None:
        """Wait until the model is loaded and has been used."""
        self._line(READY)

    def _line(self, start: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(start):
                return line.removeprefix(start)
        sys.exit(f"{self.name} failed:\n{self.log.read_text()[-3000:]}")

    def play(self) -> dict[str, float]:
        """Play the rollouts once, and return what was measured."""
        assert self.process.stdin is not None
        self.process.stdin.write("play\n")
        self.process.stdin.flush()
        return json.loads(self._line(RESULT))

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def environment(threads: int) -> dict[str, str]:
    """Return the environment variables of all sides."""
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def recipe(setting: Setting) -> list[str]:
    """Return the options with which ``gear-lightning serve`` starts the server of the side ``vllm``."""
    return [
        "--config", str(ROOT / "configs" / "smollm2_arithmetic.yaml"), "--trainer.accelerator", "cpu",
        "--trainer.precision", "32-true", "--generation.budgets.context", str(setting.context),
        "--generation.engine", "gear_lightning.generation.VLLMEngine",
    ]  # fmt: skip


def play_rounds(names: list[str], setting: Setting, rounds: int, vllm: Path) -> list[dict[str, dict[str, float]]]:
    """Play all sides in turn, and return what each measured in each round."""
    found: list[dict[str, dict[str, float]]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = ""
        if "vllm" in names:
            url = stack.enter_context(serving(vllm, recipe(setting), folder, **environment(setting.threads)))
        sides = []
        for name in names:
            sides.append(Side(name, setting, url, folder / f"{name}.log"))
            stack.callback(sides[-1].end)
        for side in sides:
            side.ready()
        for number in range(rounds):
            found.append({})
            for side in sides:
                load = os.getloadavg()[0]
                found[-1][side.name] = row = {**side.play(), "load": load}
                row["tokens_per_s"] = setting.sampled / row["seconds"]
            print(f"round {number + 1}", {n: round(r["tokens_per_s"], 1) for n, r in found[-1].items()}, flush=True)
    return found


def low_and_median(values: list[float]) -> dict[str, float]:
    """Return the smallest value and the median."""
    return {"min": min(values), "median": statistics.median(values)}


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return tokens per second of each side, and ratios of two sides within a round."""
    speeds = {side: low_and_median([r[side]["tokens_per_s"] for r in rounds]) for side in rounds[0]}
    ratios = {
        f"{a} / {b}": low_and_median([r[a]["tokens_per_s"] / r[b]["tokens_per_s"] for r in rounds])
        for a, b in RATIOS
        if {a, b} <= rounds[0].keys()
    }
    return {"tokens_per_s": speeds, "ratios": ratios}


def main() -> None:
    """Run the sides in turn, then training with rollouts ahead, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, default=ROOT / ".venv-vllm" / "bin" / "python", help="vLLM's Python")
    parser.add_argument("--sides", default="cached,vllm,trl", help=f"of {', '.join(SIDES)}; '' for none")
    parser.add_argument("--ahead", default="0,1", help="values of generation.ahead to compare; '' for none")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=8, help="of a training run")
    parser.add_argument("--threads", type=int, default=Setting.threads)
    parser.add_argument("--turns", type=int, default=Setting.turns)
    parser.add_argument("--tokens", type=int, default=Setting.tokens)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers and sides end with this process
    names = [name for name in options.sides.split(",") if name]
    if unknown := set(names) - set(SIDES):
        parser.error(f"--sides: {', '.join(sorted(unknown))} is not one of {', '.join(SIDES)}")
    setting = Setting(threads=options.threads, turns=options.turns, tokens=options.tokens)
    made: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {p: version(p) for p in ("torch", "lightning", "transformers", "trl")},
    }
    if options.vllm.exists():
        made["versions"]["vllm"] = vllm_version(options.vllm)
    # a part that is not measured now stays as it was
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    result["environments"] = "environments.json"  # a workload in which environments wait
    if names:
        rounds = play_rounds(names, setting, options.rounds, options.vllm)
        result["rollout"] = {
            "what": "SmolLM2-135M-Instruct, float32, sampled tokens per second of wall clock",
            **made,
            "setting": asdict(setting),
            **summary(rounds),
            "trl_vllm": TRL_VLLM,
            "rounds": rounds,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result["rollout"]["ratios"], indent=1), flush=True)
    if options.ahead:
        values = [int(value) for value in options.ahead.split(",")]
        result["ahead"] = {**made, **measure_ahead(values, options.iterations, options.rounds, options.vllm)}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result["ahead"]["ratios"], indent=1))


if __name__ == "__main__":
    main()
