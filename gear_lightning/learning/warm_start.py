"""The supervised warm start: trains a policy on demonstrations until its groups of rollouts have different rewards."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ..batch import RolloutRow, collate
from ..distributed.sharding import whole_copy
from ..environments.base import Demonstration, Demonstrations
from ..errors import Stopped, UserError
from ..generation.chat import Chat
from ..models import Float32Buffers, checkpoint_activations
from ..module import GearModule
from ..runs.files import build_once, cache_dir
from ..runs.finite import all_finite
from ..strategies import place
from ..teacher import TeacherOptions, privileged_prompt
from .gradients import Float32Sums
from .step_guard import StepGuard
from .token_stats import check_head, token_stats

CheckSampling = Callable[[Any, GearModule, Any, Any], None]
MOST_SKIPPED = 5  # optimizer steps in a row without a finite gradient
KEYED = 32  # number of demonstrations in the cache key of a result


@dataclass(frozen=True)
class WarmStart:
    """Supervised fine-tuning on demonstrations before RL. The result is cached, keyed by the settings.

    Args:
        demonstrations: training data.
        steps: optimizer steps.
        batch_size: demonstrations per step, over all processes.
        learning_rate: highest learning rate of AdamW.
        warmup_steps: steps of linear warm-up; a cosine decay to zero follows.
        max_length: longer demonstrations are skipped, tokens; also those longer than the model's positions.
        reuse: reuse the result of an earlier run with the same settings, model and code version.
    """

    demonstrations: Demonstrations
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    max_length: int = 1024
    reuse: bool = True

    def __post_init__(self):
        for name in ("steps", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"warm_start.{name}={getattr(self, name)} must be at least 1")
        if not (0 < self.learning_rate < math.inf and self.warmup_steps >= 0):
            raise UserError(
                f"learning_rate={self.learning_rate} must be above 0 and finite, "
                f"warmup_steps={self.warmup_steps} at least 0"
            )


def encode(item: Demonstration, chat: Chat, teacher: TeacherOptions, stretch: int = 0) -> tuple[list[int], list[bool]]:
    """Return the ids of a demonstration, and a mask of the learned ones: those that the policy would have sampled.

    Args:
        item: the demonstration.
        chat: converts it to ids.
        teacher: options of the teacher's prompt.
        stretch: with ``earlier_reasoning=drop`` a user message can restart the context; which of these stretches is
            returned, modulo their number.
    """
    opening = item.task.messages
    if item.privileged:
        ids, _ = privileged_prompt(item.task, opening, chat, teacher)
    else:
        ids = chat.prompt(opening, item.task.tools)
    ids, learned = list(ids), [False] * len(ids)
    stretches: list[tuple[list[int], list[bool]]] = []
    between: list[Any] = []
    reasoned = False
    for number, message in enumerate(item.messages):
        if message["role"] != "assistant":
            between.append(message)
            continue
        if between and reasoned and chat.drops_reasoning(between):
            stretches.append((ids, learned))
            ids = chat.prompt([*opening, *item.messages[:number]], item.task.tools)
            learned, between, reasoned = [False] * len(ids), [], False
        elif between:
            context = chat.continuation(between)
            ids, learned, between = ids + context, learned + [False] * len(context), []
        turn = chat.write(message)
        ids, learned = ids + turn, learned + [number not in item.unlearned] * len(turn)
        reasoned = reasoned or bool(message.get("reasoning"))
    stretches.append((ids, learned))
    return stretches[stretch % len(stretches)]


class _Batches(torch.utils.data.IterableDataset):
    """This rank's share of each step's demonstrations, encoded."""

    def __init__(self, options: WarmStart, gear: GearModule, trainer: L.Trainer):
        self.options, self.chat, self.teacher, self.trainer = options, gear.chat_format, gear.teacher_options, trainer
        longest = gear.longest
        self.limit = options.max_length if longest is None else min(options.max_length, longest.tokens)

    def __len__(self) -> int:
        return self.options.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        world, rank, size = self.trainer.world_size, self.trainer.global_rank, self.options.batch_size
        for step in range(self.options.steps):
            rows = [self._row(step * size + place) for place in range(size)]
            total = sum(sum(r.action_mask) for r in rows)
            batch = collate(rows[rank::world], step_tokens=total, step_rollouts=size, temperature=1.0)
            yield batch.tokens, batch.valid, batch.action_mask, batch.step_tokens

    def _row(self, index: int) -> RolloutRow:
        stride = self.options.steps * self.options.batch_size
        for attempt in range(100):
            item = self.options.demonstrations[index + attempt * stride]
            ids, learned = encode(item, self.chat, self.teacher, stretch=index + attempt)
            if len(ids) <= self.limit:
                n = len(ids)
                return RolloutRow(ids, learned, [-1] * n, [False] * n, [0.0] * n, 1, [0], 0.0, False, 0.0, -1, 0, index)
        limit = f"warm_start.max_length={self.options.max_length}"
        if self.limit < self.options.max_length:
            limit = f"the model scores rows of up to {self.limit} tokens"
        raise UserError(f"{limit}: 100 demonstrations in a row are longer")


class WarmStartModule(Float32Buffers, Float32Sums, StepGuard):
    """Cross-entropy on the learned tokens of demonstrations.

    Args:
        gear: see `run_warm_start`, also for the next three.
        options: the stage's settings.
        check: checks the policy before it is trained.
        check_sampling: checks it after the strategy has placed it.
    """

    def __init__(
        self,
        gear: GearModule,
        options: WarmStart,
        check: Callable[[Any], None],
        check_sampling: CheckSampling | None = None,
    ):
        super().__init__()
        self.options = options
        self.gear = (gear,)  # in a tuple, so that it is not a submodule
        self.check = check
        self.check_sampling = check_sampling
        self.policy: Any = None
        self._blank: list[Any] = [None]  # in a list, so that it is not a submodule

    def configure_model(self) -> None:
        if self.policy is None:
            gear, precision = self.gear[0], str(self.trainer.precision)
            bare = lambda: gear.as_trained(gear.source.skeleton(), precision)  # noqa: E731
            self.policy, *self._blank = place(self.trainer.strategy, self._load, bare)
            self.policy.train()
            if self.gear[0].activation_checkpointing:
                checkpoint_activations(self.policy)
            self.prepare_sums(low_precision=self.trainer.precision in ("bf16-true", "16-true"))

    def _load(self) -> Any:
        gear = self.gear[0]
        policy = gear.as_trained(gear.source.model(), str(self.trainer.precision))
        check_head(policy)
        self.check(policy)
        if gear.lora is not None:
            gear.lora.layers(policy)
        return policy

    def on_train_start(self) -> None:
        if self.check_sampling is not None:
            self.check_sampling(self.trainer, self.gear[0], self.policy, self._blank[0])

    def whole(self) -> Any:
        """Return the policy in float32 in CPU memory. All ranks must call it."""
        return whole_copy(self.policy, self._blank[0], "cpu", torch.float32)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        tokens, valid, learned, total = batch
        loss = -token_stats(self.policy, tokens, valid, learned).logprobs.sum() / total.clamp_min(1)
        self.log("warm_start/loss", loss, prog_bar=True, sync_dist=True)
        return loss * self.trainer.world_size

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.check_steps(MOST_SKIPPED)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.policy.parameters(), lr=self.options.learning_rate, weight_decay=0.01)
        self.start_sums(self.policy.parameters())
        warm, steps = self.options.warmup_steps, self.options.steps

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run_warm_start(
    options: WarmStart,
    gear: GearModule,
    trainer: L.Trainer,
    key: Any,
    check: Callable[[Any], None],
    check_sampling: CheckSampling | None = None,
) -> Path:
    """Train on demonstrations and return the directory with the resulting weights.

    Args:
        options: the stage's settings.
        gear: provides policy, chat and teacher options; its own weights do not change.
        trainer: a Trainer for this stage (``max_steps`` = ``options.steps``).
        key: plain data that determines the result besides ``options``, the policy and the demonstrations (precision).
        check: checks the policy before it is trained; raises if a later stage could not use it.
        check_sampling: the same for the policy on its devices; called on all ranks with the trainer, ``gear``, the
            policy, and its modules without values if it is sharded.
    """
    from .. import __version__

    first = [options.demonstrations[i] for i in range(KEYED)]
    shown = [encode(item, gear.chat_format, gear.teacher_options) for item in first]  # template and tokenizer too
    settings = {k: v for k, v in vars(options).items() if k not in ("demonstrations", "reuse")}
    what = (__version__, settings, type(options.demonstrations).__name__, shown, gear.source.fingerprint(), key)
    name = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    folder = cache_dir() / "warm_start" / name
    if not options.reuse or not folder.exists():
        module = WarmStartModule(gear, options, check, check_sampling)
        data = _Batches(options, gear, trainer)
        trainer.fit(module, train_dataloaders=torch.utils.data.DataLoader(data, batch_size=None))
        if options.steps != trainer.global_step:
            raise Stopped
        if not options.reuse and folder.exists():
            folder = folder.with_name(f"{name}-{trainer.global_step}-fresh")
        folder = trainer.strategy.broadcast(folder)
        whole = module.whole()
        if not all_finite(whole.parameters()):
            raise UserError(
                f"the warm start produced weights that are not finite; lower warm_start.learning_rate="
                f"{options.learning_rate} or use a wider trainer.precision"
            )
        if trainer.is_global_zero:
            build_once(folder, whole.save_pretrained)
        trainer.strategy.barrier("warm start saved")
    return folder
