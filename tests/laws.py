"""Pieces of the tests of laws: a policy with opinions, an environment that talks, a run that is watched."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from tiny import WORDS, data, generation, trainer
from torch import Tensor

from gear_lightning.batch import RolloutBatch, RolloutRow
from gear_lightning.environments.base import Environment, Step, Task, TaskSource
from gear_lightning.environments.lookup_chain import ENTITIES, QUERIES
from gear_lightning.models import FromScratch
from gear_lightning.module import GearModule


@dataclass(frozen=True)
class Sharp(FromScratch):
    """A tiny policy far from uniform, so that temperature, top-p and new weights show in its log-probs; it ends about
    every tenth token, and never says ``silent``."""

    words: str = WORDS
    hidden_size: int = 32
    layers: int = 2
    heads: int = 2
    max_length: int = 256
    silent: str | None = None

    def model(self) -> Any:
        model = super().model()
        head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4 if p.dim() == 2 else 1)
            head.weight.copy_(4 * model.lm_head.weight)
            head.bias.zero_()
            head.bias[model.config.eos_token_id] = 3.0
            if self.silent is not None:
                head.bias[self.tokenizer().convert_tokens_to_ids(self.silent)] = -1e4
        model.set_output_embeddings(head)
        return model


@dataclass(frozen=True)
class TalkTasks(TaskSource):
    """Questions of very different lengths, each with a reference."""

    longest: int = 20
    turns: int = 3
    seed: int = 0
    reference: str = "e1 e2 e3"

    @property
    def size(self) -> None:
        return None

    def __getitem__(self, index: int) -> Task:
        rng = random.Random(f"talk-{self.seed}-{index}")
        question = " ".join(rng.choices(QUERIES, k=rng.randint(1, self.longest)))
        messages = [{"role": "user", "content": question}]
        return Task(f"talk-{index}", messages, reference=self.reference, meta={"turns": self.turns})


class Talk(Environment):
    """Answers every turn with some words, and pays at random."""

    opening = 0

    def reset(self, task: Task, *, seed: int) -> list[dict]:
        self.rng, self.left = random.Random(seed), task.meta["turns"]
        return [self.say() for _ in range(self.opening)]

    def say(self) -> dict:
        return {"role": "user", "content": " ".join(self.rng.choices(ENTITIES, k=self.rng.randint(1, 5)))}

    def step(self, message: dict) -> Step:
        self.left -= 1
        return Step([] if self.left <= 0 else [self.say()], reward=self.rng.random(), done=self.left <= 0)


@dataclass
class Seen:
    """One micro-batch as it was trained on, and the optimizer steps taken before it."""

    batch: RolloutBatch
    outputs: dict[str, Any]
    steps: int


@dataclass(eq=False)
class Watch(L.Callback):
    """Keeps the micro-batches of a run, the policy before it, and the policy after each optimizer step."""

    seen: list[Seen] = field(default_factory=list)
    weights: list[list[Tensor]] = field(default_factory=list)
    before: int = 0

    def _keep(self, module: Any) -> None:
        self.weights.append([p.detach().clone() for p in module.policy.parameters()])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._keep(pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.before = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch.index >= 0).any():  # not the blank row of a micro-batch whose rollouts were all excluded
            self.seen.append(Seen(batch, outputs, self.before))
        if trainer.global_step > self.before:
            self._keep(pl_module)


def watched(run: Path, model: GearModule, source: Any = None, generate: Any = None, **options: Any) -> Watch:
    """Train, and return what was trained on."""
    torch.manual_seed(0)
    watch = Watch()
    trainer(run, generate or generation(), watch, **options).fit(model, datamodule=source or data())
    return watch


def untrained(model: GearModule, run: Path, **options: Any) -> GearModule:
    """The module as it is before its first step."""
    model.trainer = trainer(run, **options)
    model.trainer.state.fn = TrainerFn.FITTING
    model.configure_model()
    return model


def random_rows(seed: int, hints: tuple[int, ...] = (0, 3, 40, 7), vocabulary: int = 100) -> list[RolloutRow]:
    """Rollouts with prompts, responses and hints of very different lengths."""
    rows = []
    for index, hint in enumerate(hints):
        rng = random.Random(f"{seed}/{index}")
        prompt, response = rng.randint(1, 12), rng.randint(2, 20)
        tokens = [rng.randrange(6, vocabulary) for _ in range(prompt + response)]
        mask = [False] * prompt + [rng.random() < 0.7 for _ in range(response - 1)] + [True]
        advantage = rng.choice([-1.0, 0.5, 2.0])
        extra = [rng.randrange(6, vocabulary) for _ in range(hint)]
        rows.append(
            RolloutRow(
                tokens=tokens,
                action_mask=mask,
                turn_ids=[sum(not s for s in mask[prompt:t]) if m else -1 for t, m in enumerate(mask)],
                stop_mask=[False] * len(tokens),
                sampler_logprobs=[0.0] * len(tokens),
                prompt_length=prompt,
                teacher_prompt=tokens[: prompt - 1] + extra + tokens[prompt - 1 : prompt],
                reward=0.0,
                success=False,
                advantage=advantage,
                group_id=0,
                policy_version=0,
                index=index,
            )
        )
    return rows
