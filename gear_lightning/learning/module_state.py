"""Saving and loading of the module's state in a checkpoint, in addition to its weights."""

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from ..distributed.collective import gather_on_first
from ..distributed.sharding import shape
from ..errors import UserError
from ..models import PolicySource
from ..optimizers import plain_states, states_from_plain
from ..runs.provenance import code_version
from ..runs.resume import rewind, undo_iteration_start
from ..teacher import Teacher, TeacherOptions
from .frozen import Kept
from .hyperparameters import FreshOptimizer, take_up_given
from .lora import TEACHER, LoRA, adapter_keys, without_teacher
from .lora_base import PREFIX, frozen_names, identify, take_up
from .shipped import CONFIG, policy_files


class ModuleState(L.LightningModule):
    """Mixin of `gear_lightning.module.GearModule` that saves and loads its state."""

    source: PolicySource
    policy: Any
    teacher: Teacher | None
    teacher_options: TeacherOptions
    optimizer: Any
    lr_scheduler: Any
    lora: LoRA | None
    base: str | None
    _identity_of_base: dict[str, str] | None = None
    _shipped: dict[str, bytes]
    _base_model: str | None
    _files: dict[str, Tensor] | None = None  # of the policy; cached, as training does not change them
    _frozen: dict[tuple[int, ...], Kept]
    skipped_in_a_row: int

    @property
    def chat_format(self) -> Any:
        """Tokenizer and chat template of the policy."""
        raise NotImplementedError

    @property
    def needs_teacher(self) -> bool:
        """Whether the credit rule or the distillation uses a teacher."""
        raise NotImplementedError

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._files = self._files or self.policy_files()
        checkpoint["policy_files"] = self._files
        checkpoint["made_by"] = {**code_version(), "base_model": self._base_model}
        checkpoint["identity"] = self._identity()
        checkpoint["skipped_in_a_row"] = self.skipped_in_a_row
        checkpoint["lora"] = None if self.lora is None else self._adapters()
        for key in self.left_out():
            checkpoint["state_dict"].pop(key, None)
        writes = self.trainer.is_global_zero
        if self.teacher is not None and (shadow := self.teacher.shadow_state(self.policy, keep=writes)):
            checkpoint["teacher_shadow"] = shadow
        if "optimizer_states" in checkpoint:  # missing in a checkpoint of weights only
            checkpoint["optimizer_states"] = plain_states(checkpoint["optimizer_states"])
            checkpoint["hyperparameters"] = self._fresh_optimizer().given
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if data is None:
            return
        if data.unfinished:
            rewind(checkpoint, data.unfinished)
        if data.in_rollouts or (data.unfinished and data.unfinished == data.position):
            undo_iteration_start(checkpoint)
        if data.inner_epochs > 1 and data.done:
            checkpoint["frozen"] = gather_on_first([{"key": list(key), **kept} for key, kept in self._frozen.items()])

    def left_out(self) -> list[str]:
        """Return the state dict keys that checkpoints omit: frozen weights that can be loaded again."""
        return [] if self.base is None else frozen_names(self.state_dict(keep_vars=True))

    def _adapters(self) -> dict[str, Any]:
        """Return the checkpoint's record of its adapters."""
        assert self.lora is not None
        if self.base is not None and self._identity_of_base is None:
            self._identity_of_base = identify(self.policy)  # once: the frozen weights never change
        frozen = None if self.base is None else self._identity_of_base
        return {"options": self.lora.plain(), "base": self.base, "frozen": frozen}

    def policy_files(self) -> dict[str, Tensor]:
        """Return the policy's configuration, tokenizer and chat template as files: all that export needs.

        Returns:
            File name -> bytes, as uint8.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.chat_format.tokenizer.save_pretrained(folder)
            files = [p for p in Path(folder).rglob("*") if p.is_file()]  # several chat templates go to a subfolder
            made = {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}
        # not by their own `save_pretrained`, which can refuse what it has loaded (see `shipped`)
        made[CONFIG] = self.policy.config.to_json_string().encode()
        generation = getattr(self.policy, "generation_config", None)
        own = {} if generation is None else json.loads(generation.to_json_string(keys_to_pop=["compile_config"]))
        files = policy_files(made, self._shipped, own, self.chat_format.stop_ids)
        return {n: torch.frombuffer(bytearray(files[n]), dtype=torch.uint8) for n in sorted(files) if files[n]}

    def take_origin(self) -> None:
        """Record the origin of the published model now: its files may be gone when a checkpoint is written."""
        self._shipped = self.source.shipped()
        published = self.source.published()
        self._base_model = None if published is None or os.path.isabs(published) else published

    def _identity(self) -> dict[str, str]:
        """Return the properties that must match for a checkpoint's tensors to fit."""
        states = without_teacher(dict(self.policy.named_parameters()))
        sizes = "/".join(str(tuple(shape(p))) for p in states.values())
        return {
            "model.lora": "null" if self.lora is None else f"({self.lora})",
            "model.policy": f"{sum(shape(p).numel() for p in states.values()):,} weights in {len(states)} tensors "
            f"(shapes {hashlib.sha256(sizes.encode()).hexdigest()[:8]})",
            "trainer.precision": str(self.trainer.precision),
            "model.teacher.weights": self.teacher_options.weights if self.needs_teacher else "none",
            "model.optimizer": type(self.optimizer([torch.nn.Parameter(torch.zeros(1))])).__name__,
        }

    def _check_identity(self, made_with: dict[str, str], fitting: bool) -> None:
        for name, now in self._identity().items():
            if not fitting and name != "model.lora":
                continue
            before = made_with.get(name, "null" if name == "model.lora" else now)
            if now != before:
                raise UserError(f"the checkpoint was made with {name}={before}, and this run has {now}")

    def _fresh_optimizer(self) -> FreshOptimizer:
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        return FreshOptimizer(self.optimizer, self.lr_scheduler, parameters)

    def _take_up_optimizer(self, checkpoint: dict[str, Any]) -> None:
        """Prepare a checkpoint's optimizer and schedule states for this run."""
        if "optimizer_states" not in checkpoint:
            raise UserError(
                f"{self.trainer.ckpt_path} holds only weights (checkpoint.save_weights_only), and a run cannot resume "
                "from it; `gear-lightning export` converts it to a model directory, from which a new run can start "
                "(model.policy.path)"
            )
        checkpoint["optimizer_states"] = states_from_plain(checkpoint["optimizer_states"])
        changes = take_up_given(checkpoint, self._fresh_optimizer())
        if changes and self.trainer.is_global_zero:
            told = "; ".join(changes)
            print(f"the optimizer continues with changed hyperparameters: {told}", file=sys.stderr)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        self._check_identity(checkpoint.get("identity", {}), fitting)
        if fitting:
            self.skipped_in_a_row = checkpoint.get("skipped_in_a_row", 0)
            self._take_up_optimizer(checkpoint)
        states = checkpoint["state_dict"]
        if self.teacher is None:  # evaluation, or no component uses a teacher
            kept = {k: v for k, v in states.items() if not k.startswith("teacher.")}
            checkpoint["state_dict"] = without_teacher(kept)
        elif self.teacher.model is not None and not any(key.startswith("teacher.model.") for key in states):
            raise UserError(
                "this checkpoint holds no teacher; resume with the credit rule, distillation and teacher of the run "
                "that wrote it"
            )
        if self.teacher is not None:
            shadow = checkpoint.get("teacher_shadow", [])
            if self.teacher.adapted and shadow:  # written by an older version, whose adapters were bfloat16
                names = [PREFIX + key for key in adapter_keys(self.policy, TEACHER)]
                checkpoint["state_dict"].update(zip(names, shadow, strict=True))
            else:
                self.teacher.load_shadow(self.policy, shadow)
        if self.lora is not None:
            take_up(self, checkpoint, fitting)
        ranks = checkpoint.get("frozen", [])
        if len(ranks) == self.trainer.world_size:
            mine = [dict(item) for item in ranks[self.trainer.global_rank]]
            self._frozen = {tuple(item.pop("key")): item for item in mine}
