"""Rollout records on disk: a JSONL file and a safetensors file per iteration and rank.

``rollouts/iter_NNNNNN.rank_R.jsonl`` holds one JSON object per rollout (keys: see `ROLLOUT_KEYS`); ``row`` is the
rollout's row in the tensors of ``iter_NNNNNN.rank_R.safetensors``, null where the rollout was excluded from learning.
The tensors (see `TENSOR_KEYS`) are what training used, so that credit can be recomputed by anyone.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import UserError
from .files import replace_file, replace_text

FORMAT = 1
TENSOR_KEYS = {
    "tokens": "int64 [B, T] prompt, actions and observations, right-padded with 0",
    "valid": "bool [B, T] not padding",
    "action_mask": "bool [B, T] sampled by the policy",
    "turn_ids": "int64 [B, T] assistant turn, -1 elsewhere",
    "stop_mask": "bool [B, T] sampled stop tokens",
    "sampler_logprobs": "float32 [B, T] nats, as reported by the engine",
    "policy_logprobs": "float32 [B, T] nats, from the training forward",
    "teacher_logprobs": "float32 [B, T] nats; zeros where no teacher ran",
    "entropy": "float32 [B, T] nats, of the policy's full distribution",
    "divergence": "float32 [B, T] as the credit rule used it (signed for k1)",
    "weights": "float32 [B, T] credit weights; 1 where credit is uniform",
    "token_advantages": "float32 [B, T] weight x group advantage",
    "anchor": "int64 [B, T] index of the segment's anchor token, -1 outside segments",
    "rewards": "float32 [B]",
    "advantages": "float32 [B] after the group baseline",
    "privileged": "bool [B] the teacher saw more than the policy; elsewhere credit is uniform",
    "group_ids": "int64 [B]",
    "policy_version": "int64 [B]",
}
ROLLOUT_KEYS = {
    "format": "version of this layout",
    "iteration": "RL iteration, from 0",
    "rank": "process that made the rollout",
    "row": "row in the safetensors file, or null",
    "task_id": "the task's id",
    "group_id": "number of the group in the run",
    "rollout": "number of the rollout in its group, from 0",
    "messages": "the whole transcript, prompt included",
    "reward": "total reward, or null where it is unknown",
    "reward_parts": "name -> value",
    "success": "whether the task counts as solved",
    "status": "see gear_lightning.rollout.Status",
    "error": "what went wrong, or null",
    "turns": "assistant turns",
    "policy_version": "optimizer steps taken before sampling",
}
_NAME = re.compile(r"iter_(\d{6,})\.rank_(\d+)\.jsonl$")


@dataclass(frozen=True)
class Record:
    """One iteration's rollouts of one rank, as read back."""

    iteration: int
    rank: int
    rollouts: list[dict[str, Any]]
    tensors: dict[str, Tensor]


def write_record(folder: Path, iteration: int, rank: int, rollouts: list[dict[str, Any]], tensors: dict[str, Tensor]):
    """Write one record atomically: readers see a whole file or none; the JSONL file appears last."""
    from safetensors.torch import save

    stem = f"iter_{iteration:06d}.rank_{rank}"
    content = save({k: v.contiguous() for k, v in tensors.items()}, metadata={"format": str(FORMAT)})
    replace_file(folder / f"{stem}.safetensors", lambda file: file.write(content))
    lines = "".join(json.dumps(r, allow_nan=False, default=str) + "\n" for r in rollouts)
    replace_text(folder / f"{stem}.jsonl", lines)


def record_files(run: Path) -> list[tuple[int, int, Path]]:
    """(iteration, rank, JSONL file) of every record of a run directory, in order."""
    found = []
    for path in (Path(run) / "rollouts").glob("iter_*.rank_*.jsonl"):
        if match := _NAME.search(path.name):
            found.append((int(match[1]), int(match[2]), path))
    return sorted(found)


def read_records(run: Path, iterations: list[int] | None = None) -> Iterator[Record]:
    """Read a run's records in order.

    Args:
        run: the run directory (holds ``rollouts/``).
        iterations: only these; None for all.

    Raises:
        UserError: no records, a record of another format, or a file that cannot be read; names the file and line.
    """
    from safetensors.torch import load_file

    files = record_files(run)
    if not files:
        raise UserError(f"{Path(run) / 'rollouts'}: no rollout records; is this a run directory?")
    for iteration, rank, path in files:
        if iterations is not None and iteration not in iterations:
            continue
        rollouts = []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                rollouts.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not a JSON object ({error.msg})") from None
            if rollouts[-1].get("format") != FORMAT:
                raise UserError(
                    f"{path}:{number}: record format {rollouts[-1].get('format')!r}; this version reads {FORMAT}"
                )
        tensor_file = path.with_suffix(".safetensors")
        try:
            tensors = load_file(tensor_file)
        except Exception as error:
            raise UserError(f"{tensor_file}: cannot be read ({error})") from None
        yield Record(iteration, rank, rollouts, tensors)


def ledger(run: Path) -> list[tuple[int, int, str]]:
    """What a run has been trained on: (iteration, group id, task id) of every group, in order.

    Raises:
        UserError: as `read_records`.
    """
    return sorted({(r["iteration"], r["group_id"], r["task_id"]) for x in read_records(run) for r in x.rollouts})
