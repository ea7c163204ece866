"""Peak memory of real training compared with the estimate of ``gear-lightning doctor``.

    python benchmarks/doctor_check.py               # all cases in turn; writes benchmarks/results/doctor_check.json
    python benchmarks/doctor_check.py --case gear   # one case, in this process

A 50M-parameter Llama is trained for two iterations. Rollouts fill the context that the recipe allows, as doctor
assumes. Each case runs in its own process, or in two (gloo) with a sharding strategy. On a GPU the peak is
torch.cuda.max_memory_allocated; on a CPU it is the peak of the process's resident memory minus the resident memory
before training, including imports; with two processes, that of rank 0.
"""

import argparse
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from hardware import cpu_name

from gear_lightning.environments.base import Environment, Step, Task, TaskSource

RESULTS = Path(__file__).parent / "results"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
    # freed memory is returned to the system at once, so that the peak is that of used memory
    "MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_TRIM_THRESHOLD_": str(1 << 18), "MALLOC_ARENA_MAX": "1",
}  # fmt: skip
BASE = [
    "--model.policy=gear_lightning.models.FromScratch",
    "--model.policy.words=gear_lightning.environments.lookup_chain.WORDS",
    "--model.policy.hidden_size=512", "--model.policy.layers=12", "--model.policy.heads=8",
    "--model.policy.max_length=256", "--model.teacher.template= <ref> {reference}",
    "--data.train_tasks=doctor_check.Talks", "--generation.environment=doctor_check.Talk",
    "--data.tasks_per_iteration=2", "--data.group_size=4", "--data.micro_batch_size=8",
    "--generation.budgets.context=256", "--generation.budgets.tokens=240", "--generation.budgets.turns=200",
    "--trainer.max_epochs=2",
]  # fmt: skip
LORA = "--model.lora.rank=16"
FSDP = '--trainer.strategy={"class_path": "gear_lightning.strategies.FSDP2"}'
ZERO = (
    '--trainer.strategy={"class_path": "gear_lightning.strategies.ZeRO", '
    '"init_args": {"stage": %d, "bucket_size": 5000000}}'
)
CASES = {
    "gear": [],
    "gear, 2 micro-batches": ["--data.micro_batch_size=4"],
    "gear, bf16-mixed": ["--trainer.precision=bf16-mixed"],
    "gear, bf16-true": ["--trainer.precision=bf16-true"],
    "gear, 2 micro-batches, bf16-true": ["--data.micro_batch_size=4", "--trainer.precision=bf16-true"],
    "grpo, sgd": ["--model.credit=Uniform", "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.01"],
    "grpo, sgd, many rollouts": [
        "--model.credit=Uniform",
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.lr=0.01",
        "--data.group_size=12",
        "--data.micro_batch_size=1",
    ],  # the rollout phase is the larger one
    "gear, checkpointing": ["--model.activation_checkpointing=true"],
    "gear, checkpointing, bf16-mixed": ["--model.activation_checkpointing=true", "--trainer.precision=bf16-mixed"],
    "gear, lora": [LORA],
    "gear, lora, bf16-mixed": [LORA, "--trainer.precision=bf16-mixed"],
    "gear, lora, bf16-true": [LORA, "--trainer.precision=bf16-true"],
    "gear, lora, checkpointing": [LORA, "--model.activation_checkpointing=true"],
    "gear, fsdp x 2": [FSDP],
    "gear, fsdp x 2, 2 micro-batches": [FSDP, "--data.micro_batch_size=2"],
    "gear, fsdp x 2, bf16-mixed": [FSDP, "--trainer.precision=bf16-mixed"],
    "gear, fsdp x 2, 2 micro-batches, bf16-true": [
        FSDP,
        "--data.micro_batch_size=2",
        "--trainer.precision=bf16-true",
    ],
    "gear, zero1 x 2, bf16-true": [ZERO % 1, "--trainer.precision=bf16-true"],
    "gear, zero2 x 2": [ZERO % 2],
    "gear, zero2 x 2, bf16-true": [ZERO % 2, "--trainer.precision=bf16-true"],
    "gear, zero3 x 2": [ZERO % 3],
    "gear, zero3 x 2, bf16-mixed": [ZERO % 3, "--trainer.precision=bf16-mixed"],
    "gear, zero3 x 2, bf16-true": [ZERO % 3, "--trainer.precision=bf16-true"],
}


class Talks(TaskSource):
    """Two short prompts."""

    size = 2

    def __getitem__(self, index: int) -> Task:
        return Task(str(index), [{"role": "user", "content": "e1 w2 e3"}], reference="e1 w2")


class Talk(Environment):
    """Answers every turn of the policy until a budget ends the rollout."""

    def step(self, message) -> Step:
        return Step([{"role": "user", "content": "e1"}], reward=0.01 * len(message.get("content", "")))


def memory(name: str) -> int:
    """Return a value of this process from /proc/self/status, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def one_case(case: str) -> dict:
    """Train, and return the measured and the estimated peak in bytes."""
    import lightning as L
    import torch

    from gear_lightning.commands.doctor import estimate_of, read_recipe

    on_gpu = torch.cuda.is_available()
    recipe = read_recipe([*BASE, *CASES[case]])
    world = 2 if " x 2" in case else 1
    shape, estimated = estimate_of(recipe, world, on_gpu)
    strategy = recipe.trainer["strategy"]
    if world > 1:
        import deepspeed  # noqa: F401  (its import does not count as training)

        from gear_lightning import strategies

        strategy = getattr(strategies, strategy["class_path"].rpartition(".")[2])(**strategy.get("init_args") or {})
    # load now what libraries load at their first use: it does not count as training
    small = recipe.module.source.__class__(recipe.module.source.words, hidden_size=32, layers=1, heads=1)
    loss = small.model()(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits.sum()
    loss.backward()
    del loss
    trainer = L.Trainer(
        accelerator="gpu" if on_gpu else "cpu", devices=world, strategy=strategy, max_epochs=2,
        precision=recipe.trainer["precision"],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0, gradient_clip_val=1.0,
        check_val_every_n_epoch=1000,  # before validation Lightning drops the gradients
        callbacks=[recipe.generation],
    )  # fmt: skip
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    trainer.fit(recipe.module, datamodule=recipe.data)
    measured = torch.cuda.max_memory_allocated() if on_gpu else memory("VmHWM") - before
    lengths = [len(r.tokens) for g in recipe.data.groups for r in g.rollouts]
    return {
        "measured": measured,
        "estimated": estimated["total"],
        "ratio": estimated["total"] / measured,
        "parameters": shape.parameters,
        "mean_length": sum(lengths) / len(lengths),
        "longest": max(lengths),
        "components": {k: v for k, v in estimated.items() if v},
    }


def machine() -> dict:
    """Return a description of the machine."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"gpu": gpu, "cpu": cpu_name(), "threads": int(ENVIRONMENT["OMP_NUM_THREADS"]), "system": platform.system()}


def main() -> None:
    """Run the cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES)
    options = parser.parse_args()
    if options.case:
        found = one_case(options.case)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("RESULT " + json.dumps(found))
        return
    results = {}
    for case in CASES:
        command = [sys.executable, __file__, "--case", case]
        done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False)
        line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
        if line is None:
            sys.exit(f"{case} failed:\n{done.stderr[-3000:]}")
        results[case] = found = json.loads(line.removeprefix("RESULT "))
        mib = {k: round(found[k] / 2**20) for k in ("measured", "estimated")}
        print(f"{case}: {mib} MiB, estimated / measured = {found['ratio']:.2f}", flush=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": {p: version(p) for p in ("torch", "lightning", "transformers")},
        "environment": ENVIRONMENT,
        "cases": results,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "doctor_check.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
