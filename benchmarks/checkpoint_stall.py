"""Time that training waits for a checkpoint: written synchronously, or from a copy in the background.

    python benchmarks/checkpoint_stall.py                    # all in turn; writes results/checkpoint_stall.json
    python benchmarks/checkpoint_stall.py --side background  # one side, in this process

A 135M-parameter Llama (the shape of SmolLM2-135M, random weights) in float32 with Adam, one process: a checkpoint of
1.6 GB, written after every iteration to the disk of the temporary folder (TMPDIR). A side without checkpoints measures
the iteration itself. Sides run in turn as separate processes, so that changes of the machine's speed affect all of them
equally.
"""

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from doctor_check import Talk, Talks
from hardware import cpu_name

from gear_lightning.callbacks.checkpoint import IterationCheckpoint
from gear_lightning.models import FromScratch, PolicySource

WORDS = "gear_lightning.environments.lookup_chain.WORDS"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
RESULTS = Path(__file__).parent / "results"
SIDES = ("none", "synchronous", "background")


@dataclass(frozen=True)
class Shaped(PolicySource):
    """A Llama of SmolLM2-135M's shape with random weights, over the words of the lookup chain."""

    def tokenizer(self) -> Any:
        return FromScratch(WORDS).tokenizer()

    def model(self) -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        words = self.tokenizer()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
            pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, bos_token_id=None,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    def skeleton(self) -> Any:
        import torch

        with torch.device("meta"):
            return self.model()


class Paid(Talk):
    """Gives random rewards, so that no optimizer step is skipped."""

    def reset(self, task: Any, *, seed: int) -> list[dict]:
        self.reward = random.Random(seed).random()
        return super().reset(task, seed=seed)

    def step(self, message: Any) -> Any:
        step = super().step(message)
        step.reward = self.reward
        return step


class Timed(IterationCheckpoint):
    """Records the time that training waits at the end of each iteration."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.waited: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        started = time.perf_counter()
        super().on_train_epoch_end(trainer, pl_module)
        self.waited.append(time.perf_counter() - started)


def one_side(side: str, iterations: int) -> dict[str, Any]:
    """Train, and return seconds per iteration.

    The first iteration, which includes the setup, and the last one, after which the run waits for the file, are
    excluded.
    """
    import lightning as L
    import torch

    from gear_lightning.callbacks.generation import GenerationCallback
    from gear_lightning.credit import Uniform
    from gear_lightning.data import RolloutDataModule
    from gear_lightning.module import GearModule
    from gear_lightning.rollout import Budgets
    from gear_lightning.runs.background import WRITER
    from gear_lightning.runs.checkpoints import CompleteCheckpoints, known_checkpoints

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.starts: list[float] = []
            self.writes: list[float] = []

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.starts.append(time.perf_counter())

        def on_train_batch_end(self, *args: Any) -> None:
            if not WRITER.busy and WRITER.seconds:
                self.writes.append(WRITER.seconds)

    module = GearModule(Shaped(), Uniform(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-6))
    data = RolloutDataModule(Talks(), tasks_per_iteration=2, group_size=2, micro_batch_size=2)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        kept = Timed(dirpath=folder, filename="{epoch}", save_last="link", save_on_train_epoch_end=True,
                     background=side == "background", min_interval=0)  # fmt: skip
        generation = GenerationCallback(environment=Paid, budgets=Budgets(turns=20, tokens=16, context=48))
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_epochs=iterations, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=side != "none", num_sanity_val_steps=0,
            use_distributed_sampler=False, limit_val_batches=0, default_root_dir=folder,
            callbacks=[clock, generation, *([] if side == "none" else [kept])], plugins=[CompleteCheckpoints()],
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        size = max((path.stat().st_size for path, _ in known_checkpoints(Path(folder))), default=0)
    seconds = [after - before for before, after in zip(clock.starts, clock.starts[1:])]  # noqa: B905
    return {
        "iteration": statistics.median(seconds[1:]),
        "wait": statistics.median(kept.waited[1:-1]) if side != "none" else 0.0,
        "write": statistics.median(clock.writes) if clock.writes else None,
        "checkpoint_bytes": size,
        "parameters": sum(p.numel() for p in module.policy.parameters()),
    }


def main() -> None:
    """Run the sides in turn and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=6)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(one_side(options.side, options.iterations)))
        return
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        found = {}
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--iterations", str(options.iterations)]
            done = subprocess.run(
                command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True, check=True
            )
            found[side] = json.loads(done.stdout.splitlines()[-1])
            print(number, side, found[side], flush=True)
        rounds.append(found)

    def median(side: str, name: str) -> float:
        return statistics.median(found[side][name] for found in rounds)

    alone = median("none", "iteration")
    waits = {side: median(side, "wait") for side in SIDES[1:]}
    extra = {side: median(side, "iteration") - alone for side in SIDES[1:]}
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": 1, "system": platform.system()},
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers")},
        "environment": ENVIRONMENT,
        "parameters": rounds[0]["background"]["parameters"],
        "checkpoint_bytes": rounds[0]["background"]["checkpoint_bytes"],
        "seconds": {
            "iteration_without_checkpoints": alone,
            "wait_per_save": waits,
            "longer_iteration_per_save": extra,
            "writing_in_the_background": median("background", "write"),
        },
        "ratio_of_waits": waits["synchronous"] / waits["background"],
        "rounds": rounds,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "checkpoint_stall.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=1))


if __name__ == "__main__":
    main()
