"""Write every iteration's rollouts, with their credit, into the run directory."""

import json
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from gear_lightning.batch import FILL, RolloutBatch
from gear_lightning.credit import RoundingNoise
from gear_lightning.errors import UserError
from gear_lightning.rollout import Rollout
from gear_lightning.runs.files import replace_file, try_to_write
from gear_lightning.runs.records import FORMAT, TENSOR_KEYS, record_files, write_record


class RolloutRecorder(L.Callback):
    """Writes rollouts to ``RUN/rollouts`` (layout: `gear_lightning.runs.records`), and those of ``predict`` to
    ``RUN/predictions/rank_R.jsonl``. It does not change training.

    Args:
        every_n_iterations: record every n-th iteration.
        keep_last: number of recorded iterations to keep; older files are deleted. Null: all.
    """

    def __init__(self, every_n_iterations: int = 1, keep_last: int | None = None):
        for name, value in (("every_n_iterations", every_n_iterations), ("keep_last", keep_last)):
            if value is not None and value < 1:
                raise UserError(f"recorder.{name}={value}: must be at least 1")
        self.every_n_iterations = every_n_iterations
        self.keep_last = keep_last
        self._parts: list[dict[str, Tensor]] = []

    def _wanted(self, trainer: L.Trainer) -> bool:
        return trainer.current_epoch % self.every_n_iterations == 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / "tokenizer"
            try_to_write("tokenizer's files", lambda: _save_tokenizer(pl_module.chat_format.tokenizer, folder))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._parts = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        if not self._wanted(trainer) or batch.inner_epoch:
            return
        if (batch.index >= 0).any():
            self._take(outputs, batch)
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if data.position == data.micro_batches:  # before the evaluation, during which the run may be stopped
            try_to_write("rollout records", lambda: self._record(trainer, data))

    def _take(self, outputs: Any, batch: RolloutBatch) -> None:
        policy, teacher, credit = outputs["policy"], outputs["teacher"], outputs["credit"]
        zeros = torch.zeros_like(policy.logprobs)
        part = {
            **{name: getattr(batch, name) for name in BATCH_KEYS},
            "policy_logprobs": policy.logprobs.detach(),
            "teacher_logprobs": zeros if teacher is None else teacher.logprobs,
            "entropy": policy.entropy,
            "teacher_entropy": zeros if teacher is None else teacher.entropy,
            **{name: getattr(credit, name) for name in ("weights", "token_advantages", "divergence", "anchor")},
        }
        self._parts.append({name: value.cpu() for name, value in part.items()})

    def _record(self, trainer: L.Trainer, data: Any) -> None:
        tensors = _join(self._parts)
        index = tensors.pop("index").tolist() if self._parts else []
        row_of = {place: row for row, place in enumerate(index)}
        module: Any = trainer.lightning_module
        noise = module.noise if self._parts else None
        rollouts = [
            rollout_json(trainer, rollout, group.group_id, r, row_of.get(g * data.group_size + r), noise)
            for g, group in enumerate(data.groups)
            for r, rollout in enumerate(group.rollouts)
        ]
        folder = Path(trainer.default_root_dir) / "rollouts"
        write_record(folder, trainer.current_epoch, trainer.global_rank, rollouts, tensors)
        if trainer.is_global_zero:  # a run that resumes with fewer processes may repeat this iteration
            for iteration, rank, path in record_files(Path(trainer.default_root_dir)):
                if iteration == trainer.current_epoch and rank >= trainer.world_size:
                    path.unlink()
                    path.with_suffix(".safetensors").unlink(missing_ok=True)
        if self.keep_last is not None:
            old = trainer.current_epoch - self.keep_last * self.every_n_iterations
            for path in folder.glob(f"iter_{old:06d}.rank_{trainer.global_rank}.*"):
                path.unlink()

    # -- predict --------------------------------------------------------------------------------------------------

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._predictions(trainer).parent.mkdir(parents=True, exist_ok=True)
        self._predictions(trainer).write_text("")

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        with self._predictions(trainer).open("a") as file:  # append each batch: a kill loses at most one batch
            for group in data.groups:
                for rollout in group.rollouts:
                    line = rollout_json(trainer, rollout, group.group_id, 0, None)
                    file.write(json.dumps(line, allow_nan=False, default=str) + "\n")

    @staticmethod
    def _predictions(trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "predictions" / f"rank_{trainer.global_rank}.jsonl"


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files, each atomically: on a full disk, the files of an earlier start remain."""
    with tempfile.TemporaryDirectory() as aside:
        tokenizer.save_pretrained(aside)
        for path in (p for p in Path(aside).rglob("*") if p.is_file()):  # several chat templates are in a subfolder
            content = path.read_bytes()
            replace_file(folder / path.relative_to(aside), lambda file, content=content: file.write(content))


def rollout_json(
    trainer: L.Trainer,
    rollout: Rollout,
    group_id: int,
    number: int,
    row: int | None,
    noise: RoundingNoise | None = None,
) -> dict[str, Any]:
    """Return a rollout as one line of a record (see `gear_lightning.runs.records.ROLLOUT_KEYS`)."""
    return {
        "format": FORMAT,
        "iteration": trainer.current_epoch,
        "rank": trainer.global_rank,
        "row": row,
        "task_id": rollout.task.id,
        "group_id": group_id,
        "rollout": number,
        "messages": rollout.messages,
        "reward": rollout.reward if rollout.learnable else None,
        "reward_parts": rollout.reward_parts,
        "success": rollout.success,
        "status": rollout.status,
        "error": rollout.error,
        "side_error": rollout.side_error,
        "tool_errors": rollout.tool_errors,
        "retries": rollout.retries,
        "turns": rollout.turns,
        "turn_rewards": rollout.turn_rewards,
        "states": rollout.states,
        "feedback": rollout.feedback,
        "policy_version": rollout.policy_version,
        "closed_thoughts": rollout.closed_thoughts,
        "noise": None if noise is None or row is None else noise._asdict(),
    }


BATCH_KEYS = (
    "tokens",
    "valid",
    "action_mask",
    "turn_ids",
    "stop_mask",
    "sampler_logprobs",
    "rewards",
    "advantages",
    "base_advantages",
    "decisions",
    "parts",
    "versions",
    "solved",
    "privileged",
    "group_ids",
    "policy_version",
    "index",
)


def _join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate micro-batches, padded to the longest row."""
    if not parts:
        return {name: torch.zeros(0) for name in TENSOR_KEYS}
    width = max(part["tokens"].shape[1] for part in parts)

    def pad(name: str, x: Tensor) -> Tensor:
        if x.dim() == 1:
            return x
        fill = {"anchor": -1, "weights": 1, **FILL}.get(name, 0)
        return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=fill)

    return {name: torch.cat([pad(name, part[name]) for part in parts]) for name in parts[0]}
