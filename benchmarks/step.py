"""Time of one optimizer step: GRPO and GEAR here, compared with TRL's GRPOTrainer.

    python benchmarks/step.py              # all sides in turn, several rounds; writes benchmarks/results/step.json
    python benchmarks/step.py --side gear  # one side, in this process

All sides have the same task: a 0.8M-parameter Llama (fp32, one thread), 4 prompts x 8 rollouts x 64 tokens, no end
token in the model's vocabulary, so that all lengths are equal; clip by norm 1, AdamW; one optimizer step per batch of
rollouts. Sides run in turn as separate processes, so that changes of the machine's speed affect all of them equally;
the ratio is the median over rounds.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from hardware import cpu_name

PROMPTS = ["3+4=", "5+6=", "7+8=", "9+2="]
GROUP, LENGTH, STEPS, WARMUP = 8, 64, 14, 4
CHARS = "0123456789+-*/= abcdefghijklmnopqrstuvwxyzABCDEFGH"  # 50 characters
SIDES = ("trl", "grpo", "gear")
# equal for all sides. MALLOC_*: freed memory stays in the process, as `gear-lightning` configures on a CPU
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 31), "MALLOC_MMAP_THRESHOLD_": str(1 << 27),
}  # fmt: skip
RESULTS = Path(__file__).parent / "results"


def build_model():
    """Return the policy, and a tokenizer of single characters whose end token lies outside the model's vocabulary."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(CHARS)} | {"<end>": len(CHARS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="0", unk_token="0")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}={% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(CHARS), hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def reward(text: str) -> float:
    """Return the share of the character 1: cheap, and different for each rollout."""
    return text.count("1") / max(len(text), 1)


def timed(owner: type, method: str, seconds: list[float]) -> None:
    """Record the seconds of each call of a method."""
    original = getattr(owner, method)

    def call(*args, **kwargs):
        start = time.perf_counter()
        result = original(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    setattr(owner, method, call)


def run_trl() -> dict[str, list[float]]:
    """Return seconds per optimizer step of TRL, and of its rollouts."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = build_model()
    times: list[float] = []
    rollout: list[float] = []
    timed(GRPOTrainer, "_generate_and_score_completions", rollout)

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter() - self.start)

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=len(PROMPTS) * GROUP, num_generations=GROUP,
            max_completion_length=LENGTH, max_steps=STEPS, learning_rate=1e-3, use_cpu=True, bf16=False, beta=0.0,
            gradient_checkpointing=False, temperature=1.0, report_to=[], save_strategy="no", logging_steps=1000,
            dataloader_pin_memory=False, max_grad_norm=1.0, disable_tqdm=True, shuffle_dataset=False,
        )  # fmt: skip
        GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [reward(c) for c in completions],
            args=config,
            train_dataset=Dataset.from_list([{"prompt": p} for p in PROMPTS] * STEPS),
            processing_class=tokenizer,
            callbacks=[Clock()],
        ).train()
    return {"step": times, "rollout": rollout}


def run_ours(credit: str) -> dict[str, list[float]]:
    """Return seconds per optimizer step (rollout, reward, teacher, update), of its rollouts and its teacher passes."""
    import lightning as L
    import torch

    from gear_lightning.callbacks.generation import GenerationCallback
    from gear_lightning.credit import GEAR, Uniform
    from gear_lightning.data import RolloutDataModule
    from gear_lightning.environments.base import Environment, Step, Task, TaskSource
    from gear_lightning.models import PolicySource
    from gear_lightning.module import GearModule
    from gear_lightning.rollout import Budgets
    from gear_lightning.teacher import Teacher, TeacherOptions

    class Source(PolicySource):
        def model(self):
            return build_model()[0]

        def tokenizer(self):
            return build_model()[1]

    class Tasks(TaskSource):
        size = len(PROMPTS)

        def __getitem__(self, index):
            return Task(str(index), [{"role": "user", "content": PROMPTS[index][:-1]}], reference="11")

    class Ones(Environment):
        def step(self, message):
            return Step(done=True, reward=reward(message["content"].replace(" ", "")))

    times: list[float] = []
    rollout: list[float] = []
    teacher: list[float] = []
    timed(Teacher, "score", teacher)

    class Clock(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            self.start = time.perf_counter()

        def on_train_epoch_end(self, trainer, pl_module):
            times.append(time.perf_counter() - self.start)
            rollout.append(trainer.datamodule.stats.seconds)

    module = GearModule(
        Source(),
        GEAR() if credit == "gear" else Uniform(),
        teacher=TeacherOptions(template=" {reference}"),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0),
    )
    data = RolloutDataModule(
        Tasks(), tasks_per_iteration=len(PROMPTS), group_size=GROUP, micro_batch_size=len(PROMPTS) * GROUP
    )
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=STEPS, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1.0, use_distributed_sampler=False,
        callbacks=[GenerationCallback(Ones, budgets=Budgets(turns=1, tokens=LENGTH, context=256)), Clock()],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert all(sum(r.action_mask) == LENGTH for g in data.groups for r in g.rollouts)
    return {"step": times, "rollout": rollout, **({"teacher": teacher} if teacher else {})}


def one_side(side: str) -> dict[str, float]:
    """Return the medians of one process, after the warm-up steps."""
    import torch

    torch.set_num_threads(1)
    found = run_trl() if side == "trl" else run_ours(side)
    median = {name: statistics.median(seconds[WARMUP:]) for name, seconds in found.items()}
    return {**median, "update": 2 * median["step"] - sum(median.values())}


def main() -> None:
    """Run the sides in turn and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.side:
        print("RESULT " + json.dumps(one_side(options.side)))
        return
    environment = {**os.environ, **ENVIRONMENT}
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(options.rounds):
        rounds.append({})
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
            if line is None:
                sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
            rounds[-1][side] = json.loads(line.removeprefix("RESULT "))
        print(f"round {number + 1}", {side: round(r["step"], 3) for side, r in rounds[-1].items()}, flush=True)
    median = {side: {key: statistics.median(r[side][key] for r in rounds) for key in rounds[0][side]} for side in SIDES}
    ratios = {side: statistics.median(r[side]["step"] / r["trl"]["step"] for r in rounds) for side in ("grpo", "gear")}
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "threads": 1, "system": platform.system()},
        "versions": {p: version(p) for p in ("torch", "lightning", "transformers", "trl")},
        "environment": ENVIRONMENT,
        "setting": {"prompts": len(PROMPTS), "group": GROUP, "tokens": LENGTH, "parameters": "0.8M", "dtype": "fp32"},
        "median_seconds": median,
        "ratio_to_trl": ratios,
        "rounds": rounds,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "step.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
