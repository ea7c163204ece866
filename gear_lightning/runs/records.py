"""Rollout records on disk: a JSONL file and a safetensors file per iteration and rank.

``rollouts/iter_NNNNNN.rank_R.jsonl`` holds one JSON object per rollout (keys: see `ROLLOUT_KEYS`). ``row`` is the
rollout's row in the tensors of ``iter_NNNNNN.rank_R.safetensors``, or null if the rollout was excluded from learning.
The tensors (see `TENSOR_KEYS`) are those that training used, so that credit can be recomputed from them.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checks import deeper_than
from ..errors import UserError
from .files import replace_file, replace_text

FORMAT = 2
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
    "teacher_entropy": "float32 [B, T] nats, of the teacher's; zeros where no teacher ran",
    "divergence": "float32 [B, T] as used by the credit rule (signed for k1)",
    "weights": "float32 [B, T] credit weights; 1 where credit is uniform",
    "base_advantages": "float32 [B, T] before credit: advantage of the rollout or of its turn",
    "token_advantages": "float32 [B, T] weight x base advantage",
    "decisions": "int64 [B, T] 1 in a right decision, -1 in a wrong decision, 0 elsewhere or if unknown",
    "parts": "int64 [B, T] 1 in reasoning, 2 in a tool call, 0 elsewhere; records of earlier versions, which lack it, "
    "are read with zeros",
    "versions": "int64 [B, T] optimizer steps taken by the policy that sampled the token, -1 elsewhere; records of "
    "earlier versions, which lack it, are read with policy_version",
    "anchor": "int64 [B, T] index of the segment's anchor token, -1 outside segments",
    "rewards": "float32 [B]",
    "advantages": "float32 [B] after the group baseline",
    "privileged": "bool [B] the teacher saw more than the policy; if not, credit is uniform",
    "solved": "int64 [B] number of solved rollouts of the group",
    "group_ids": "int64 [B]",
    "policy_version": "int64 [B]",
}
ROLLOUT_KEYS = {
    "format": "version of this layout",
    "iteration": "RL iteration, from 0",
    "rank": "process that learned from the rollout",
    "row": "row in the safetensors file, or null",
    "task_id": "the task's id",
    "group_id": "number of the group in the run",
    "rollout": "number of the rollout in its group, from 0",
    "messages": "the full transcript, including the prompt",
    "reward": "total reward, or null if it is unknown",
    "reward_parts": "name -> value",
    "success": "whether the task counts as solved",
    "status": "see gear_lightning.rollout.Status",
    "error": "reason for its status, or null",
    "side_error": "the first failure that changed neither status nor reward (close(), an unusable decision), or null",
    "tool_errors": "exceptions of tools that the policy has read as answers; absent in records of earlier versions",
    "retries": "earlier attempts whose reset failed",
    "turns": "number of assistant turns",
    "turn_rewards": "the environment's reward for each turn; the length penalty is subtracted from the last one",
    "states": "the environment's state before each turn: as it reports it, or its last messages",
    "feedback": "the environment's feedback on the rollout, or null",
    "policy_version": "optimizer steps taken before the rollout was begun",
    "closed_thoughts": "marks that closed reasoning (budgets.thinking_tokens); absent in records of earlier versions",
    "noise": "the rounding error that the credit rule assumed, 99th percentiles in nats: log_ratio, divergence (see "
    "gear_lightning.credit.RoundingNoise). Null if there is no row; absent in records of earlier versions, which "
    "assumed none",
}
_KINDS: dict[str, tuple[type, ...]] = {  # types on which readers rely
    "row": (int, type(None)),
    "task_id": (str,),
    "group_id": (int,),
    "rollout": (int,),
    "messages": (list,),
    "reward": (float, int, type(None)),
    "reward_parts": (dict,),
    "success": (bool,),
    "status": (str,),
    "error": (str, type(None)),
    "turns": (int,),
    "turn_rewards": (list,),
    "states": (list,),
    "feedback": (str, type(None)),
    "policy_version": (int,),
}
MAX_DEPTH = 200  # maximum nesting of lists and objects
_NAME = re.compile(r"iter_(\d{6,})\.rank_(\d+)\.jsonl$")


@dataclass(frozen=True)
class Record:
    """One iteration's rollouts of one rank, read from a file."""

    iteration: int
    rank: int
    rollouts: list[dict[str, Any]]
    tensors: dict[str, Tensor]


def write_record(folder: Path, iteration: int, rank: int, rollouts: list[dict[str, Any]], tensors: dict[str, Tensor]):
    """Write one record atomically: readers see a complete file or none. The JSONL file appears last."""
    from safetensors.torch import save

    stem = f"iter_{iteration:06d}.rank_{rank}"
    content = save({k: v.contiguous() for k, v in tensors.items()}, metadata={"format": str(FORMAT)})
    replace_file(folder / f"{stem}.safetensors", lambda file: file.write(content))
    lines = "".join(json.dumps(r, allow_nan=False, default=str) + "\n" for r in rollouts)
    replace_text(folder / f"{stem}.jsonl", lines)


def record_files(run: Path) -> list[tuple[int, int, Path]]:
    """Return (iteration, rank, JSONL file) of every record of a run directory, in order."""
    found = []
    for path in (Path(run) / "rollouts").glob("iter_*.rank_*.jsonl"):
        if match := _NAME.search(path.name):
            found.append((int(match[1]), int(match[2]), path))
    return sorted(found)


def read_records(run: Path, iterations: list[int] | None = None) -> Iterator[Record]:
    """Read a run's records in order.

    Args:
        run: the run directory, which holds ``rollouts/``.
        iterations: read only these; None for all.

    Raises:
        UserError: there are no records, a record has another format, a file cannot be read, or two files do not belong
            together; names the file and line.
    """
    from safetensors.torch import load_file

    files = record_files(run)
    if not files:
        raise UserError(f"{Path(run) / 'rollouts'}: no rollout records; is this a run directory?")
    for iteration, rank, path in files:
        if iterations is not None and iteration not in iterations:
            continue
        with path.open("rb") as lines:
            rollouts = [_rollout(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
        tensor_file = path.with_suffix(".safetensors")
        try:
            tensors = load_file(tensor_file)
        except Exception as error:
            raise UserError(f"{tensor_file}: cannot be read ({error})") from None
        if any(rollout["row"] is not None for rollout in rollouts):
            _check_tensors(tensors, tensor_file)
        _check_rows(rollouts, tensors, path, tensor_file)
        yield Record(iteration, rank, rollouts, tensors)


def ledger(run: Path) -> list[tuple[int, int, str]]:
    """Return which tasks a run was trained on: (iteration, group id, task id) of every group, in order.

    Raises:
        UserError: see `read_records`.
    """
    return sorted({(r["iteration"], r["group_id"], r["task_id"]) for x in read_records(run) for r in x.rollouts})


def _rollout(line: bytes, where: str) -> dict[str, Any]:
    """Parse and check one line of a record, which may come from an untrusted source.

    Raises:
        UserError: `write_record` could not have written the line.
    """
    try:
        rollout = json.loads(line.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: not a JSON object ({reason})") from None
    if not isinstance(rollout, dict):
        raise UserError(f"{where}: not a JSON object")
    if rollout.get("format") != FORMAT:
        raise UserError(f"{where}: record format {rollout.get('format')!r}; this version reads {FORMAT}")
    for name, kinds in _KINDS.items():
        value = rollout.get(name)
        if type(value) not in kinds:
            raise UserError(f"{where}: {name} is {type(value).__name__}, expected {kinds[0].__name__}")
    noise = rollout.get("noise")
    if noise is not None and not (
        isinstance(noise, dict)
        and noise.keys() == {"log_ratio", "divergence"}
        and all(type(size) in (int, float) and 0 <= size < math.inf for size in noise.values())
    ):
        raise UserError(f"{where}: noise must hold two non-negative numbers, log_ratio and divergence")
    if not all(isinstance(message, dict) for message in rollout["messages"]):
        raise UserError(f"{where}: messages must be a list of objects")
    if deeper_than(MAX_DEPTH, rollout):
        raise UserError(f"{where}: nested more than {MAX_DEPTH} levels deep")
    return rollout


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_tensors(tensors: dict[str, Tensor], where: Path) -> None:
    """Check the tensors against `TENSOR_KEYS`, and add those that records of earlier versions lack.

    Raises:
        UserError: a tensor is missing, or has another shape or dtype; names the tensor.
    """
    import torch

    size = tuple(tensors["tokens"].shape) if "tokens" in tensors else ()
    if len(size) != 2:
        raise UserError(f"{where}: tokens is not a matrix")
    tensors.setdefault("parts", torch.zeros(size, dtype=torch.int64))
    if "versions" not in tensors and {"action_mask", "policy_version"} <= tensors.keys():
        mask, version = tensors["action_mask"], tensors["policy_version"]
        if mask.shape == size and version.shape == size[:1]:  # else the check below reports it
            tensors["versions"] = torch.where(mask.bool(), version[:, None], -1)
    for name, text in TENSOR_KEYS.items():
        kind, wanted = getattr(torch, text.split()[0]), size if "[B, T]" in text else size[:1]
        found = tensors.get(name)
        if found is None or found.dtype != kind or tuple(found.shape) != wanted:
            what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise UserError(f"{where}: {name} is {what}, expected {kind} {list(wanted)}")
    if bool((tensors["tokens"] < 0).any()):
        raise UserError(f"{where}: tokens holds negative ids")


def _check_rows(rollouts: list[dict[str, Any]], tensors: dict[str, Tensor], path: Path, tensor_file: Path) -> None:
    """Check that a record's two files hold the same rollouts.

    Raises:
        UserError: they do not; names the line, or the row that no line refers to.
    """
    lines = {rollout["row"]: number for number, rollout in enumerate(rollouts, 1) if rollout["row"] is not None}
    groups = tensors.get("group_ids")
    known = [] if groups is None or groups.dim() != 1 else groups.tolist()
    for number, rollout in enumerate(rollouts, 1):
        row = rollout["row"]
        if row is None:
            continue
        if not 0 <= row < len(known):
            raise UserError(f"{path}:{number}: refers to row {row}, but {tensor_file.name} has {len(known)} rows")
        for name, there in (("group_id", known[row]), ("policy_version", int(tensors["policy_version"][row]))):
            if rollout[name] != there:
                raise UserError(
                    f"{tensor_file}: row {row} has {name} {there}, but {path.name}:{number} has {rollout[name]}: "
                    "these files do not hold the same rollouts"
                )
    lost = [row for row, group in enumerate(known) if group >= 0 and row not in lines]  # -1: padding of a micro-batch
    if lost:
        raise UserError(
            f"{path}: no line refers to row {lost[0]} of {tensor_file.name} ({len(lost)} of {len(known)} rows have no "
            "line); lines are missing. Restore the file, or move both files away to skip this iteration"
        )
