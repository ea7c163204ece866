"""Helpers for tests of invariants: a policy far from uniform, a talking environment, a recorded run, every credit rule
of the package, and a teacher without information."""

import dataclasses
import importlib
import inspect
import itertools
import pkgutil
import random
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from tiny_runs import WORDS, data, generation, trainer
from torch import Tensor

from gear_lightning import credit
from gear_lightning.batch import RolloutBatch, RolloutRow, TokenStats
from gear_lightning.credit import CreditAssigner, Evidence, RoundingNoise
from gear_lightning.environments.base import Environment, Step, Task, TaskSource
from gear_lightning.environments.lookup_chain import ENTITIES, QUERIES
from gear_lightning.errors import UserError
from gear_lightning.models import FromScratch
from gear_lightning.module import GearModule


@dataclass(frozen=True)
class Sharp(FromScratch):
    """A tiny policy far from uniform, so that temperature, top-p and changed weights affect its log-probs.

    About every tenth token ends its turn. It never samples ``silent``.
    """

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
    """Questions with very different lengths, each with a reference."""

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
    """Answers every turn with some words, and gives random rewards."""

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
    """One micro-batch used in training, and the number of optimizer steps before it."""

    batch: RolloutBatch
    outputs: dict[str, Any]
    steps: int


@dataclass(eq=False)
class Watch(L.Callback):
    """Records the micro-batches of a run, the initial policy, and the policy after each optimizer step."""

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
        if (batch.index >= 0).any():  # skip the blank row of a micro-batch whose rollouts were all excluded
            self.seen.append(Seen(batch, outputs, self.before))
        if trainer.global_step > self.before:
            self._keep(pl_module)


def watched(run: Path, model: GearModule, source: Any = None, generate: Any = None, **options: Any) -> Watch:
    """Train, and return the recorded micro-batches and policies."""
    torch.manual_seed(0)
    watch = Watch()
    trainer(run, generate or generation(), watch, **options).fit(model, datamodule=source or data())
    return watch


def untrained(model: GearModule, run: Path, **options: Any) -> GearModule:
    """Return the module in its state before the first step."""
    model.trainer = trainer(run, **options)
    model.trainer.state.fn = TrainerFn.FITTING
    model.configure_model()
    return model


def random_rows(seed: int, hints: tuple[int, ...] = (0, 3, 40, 7), vocabulary: int = 100) -> list[RolloutRow]:
    """Return rollouts with prompts, responses and hints of very different lengths."""
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


def rule_classes() -> list[type[CreditAssigner]]:
    """Return every credit rule in the package, by searching its modules."""
    found: set[type[CreditAssigner]] = set()
    for module in pkgutil.walk_packages(credit.__path__, f"{credit.__name__}."):
        for kind in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(kind) and issubclass(kind, CreditAssigner) and not inspect.isabstract(kind):
                found.add(kind)
    return sorted(found, key=lambda kind: kind.__name__)


def choices(kind: type[CreditAssigner]) -> dict[str, list[Any]]:
    """Return the options of a rule with a fixed set of values: option -> values."""
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        parts = [hint, *typing.get_args(hint)]
        literals = [part for part in parts if typing.get_origin(part) is typing.Literal]
        if literals and name in {f.name for f in dataclasses.fields(kind)}:  # type: ignore[arg-type]
            found[name] = [value for part in literals for value in typing.get_args(part)]
    return found


def every_rule() -> list[CreditAssigner]:
    """Return every rule with its defaults, with each value of its options, and with each scale of each divergence."""
    rules: list[CreditAssigner] = []
    for kind in rule_classes():
        options = choices(kind)
        sets: list[dict[str, Any]] = [{}, *({name: value} for name, values in options.items() for value in values)]
        if "scale" in options:  # an unsigned divergence also needs another sign rule
            names = ["divergence", "scale", "sign_rule", "normalise"]
            if "scale" not in kind.__annotations__:  # its base class covers them
                options["sign_rule"], names = ["sign_aware", "symmetric"], names[:3]
            sets += [dict(zip(names, v, strict=True)) for v in itertools.product(*(options[n] for n in names))]
        for given in sets:
            try:
                rule = kind(**given)
            except UserError:  # values that cannot be combined
                continue
            if rule not in rules:
                rules.append(rule)
    return rules


FLOAT32, BF16 = 1e-4, 1.0  # rounding noise relative to bf16-mixed: |log-ratio| 0.018 at the median, 0.14 at p99


def null_evidence(
    size: float,
    *,
    rollouts: int = 12,
    turns: int = 2,
    tokens: int = 120,
    both_signs: bool = False,
    says: float = 0.0,
    seed: int = 0,
) -> Evidence:
    """Return evidence of a teacher with the policy's weights and no privileged text: differences are only rounding.

    Args:
        size: of rounding, relative to that of bf16-mixed as measured on SmolLM2-135M.
        rollouts: number of rollouts, with advantages of 1 and -1.
        turns: turns of each rollout, of equal length: a third each of answer, reasoning and tool calls.
        tokens: tokens of each rollout.
        both_signs: give the turns of a rollout their own advantages, of both signs.
        says: standard deviation of an additional real log-ratio, in nats.
        seed: of all random numbers.
    """
    draw = torch.Generator().manual_seed(seed)
    shape, top = (rollouts, tokens), (rollouts, tokens, 20)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw)

    def heavy(*size: int) -> Tensor:  # Student's t with 3 degrees of freedom
        return normal(*size) / (normal(3, *size) ** 2).mean(0).sqrt()

    turn_ids = (torch.arange(tokens) * turns // tokens).expand(shape).clone()
    logprobs, entropy = -torch.rand(shape, generator=draw) * 2, torch.rand(shape, generator=draw) ** 4 * 2.5
    listed = torch.log_softmax(normal(*top) * 3, -1)
    ids = torch.zeros(top, dtype=torch.long)
    real = says * normal(*shape), says * normal(*top)
    teacher = TokenStats(
        logprobs + 0.024 * size * heavy(*shape) + real[0],
        entropy,
        ids,
        torch.log_softmax(listed + 0.03 * size * normal(*top) + real[1], -1),
    )
    sign = 1.0 - 2 * (torch.arange(rollouts) % 2)
    own = torch.tensor([1.0, -0.5, -2.0, 0.5, 1.5])[turn_ids % 5]
    return Evidence(
        sign,
        turn_ids >= 0,
        turn_ids,
        torch.zeros(shape, dtype=torch.bool),
        torch.zeros(rollouts, dtype=torch.long),
        TokenStats(logprobs, entropy, ids, listed),
        teacher,
        turn_advantages=own if both_signs else None,
        decisions=torch.randint(-1, 2, shape, generator=draw),
        solved=torch.full((rollouts,), 2),
        parts=(torch.arange(tokens) * turns * 3 // tokens % 3).expand(shape).clone(),
    )


def knowing_noise(rule: CreditAssigner, e: Evidence) -> Evidence:
    """Return the evidence with its own 99th percentiles as rounding noise, as measured in a run whose teacher has no
    privileged text."""
    assert e.teacher is not None
    log_ratio = float((e.policy.logprobs - e.teacher.logprobs).abs().quantile(0.99))
    divergence = float(rule(e).divergence.abs().quantile(0.99)) if rule.top_k else 0.0
    return replace(e, noise=RoundingNoise(log_ratio, divergence))
