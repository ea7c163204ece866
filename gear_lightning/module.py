"""The LightningModule: policy, teacher, credit and loss."""

import copy
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import MaxMetric, MeanMetric

from .batch import Credit, RolloutBatch, TokenStats
from .chat import Chat, ChatOptions
from .credit import GEAR, CreditAssigner, Evidence
from .environments.base import Message, Task
from .errors import UserError, require_extra
from .lora import LoRA, add_teacher, without_teacher
from .loss import ClippedSurrogate, LossTerms, PolicyLoss
from .metrics import Quantile
from .models import Float32Buffers, PolicySource, checkpoint_activations, without_dropout
from .optimizers import plain_states, states_from_plain
from .resume import rewind, undo_iteration_start
from .sharding import full, shape
from .strategies import place
from .teacher import Teacher, TeacherOptions, privileged_prompt
from .together import gather
from .token_stats import check_head, token_stats


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """The default optimizer: AdamW, learning rate 1e-6, no weight decay."""
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0)


class GearModule(Float32Buffers, L.LightningModule):
    """Trains a policy on rollouts, with credit assigned token by token.

    Args:
        policy: where the starting weights and the tokenizer come from.
        credit: how a rollout's advantage is spread over its tokens.
        objective: the policy loss.
        teacher: what scores rollouts for the credit rule, and what it sees.
        chat: how messages become text.
        optimizer: of the policy's parameters.
        lr_scheduler: stepped after every optimizer step. Null: constant learning rate.
        lora: train low-rank adapters on the starting weights (extra ``lora``). Null: train all weights.
        activation_checkpointing: keep only the input of each of the policy's layers and compute the layer again in the
            backward pass: far less memory for a slower update, with the same gradients.
    """

    def __init__(
        self,
        policy: PolicySource,
        credit: CreditAssigner = GEAR(),
        objective: PolicyLoss = ClippedSurrogate(),
        teacher: TeacherOptions = TeacherOptions(),
        chat: ChatOptions = ChatOptions(),
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        lora: LoRA | None = None,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.source = policy
        self.credit = credit
        self.objective = objective
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
        self.initial_weights: Path | None = None  # a model directory to start from in place of the source's weights
        self.base: str | None = None  # what loads the weights that adapters lie on; None: the checkpoint alone has them
        self.policy: Any = None
        self._blank: list[Any] = [None]  # see `blank`; in a list, for it is no part of this module
        self.teacher: Teacher | None = None
        self._chat: Chat | None = None
        self._frozen: dict[tuple[int, ...], tuple[Tensor, TokenStats | None, Credit]] = {}
        self.divergence_p95, self.sampler_gap_p95, self.sampler_gap_max = Quantile(0.95), Quantile(0.95), MaxMetric()
        self.val_success, self.val_reward, self.val_turns, self.val_tokens = (MeanMetric() for _ in range(4))

    # -- models ---------------------------------------------------------------------------------------------------

    @property
    def chat_format(self) -> Chat:
        """Tokenizer and chat template of the policy."""
        if self._chat is None:
            self._chat = Chat(self.source.tokenizer(), self.chat_options)
        return self._chat

    @property
    def blank(self) -> Any:
        """The policy's modules without values, where its parameters are spread over the ranks; None elsewhere."""
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
        if self.teacher is None and self.credit.needs_teacher and fitting:
            low = self.trainer.precision in ("bf16-true", "16-true")
            duplicate = self._spread_copy if spread else copy.deepcopy
            self.teacher = Teacher(self.policy, self.teacher_options, low_precision=low, duplicate=duplicate)
        if self.activation_checkpointing and fitting:  # after the teacher's copy, which keeps nothing anyway
            checkpoint_activations(self.policy)

    def _load_policy(self) -> Any:
        policy = without_dropout(self.source.model())
        if self.initial_weights is not None:
            from safetensors.torch import load_model

            load_model(policy, self.initial_weights / "model.safetensors")
        check_head(policy)
        return policy

    def _blank_policy(self) -> Any:
        return without_dropout(self.source.skeleton())

    def _adapted(self, make: Callable[[], Any], teacher: bool) -> Any:
        """A model with its adapters, the teacher's too where they are to be spread over the ranks with the others."""
        policy = make()
        if self.lora is not None:
            self.base = self.source.published() if self.initial_weights is None else None
            self.lora.adapt(policy)
            if teacher and self.credit.needs_teacher and self.teacher_options.weights == "ema":
                add_teacher(policy)
        return policy

    def _spread_copy(self, policy: Any) -> Any:
        strategy: Any = self.trainer.strategy
        return strategy.shard(copy.deepcopy(self.blank), like=policy)

    def privileged_prompt(
        self, task: Task, opening: list[Message], peer: list[Message] | None
    ) -> tuple[list[int], bool]:
        """Ids of what the teacher sees before the response, and whether its text was dropped for length."""
        if not self.credit.needs_teacher:
            return self.chat_format.prompt(opening, task.tools), False
        return privileged_prompt(task, opening, self.chat_format, self.teacher_options, peer)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.policy.parameters() if p.requires_grad])
        if self.trainer.precision == "bf16-mixed" and hasattr(optimizer, "_step_supports_amp_scaling"):
            # Lightning will not clip the gradients of a fused optimizer, which might unscale them again; bfloat16 has
            # no scaler (https://github.com/Lightning-AI/pytorch-lightning/issues/21435)
            setattr(optimizer, "_step_supports_amp_scaling", False)  # noqa: B010
        if self.lr_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    # -- training -------------------------------------------------------------------------------------------------

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Any]:
        self._check_version(batch)
        policy = token_stats(
            self.policy,
            batch.tokens,
            batch.valid,
            batch.action_mask,
            temperature=batch.temperature,
            top_k=self.credit.top_k,
        )
        old_logprobs, teacher, credit = self._freeze(batch, policy)
        terms = self.objective(
            policy.logprobs,
            old_logprobs,
            credit.token_advantages,
            batch.action_mask,
            sampler_logprobs=batch.sampler_logprobs,
            step_tokens=batch.step_tokens,
            step_rollouts=batch.step_rollouts,
        )
        self._log_step(batch, policy, teacher, credit, terms)
        # Lightning divides by the micro-batches of a step, and the strategy averages over ranks: undo both
        loss = terms.loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)
        return {"loss": loss, "credit": credit, "policy": policy, "teacher": teacher}

    def _check_version(self, batch: RolloutBatch) -> None:
        """Rollouts of an older policy would be trained on as if they were the newest one's."""
        versions = batch.policy_version[batch.index >= 0] + batch.inner_epoch
        if (versions != self.global_step).any():
            made = sorted(set((versions - batch.inner_epoch).tolist()))
            raise UserError(
                f"stale rollouts: made by policy version {made}, trained on after {self.global_step} optimizer steps"
            )

    @torch.no_grad()
    def _freeze(self, batch: RolloutBatch, policy: TokenStats) -> tuple[Tensor, TokenStats | None, Credit]:
        """Old log-probs, teacher stats and credit: fixed when a rollout is first scored, reused by later epochs."""
        key = tuple(batch.index.tolist())
        if batch.inner_epoch:
            return self._frozen[key]
        teacher = None
        if self.teacher is not None:
            teacher = self.teacher.score(self.policy, batch, batch.action_mask, policy.top_ids)
        frozen = policy.logprobs.detach(), teacher, self.credit(Evidence.of(batch, policy, teacher))
        self._frozen[key] = frozen
        return frozen

    def on_train_epoch_start(self) -> None:
        self._frozen.clear()

    def _log_position(self) -> None:
        """Put metrics at the number of optimizer steps taken, so that 0 is the policy before its first update."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.log("step", float(self.global_step), batch_size=1)

    def on_train_epoch_end(self) -> None:
        self._log_position()
        for parameter in self.policy.parameters():  # room for the next rollouts
            parameter.grad = None

    def on_train_start(self) -> None:
        if self.teacher is not None and self.teacher_options.park:
            self.teacher.park()

    def optimizer_step(self, epoch: int, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(epoch, batch_idx, *args, **kwargs)
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return  # DeepSpeed counts micro-batches itself, and Lightning calls this for every one
        # here and not in on_train_batch_end: callbacks that save a checkpoint run before the module's own hook
        if self.teacher is not None:
            self.teacher.update(self.policy, self.global_step + 1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        grads = [p.grad for p in self.policy.parameters() if p.grad is not None]
        if grads:  # DeepSpeed keeps them to itself
            self._log("train/grad_norm", full(torch.nn.utils.get_total_norm(grads)), 1)

    def on_train_batch_end(self, outputs: Any, batch: RolloutBatch, batch_idx: int) -> None:
        engine: Any = self.trainer.strategy.model
        if hasattr(engine, "get_global_grad_norm") and (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self._log("train/grad_norm", torch.as_tensor(engine.get_global_grad_norm(), device=self.device), 1)

    # -- evaluation -----------------------------------------------------------------------------------------------

    def _fresh_metrics(self) -> None:
        # metrics last used under inference mode (trainer.validate) could not be updated outside of it
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
            return  # it was cut short, and its mean would be one of other tasks
        self._log_position()
        names = {"success": self.val_success, "reward": self.val_reward, "turns": self.val_turns}
        for name, metric in {**names, "response_tokens": self.val_tokens}.items():
            self.log(f"{stage}/{name}", metric, prog_bar=name == "success")

    # -- logging --------------------------------------------------------------------------------------------------

    def _log_step(
        self, batch: RolloutBatch, policy: TokenStats, teacher: TokenStats | None, credit: Credit, terms: LossTerms
    ) -> None:
        mask = batch.action_mask
        tokens = int(mask.sum())
        rollouts = int((batch.index >= 0).sum())

        def per_token(name: str, total: Tensor) -> None:
            self._log(name, total.float() / max(tokens, 1), tokens)

        per_token("train/entropy", policy.entropy.sum())
        per_token("train/clip_fraction", terms.clipped)
        steps = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches  # of an iteration
        share = terms.loss.detach() / steps
        self.log("train/loss", share, on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True, batch_size=1)
        if terms.sampler_ratio is not None and terms.sampler_truncated is not None:
            per_token("train/sampler_ratio", terms.sampler_ratio)
            per_token("train/sampler_truncated_fraction", terms.sampler_truncated)
        if batch.inner_epoch:
            return
        gap = (policy.logprobs.detach() - batch.sampler_logprobs).abs()[mask]
        self.sampler_gap_p95.update(gap)
        self.log("train/sampler_gap_p95", self.sampler_gap_p95, on_step=False, on_epoch=True)
        self.sampler_gap_max.update(gap.amax() if tokens else gap.new_zeros(()))
        self.log("train/sampler_gap_max", self.sampler_gap_max, on_step=False, on_epoch=True)
        per_token("credit/weight_deviation", (credit.weights - 1).abs().sum())
        if not self.credit.needs_teacher:
            return
        anchors = (credit.anchor >= 0) & (credit.anchor == torch.arange(mask.shape[1], device=mask.device))
        per_token("credit/segment_token_fraction", (credit.anchor >= 0).sum())
        per_token("credit/weight_clip_fraction", mask.sum() * 0 if credit.clipped is None else credit.clipped.sum())
        self._log("credit/segments_per_rollout", anchors.sum().float() / max(rollouts, 1), rollouts)
        if teacher is not None:
            per_token("teacher/student_gap", torch.where(mask, teacher.logprobs - policy.logprobs.detach(), 0).sum())
        self.divergence_p95.update(credit.divergence[mask])
        self.log("credit/divergence_p95", self.divergence_p95, on_step=False, on_epoch=True)

    def _log(self, name: str, value: Tensor, weight: int) -> None:
        # Lightning averages the weights over the ranks as integers, rounded down: make the average one
        weight *= self.trainer.world_size
        self.log(name, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=weight)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["policy_files"] = self.policy_files()
        checkpoint["identity"] = self._identity()
        checkpoint["lora"] = None if self.lora is None else {"options": self.lora.plain(), "base": self.base}
        if self.teacher is not None and (shadow := self.teacher.shadow_state(self.policy)):
            checkpoint["teacher_shadow"] = shadow
        if "optimizer_states" in checkpoint:  # not in one of weights alone
            checkpoint["optimizer_states"] = plain_states(checkpoint["optimizer_states"])
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if data is None:
            return
        if data.unfinished:
            rewind(checkpoint, data.unfinished)
        if data.in_rollouts or (data.unfinished and data.unfinished == data.position):
            undo_iteration_start(checkpoint)
        if data.inner_epochs > 1 and data.position:
            checkpoint["frozen"] = gather([_plain(key, *values) for key, values in self._frozen.items()])

    def policy_files(self) -> dict[str, Tensor]:
        """The policy's configuration, tokenizer and chat template as files: all that export needs beside the weights.

        Returns:
            File name -> bytes, as uint8.
        """
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.policy.config.save_pretrained(folder)
            if getattr(self.policy, "generation_config", None) is not None:
                self.policy.generation_config.save_pretrained(folder)
            self.chat_format.tokenizer.save_pretrained(folder)
            files = sorted(p for p in Path(folder).iterdir() if p.is_file())
            return {p.name: torch.frombuffer(bytearray(p.read_bytes()), dtype=torch.uint8) for p in files}

    def _identity(self) -> dict[str, str]:
        """What a checkpoint's tensors fit to."""
        states = without_teacher(dict(self.policy.named_parameters()))
        sizes = "/".join(str(tuple(shape(p))) for p in states.values())
        return {
            "model.lora": "null" if self.lora is None else f"({self.lora})",
            "model.policy": f"{sum(shape(p).numel() for p in states.values()):,} weights in {len(states)} tensors "
            f"(shapes {hashlib.sha256(sizes.encode()).hexdigest()[:8]})",
            "trainer.precision": str(self.trainer.precision),
            "model.teacher.weights": self.teacher_options.weights if self.credit.needs_teacher else "none",
            "model.optimizer": type(self.optimizer([torch.nn.Parameter(torch.zeros(1))])).__name__,
        }

    def _check_identity(self, made_with: dict[str, str], fitting: bool) -> None:
        for name, now in self._identity().items():
            if not fitting and name != "model.lora":
                continue
            before = made_with.get(name, "null" if name == "model.lora" else now)
            if now != before:
                raise UserError(f"the checkpoint was made with {name}={before}, and this run has {now}")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        self._check_identity(checkpoint.get("identity", {}), fitting)
        if self.lora is not None:
            self.base = checkpoint["lora"]["base"]
        if fitting and "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = states_from_plain(checkpoint["optimizer_states"])
        states = checkpoint["state_dict"]
        if self.teacher is None:  # evaluation, or a credit rule without one
            kept = {k: v for k, v in states.items() if not k.startswith("teacher.")}
            checkpoint["state_dict"] = without_teacher(kept)
        elif self.teacher.model is not None and not any(key.startswith("teacher.model.") for key in states):
            raise UserError(
                "this checkpoint holds no teacher; resume with the credit rule and teacher it was made with"
            )
        if self.teacher is not None:
            self.teacher.load_shadow(self.policy, checkpoint.get("teacher_shadow", []))
        ranks = checkpoint.get("frozen", [])
        if len(ranks) == self.trainer.world_size:
            self._frozen = {
                tuple(item["key"]): (
                    item["old_logprobs"],
                    None if item["teacher"] is None else TokenStats(**item["teacher"]),
                    Credit(**item["credit"]),
                )
                for item in ranks[self.trainer.global_rank]
            }


def _plain(key: tuple[int, ...], old_logprobs: Tensor, teacher: TokenStats | None, credit: Credit) -> dict[str, Any]:
    """Frozen evidence of one micro-batch as plain data."""
    return {
        "key": list(key),
        "old_logprobs": old_logprobs,
        "teacher": None if teacher is None else dict(vars(teacher)),
        "credit": dict(vars(credit)),
    }
