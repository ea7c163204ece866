"""Whole RL iterations of real model shapes with random weights on a GPU: seconds, tokens/s, peaks, estimates.

    python benchmarks/iteration.py                        # all cases that fit; writes benchmarks/results/iteration.json
    python benchmarks/iteration.py --case "0.6B, full"    # one
    python benchmarks/iteration.py --case "tiny, full" --accelerator cpu   # test of the script itself, without a GPU

Each case runs `gear-lightning fit` in its own process for three iterations; the results are those of the last one.
Rollouts fill the context that the recipe allows, as `doctor` assumes.
"""

import argparse
import csv
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from doctor_check import ENVIRONMENT, RESULTS, machine

from gear_lightning.models import FromScratch, PolicySource

WORDS = "gear_lightning.environments.lookup_chain.WORDS"
SHAPES = {  # of Qwen3-0.6B and Qwen3-4B, from their config.json
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    "0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072},
    "4B": {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728},
}
BASE = [
    "--model.policy=iteration.Shaped", "--model.teacher.template= <ref> {reference}",
    "--data.train_tasks=doctor_check.Talks", "--generation.environment=doctor_check.Talk",
    "--data.tasks_per_iteration=2", "--data.group_size=8", "--data.micro_batch_size=4",
    "--generation.budgets.context=1024", "--generation.budgets.tokens=1000", "--generation.budgets.turns=500",
    "--trainer.max_epochs=3", "--trainer.devices=1", "--trainer.enable_checkpointing=false",
    "--trainer.limit_val_batches=0", "--trainer.gradient_clip_val=1.0", "--recorder.keep_last=1",
]  # fmt: skip
MIXED, TRUE = ["--trainer.precision=bf16-mixed"], ["--trainer.precision=bf16-true"]
SAVING = ["--model.activation_checkpointing=true"]
LORA = ["--model.lora.rank=16"]


def strategy(name: str, **options: Any) -> list[str]:
    """Return the options of fit that select a strategy."""
    return [
        "--trainer.strategy=" + json.dumps({"class_path": f"gear_lightning.strategies.{name}", "init_args": options})
    ]


CASES = {
    "tiny, full": ["--model.policy.shape=tiny"],
    "0.6B, full": ["--model.policy.shape=0.6B", *MIXED],
    "0.6B, full, fsdp": ["--model.policy.shape=0.6B", *MIXED, *strategy("FSDP2")],
    "0.6B, full, zero2": ["--model.policy.shape=0.6B", *MIXED, *strategy("ZeRO", stage=2)],
    "0.6B, full, zero3": ["--model.policy.shape=0.6B", *MIXED, *strategy("ZeRO", stage=3)],
    "0.6B, LoRA": ["--model.policy.shape=0.6B", *MIXED, *LORA],
    "4B, LoRA": ["--model.policy.shape=4B", *TRUE, *SAVING, *LORA],
    "4B, full": ["--model.policy.shape=4B", *TRUE, *SAVING],
}


@dataclass(frozen=True)
class Shaped(PolicySource):
    """A Qwen3 of a known shape with random weights, over the words of the lookup chain.

    Args:
        shape: a key of SHAPES.
    """

    shape: str = "0.6B"

    def tokenizer(self) -> Any:
        return FromScratch(WORDS).tokenizer()

    def _make(self) -> Any:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        sizes = {
            "num_key_value_heads": 2 if self.shape == "tiny" else 8,
            "head_dim": 32 if self.shape == "tiny" else 128,  # vLLM computes with 32 and more
        }
        vocabulary = 1024 if self.shape == "tiny" else 151936
        tokenizer = self.tokenizer()
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        config = Qwen3Config(
            **SHAPES[self.shape], **sizes, **ids, vocab_size=vocabulary, tie_word_embeddings=True,
            max_position_embeddings=4096,
        )  # fmt: skip
        return Qwen3ForCausalLM(config)

    def model(self) -> Any:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._make()

    def skeleton(self) -> Any:
        import torch

        with torch.device("meta"):
            return self._make()


def one_case(case: str, accelerator: str, further: Sequence[str] = ()) -> dict[str, Any]:
    """Train, and return the last iteration's metrics and doctor's estimate of the peaks in GiB.

    Args:
        case: a key of CASES.
        accelerator: ``gpu`` or ``cpu``.
        further: further options of ``gear-lightning fit``.
    """
    from gear_lightning.commands.doctor import estimate_of, read_recipe

    options = [*BASE, *CASES[case], f"--trainer.accelerator={accelerator}", *further]
    here = str(Path(__file__).parent)
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": here}
    with tempfile.TemporaryDirectory() as run:
        command = [sys.executable, "-m", "gear_lightning", "fit", *options, f"--trainer.default_root_dir={run}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        with (Path(run) / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row.get("time/update_s")]
    wanted = ("time/", "perf/", "memory/", "train/sampler_gap", "train/response_tokens")
    result: dict[str, Any] = {k: float(v) for k, v in rows[-1].items() if v and k.startswith(wanted)}
    _, estimated = estimate_of(read_recipe(options), 1, accelerator == "gpu")
    result["estimated"] = {k: v / 2**30 for k, v in estimated.items() if k in ("update", "rollout", "total")}
    if "memory/update_gib" in result:
        peak = max(result["memory/update_gib"], result["memory/rollout_gib"])
        result["estimated / measured"] = result["estimated"]["total"] / peak
    return result


def main() -> None:
    """Run the cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--accelerator", choices=("gpu", "cpu"), default="gpu")
    options = parser.parse_args()
    cases = [options.case] if options.case else [c for c in CASES if not c.startswith("tiny")]
    results = {}
    for case in cases:
        results[case] = one_case(case, options.accelerator)
        print(case, json.dumps(results[case], indent=1), flush=True)
    if options.case:
        return
    packages = ("torch", "lightning", "transformers", "deepspeed", "peft")
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": {p: version(p) for p in packages},
        "cases": results,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "iteration.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
