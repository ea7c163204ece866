"""The LightningModule: policy, teacher, credit and losses."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import MaxMetric, MeanMetric

from .auto_classes import freeze_other_parts
from .batch import Credit, RolloutBatch, TokenStats
from .credit import GEAR, CreditAssigner, Evidence, RoundingNoise, Uniform
from .distillation import Distillation
from .environments.base import Message, Task
from .errors import UserError, require_extra
from .generation.chat import Chat, ChatOptions
from .learning.frozen import Kept, Scored, keep, recall
from .learning.gradients import Float32Sums
from .learning.head import HeadPrecision, head_in_float32, use_float32_head
from .learning.lora import LoRA, add_teacher
from .learning.metrics import ExpertLoad, Quantile
from .learning.module_state import ModuleState
from .learning.positions import Longest, longest_row
from .learning.routing import Routed, balance_loss, expert_counts, routers, watched
from .learning.schedule import Schedule
from .learning.step_guard import StepGuard
from .learning.token_stats import check_head, token_stats
from .logits import keep_to_tokenizer
from .loss import ClippedSurrogate, LossTerms, PolicyLoss
from .models import Float32Buffers, PolicySource, checkpoint_activations, without_dropout
from .strategies import place
from .teacher import Teacher, TeacherOptions, privileged_prompt


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """The default optimizer: AdamW, learning rate 1e-6, no weight decay."""
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0)


class GearModule(Float32Buffers, Float32Sums, StepGuard, Schedule, ModuleState):
    """Trains a policy on rollouts, with an advantage for each token.

    Args:
        policy: source of the starting weights and the tokenizer.
        credit: rule that distributes a rollout's advantage over its tokens.
        objective: the policy loss. Null: none, to train with ``distillation`` alone; requires ``credit`` Uniform.
        teacher: the teacher that scores rollouts for the credit rule and the distillation, and its privileged text.
        chat: conversion of messages to text.
        optimizer: of the policy's parameters.
        lr_scheduler: stepped after every optimizer step; ``lightning.pytorch.cli.ReduceLROnPlateau`` at the end of each
            iteration that has measured its ``monitor``. Null: constant learning rate.
        lora: train low-rank adapters on the starting weights (extra ``lora``). Null: train all weights.
        activation_checkpointing: keep only the input of each of the policy's layers and recompute the layer in the
            backward pass: far less memory, a slower update, the same gradients.
        distillation: a loss that moves the policy towards the teacher, added to the objective. Null: none.
        head_precision: precision in which the output head computes logits, in rollouts and updates, for policy and
            teacher. ``float32`` halves the credit signal's rounding under bf16-mixed, and needs a float32 copy of the
            head if the weights are bfloat16. Null: float32 under mixed precision, otherwise that of the weights.
        expert_balance: coefficient of a loss that makes a mixture of experts use its experts more evenly (that of
            DeepSeek-V3, computed within each rollout). 0: none.

    Raises:
        UserError: options that contradict each other, or an option that would do nothing.
    """

    def __init__(
        self,
        policy: PolicySource,
        credit: CreditAssigner = GEAR(),
        objective: PolicyLoss | None = ClippedSurrogate(),
        teacher: TeacherOptions = TeacherOptions(),
        chat: ChatOptions = ChatOptions(),
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        lora: LoRA | None = None,
        activation_checkpointing: bool = False,
        distillation: Distillation | None = None,
        head_precision: HeadPrecision | None = None,
        expert_balance: float = 0.0,
    ):
        super().__init__()
        self.source = policy
        self.credit = credit
        self.objective = objective
        self.distillation = distillation
        if objective is None:
            if distillation is None:
                raise UserError("model.objective and model.distillation are both null: there is no loss to train on")
            if not isinstance(credit, Uniform):
                raise UserError(
                    f"model.credit={type(credit).__name__} does nothing without a model.objective; add "
                    "--config configs/credit/grpo.yaml after the config that sets the objective to null, or set one"
                )
        self.teacher_options = teacher
        self.chat_options = chat
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lora = lora
        if lora is not None:
            require_extra("peft")
            if teacher.park:
                raise UserError(
                    "model.teacher.park does nothing with model.lora: the teacher shares the policy's weights"
                )
        self.activation_checkpointing = activation_checkpointing
        self.head_precision: HeadPrecision | None = head_precision
        self.expert_balance = expert_balance
        if not 0 <= expert_balance < math.inf:
            raise UserError(f"model.expert_balance={expert_balance}: must be at least 0, and finite")
        self.initial_weights: Path | None = None  # a model directory with starting weights that replace the source's
        self.base: str | None = None  # path or hub id of the adapters' base; None: only the checkpoint has it
        self.policy: Any = None
        self._blank: list[Any] = [None]  # see `blank`; in a list, so that it is not a submodule
        self.teacher: Teacher | None = None
        self._chat: Chat | None = None
        self._shipped: dict[str, bytes] = {}  # files of the published model, and its hub id
        self._base_model: str | None = None
        self._frozen: dict[tuple[int, ...], Kept] = {}  # scorings of this iteration, if later inner epochs use them
        self.ahead = 0  # iterations by which rollouts may be older than the policy; set by their generator
        self.noise = RoundingNoise()  # for the credit rule; the callback NoiseFloor measures it before the first step
        self.expert_load = ExpertLoad()
        self.divergence_p95, self.sampler_gap_p95, self.sampler_gap_max = Quantile(0.95), Quantile(0.95), MaxMetric()
        self.val_success, self.val_reward, self.val_turns, self.val_tokens = (MeanMetric() for _ in range(4))

    # -- models ---------------------------------------------------------------------------------------------------

    @property
    def needs_teacher(self) -> bool:
        """Whether the credit rule or the distillation uses a teacher."""
        return self.credit.needs_teacher or self.distillation is not None

    @property
    def chat_format(self) -> Chat:
        """Tokenizer and chat template of the policy."""
        if self._chat is None:
            self._chat = Chat(self.source.tokenizer(), self.chat_options, self.source.stop_ids())
            self.take_origin()
        return self._chat

    @property
    def blank(self) -> Any:
        """The policy's modules without values if its parameters are sharded over the ranks, else None."""
        return self._blank[0]

    def configure_model(self) -> None:
        strategy: Any = self.trainer.strategy
        spread = getattr(strategy, "shards", False)
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        if self.policy is None:  # Lightning calls this for every stage
            whole = partial(self._adapted, self._load_policy, teacher=spread and fitting)
            bare = partial(self._adapted, self._blank_policy, teacher=fitting)
            self.policy, *self._blank = place(strategy, whole, bare)
            self.policy.train()
        low = self.trainer.precision in ("bf16-true", "16-true")
        if self.teacher is None and self.needs_teacher and fitting:
            duplicate = self._spread_copy if spread else copy.deepcopy
            self.teacher = Teacher(self.policy, self.teacher_options, low_precision=low, duplicate=duplicate)
        if self.activation_checkpointing and fitting:  # after the teacher's copy, which has no backward pass
            checkpoint_activations(self.policy)
        if fitting:
            self.prepare_sums(low_precision=low and self.lora is None)

    def _load_policy(self) -> Any:
        policy = self.as_trained(self.source.model())
        if self.initial_weights is not None:
            from safetensors.torch import load_model

            load_model(policy, self.initial_weights / "model.safetensors")
        check_head(policy)
        return policy

    def _blank_policy(self) -> Any:
        return self.as_trained(self.source.skeleton())

    def as_trained(self, policy: Any, precision: str | None = None) -> Any:
        """Prepare a model of the source for training, in place, and return it.

        Dropout is removed, an image encoder is frozen, ids beyond the tokenizer are excluded, and the head gets
        ``head_precision`` for a ``trainer.precision`` (None: that of this module's trainer).
        """
        keep_to_tokenizer(freeze_other_parts(without_dropout(policy)), self.chat_format.tokenizer)
        if self.expert_balance and not routers(policy):
            raise UserError(
                f"model.expert_balance does nothing: {type(policy).__name__} has no experts, or does not report which "
                "it uses; remove it"
            )
        if head_in_float32(self.head_precision, precision or str(self.trainer.precision)):
            use_float32_head(policy)
        return policy

    def _adapted(self, make: Callable[[], Any], teacher: bool) -> Any:
        """Return a model with its adapters, and with the teacher's if these are to be sharded with the others."""
        policy = make()
        if self.lora is not None:
            self.base = self.source.published() if self.initial_weights is None else None
            self.lora.adapt(policy)
            if teacher and self.needs_teacher and self.teacher_options.weights == "ema":
                add_teacher(policy)
        return policy

    def _spread_copy(self, policy: Any) -> Any:
        strategy: Any = self.trainer.strategy
        return strategy.shard(copy.deepcopy(self.blank), like=policy)

    @property
    def longest(self) -> Longest | None:
        """The longest row that policy and teacher can score; None if unlimited, or unknown before loading the model."""
        config = self.source.config() if self.policy is None else self.policy.config
        name = getattr(config, "model_type", "the model") if self.policy is None else type(self.policy).__name__
        return None if config is None else longest_row(config, name)

    def privileged_prompt(
        self,
        task: Task,
        opening: list[Message],
        peer: list[Message] | None = None,
        feedback: str | None = None,
        response: int = 1,
        options: TeacherOptions | None = None,
    ) -> tuple[list[int], bool]:
        """Return the ids that the teacher sees before the response, and whether its text was dropped for length.

        Args:
            task: see `teacher.privileged_prompt`, also for the next three.
            opening: the first messages of the rollout.
            peer: messages of a successful rollout of the same group.
            feedback: the environment's feedback.
            response: tokens that follow.
            options: replace the module's own options.
        """
        if not self.needs_teacher:
            return self.chat_format.prompt(opening, task.tools), False
        options = options or self.teacher_options
        return privileged_prompt(task, opening, self.chat_format, options, peer, feedback, self.longest, response)

    # -- training -------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        self.start_sums(self.policy.parameters())
        return made

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Any]:
        self._check_version(batch)
        frozen = recall(self._frozen[_key(batch)], batch.action_mask) if batch.inner_epoch else None
        with watched(self.policy, batch.tokens.shape) as routed:
            policy = self._policy_stats(batch, frozen)
        old_logprobs, teacher, credit = frozen or self._freeze(batch, policy)
        terms = distilled = None
        if self.objective is not None:
            terms = self.objective(
                policy.logprobs,
                old_logprobs,
                credit.token_advantages,
                batch.action_mask,
                sampler_logprobs=batch.sampler_logprobs,
                turn_ids=batch.turn_ids,
                step_tokens=batch.step_tokens,
                step_rollouts=batch.step_rollouts,
            )
        if self.distillation is not None:
            assert teacher is not None
            distilled = self.distillation(
                policy,
                teacher,
                old_logprobs,
                batch.action_mask,
                privileged=batch.privileged,
                advantages=batch.base_advantages,
                step_tokens=batch.step_tokens,
            )
        balance = self._balance(batch, routed) if routed else None
        parts = [part for part in (terms and terms.loss, distilled, balance) if part is not None]
        share = sum(parts[1:], parts[0])
        self._log_step(batch, policy, teacher, credit)
        self._log_loss(share, terms, distilled, int(batch.action_mask.sum()))
        # Lightning divides by the micro-batches of a step, and the strategy averages over ranks; this undoes both
        loss = share * (self.trainer.accumulate_grad_batches * self.trainer.world_size)
        return {"loss": loss, "credit": credit, "policy": policy, "teacher": teacher}

    def _balance(self, batch: RolloutBatch, routed: list[Routed]) -> Tensor | None:
        """Log the load of the experts, and return this micro-batch's share of the loss on it; None without one."""
        valid = batch.valid & (batch.index >= 0)[:, None]
        self.expert_load.update(expert_counts(routed, valid))
        self.log("train/expert_load", self.expert_load, on_step=False, on_epoch=True)
        if not self.expert_balance:
            return None
        return self.expert_balance * balance_loss(routed, valid) / batch.step_rollouts

    def _policy_stats(self, batch: RolloutBatch, frozen: Scored | None) -> TokenStats:
        """Return the policy's current statistics. Later inner epochs use the top tokens of the frozen teacher."""
        distilled = 0 if self.distillation is None else self.distillation.top_k
        teacher = None if frozen is None else frozen[1]
        return token_stats(
            self.policy,
            batch.tokens,
            batch.valid,
            batch.action_mask,
            temperature=batch.temperature,
            top_k=max(self.credit.top_k, distilled) if frozen is None else 0,
            top_ids=None if teacher is None else teacher.top_ids,
            top_grad=distilled > 0,
        )

    def _check_version(self, batch: RolloutBatch) -> None:
        """Raise if rollouts are older than ``generation.ahead`` allows: training would treat them as newer ones."""
        age = (self.global_step - batch.inner_epoch - batch.versions)[batch.action_mask]
        if (age < 0).any() or (age > self.ahead * batch.inner_epochs).any():
            made = sorted(set(batch.versions[batch.action_mask].tolist()))
            raise UserError(
                f"stale rollouts: sampled by policy version {made}, trained on after {self.global_step} optimizer steps"
            )

    @torch.no_grad()
    def _freeze(self, batch: RolloutBatch, policy: TokenStats) -> Scored:
        """Return old log-probs, teacher statistics and credit of the first scoring, and keep them for later epochs."""
        teacher = None
        if self.teacher is not None:
            teacher = self.teacher.score(self.policy, batch, batch.action_mask, policy.top_ids)
        frozen = policy.logprobs.detach(), teacher, self.credit(Evidence.of(batch, policy, teacher, self.noise))
        if batch.inner_epochs > 1:
            asked = None if self.distillation is None else self.distillation.top_k
            self._frozen[_key(batch)] = keep(frozen, batch.action_mask, asked)
        return frozen

    def _log_position(self) -> None:
        """Log the number of optimizer steps as the metrics' step, so that 0 is the policy before its first update."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.log("step", float(self.global_step), batch_size=1)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self._log_position()
        self._frozen.clear()
        for parameter in self.policy.parameters():  # free memory for the next rollouts
            parameter.grad = None

    def on_train_start(self) -> None:
        if self.teacher is not None and self.teacher_options.park:
            self.teacher.park()

    def optimizer_step(self, epoch: int, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(epoch, batch_idx, *args, **kwargs)
        if not self.steps_after(batch_idx):
            return
        skipped = torch.tensor(float(self.step_skipped), device=self.device)
        self._log_sum("train/skipped_steps", skipped / self.trainer.world_size)
        if not self.step_skipped:
            self._log("train/grad_norm", torch.tensor(self.gradient_norm, device=self.device), 1)
        # here and not in on_train_batch_end: callbacks that save a checkpoint run before the module's own hook. An
        # average over several steps is due even if the last of these steps was skipped
        if self.teacher is not None and (self.step_taken or self.teacher_options.every > 1):
            self.teacher.update(self.policy, self.global_step + 1)

    # -- evaluation -----------------------------------------------------------------------------------------------

    def _fresh_metrics(self) -> None:
        # metrics last used under inference mode (trainer.validate) cannot be updated outside of it
        for metric in (self.val_success, self.val_reward, self.val_turns, self.val_tokens):
            metric.reset()

    on_validation_epoch_start = on_test_epoch_start = _fresh_metrics

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def predict_step(self, batch: RolloutBatch, batch_idx: int) -> RolloutBatch:
        return batch

    def validation_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        real = batch.index >= 0
        if real.any():
            self.val_success.update(batch.success.float()[real])
            self.val_reward.update(batch.rewards[real])
            self.val_turns.update((batch.turn_ids.amax(-1) + 1).float()[real])
            self.val_tokens.update(batch.action_mask.sum(-1).float()[real])

    test_step = validation_step

    def _log_evaluation(self, stage: str) -> None:
        if self.trainer.datamodule.evaluation_due:  # pyright: ignore[reportAttributeAccessIssue]
            return  # the evaluation was interrupted, and its mean would cover other tasks
        self._log_position()
        names = {"success": self.val_success, "reward": self.val_reward, "turns": self.val_turns}
        for name, metric in {**names, "response_tokens": self.val_tokens}.items():
            self.log(f"{stage}/{name}", metric, prog_bar=name == "success")

    # -- logging --------------------------------------------------------------------------------------------------

    def _log_loss(self, loss: Tensor, terms: LossTerms | None, distilled: Tensor | None, tokens: int) -> None:
        steps = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches  # per iteration

        self._log_sum("train/loss", loss.detach() / steps)
        if distilled is not None:
            self._log_sum("train/distillation", distilled.detach() / steps)
        if terms is not None:
            self._log("train/clip_fraction", terms.clipped.float() / max(tokens, 1), tokens)
            if terms.sampler_ratio is not None and terms.sampler_truncated is not None:
                self._log("train/sampler_ratio", terms.sampler_ratio.float() / max(tokens, 1), tokens)
                truncated = terms.sampler_truncated.float() / max(tokens, 1)
                self._log("train/sampler_truncated_fraction", truncated, tokens)

    def _log_step(self, batch: RolloutBatch, policy: TokenStats, teacher: TokenStats | None, credit: Credit) -> None:
        mask = batch.action_mask
        tokens = int(mask.sum())
        rollouts = int((batch.index >= 0).sum())

        def per_token(name: str, total: Tensor) -> None:
            self._log(name, total.float() / max(tokens, 1), tokens)

        per_token("train/entropy", policy.entropy.sum())
        if batch.inner_epoch:
            return
        # infinite where it is NaN: torchmetrics leaves NaN out, and the largest gap would look like none
        gap = (policy.logprobs.detach() - batch.sampler_logprobs).abs()[mask].nan_to_num(math.inf, math.inf)
        self.sampler_gap_p95.update(gap)
        self.log("train/sampler_gap_p95", self.sampler_gap_p95, on_step=False, on_epoch=True)
        self.sampler_gap_max.update(gap.amax() if tokens else gap.new_zeros(()))
        self.log("train/sampler_gap_max", self.sampler_gap_max, on_step=False, on_epoch=True)
        if self.ahead:
            age = torch.where(mask, self.global_step - batch.versions, 0)
            per_token("train/staleness", age.sum())
        if teacher is not None:
            per_token("teacher/student_gap", torch.where(mask, teacher.logprobs - policy.logprobs.detach(), 0).sum())
        per_token("credit/weight_deviation", (credit.weights - 1).abs().sum())
        if not self.credit.needs_teacher:
            return
        anchors = (credit.anchor >= 0) & (credit.anchor == torch.arange(mask.shape[1], device=mask.device))
        per_token("credit/segment_token_fraction", (credit.anchor >= 0).sum())
        per_token("credit/weight_clip_fraction", mask.sum() * 0 if credit.clipped is None else credit.clipped.sum())
        self._log("credit/segments_per_rollout", anchors.sum().float() / max(rollouts, 1), rollouts)
        self.divergence_p95.update(credit.divergence[self.credit.scope(batch)])
        self.log("credit/divergence_p95", self.divergence_p95, on_step=False, on_epoch=True)

    def _log_sum(self, name: str, value: Tensor) -> None:
        """Log the sum over an iteration and over all ranks."""
        self.log(name, value, on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True, batch_size=1)

    def _log(self, name: str, value: Tensor, weight: int) -> None:
        # Lightning averages the weights over the ranks as integers, rounded down: make that average an integer
        weight *= self.trainer.world_size
        self.log(name, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=weight)


def _key(batch: RolloutBatch) -> tuple[int, ...]:
    """Return a key that distinguishes the micro-batches of an iteration and is the same in every inner epoch."""
    return tuple(batch.index.tolist())
