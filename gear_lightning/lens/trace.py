"""One recorded rollout, extracted from its record for display: runs, columns, and the text of its tokens."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, printable
from ..runs.records import Record

Decode = Callable[[int], str]
Run = tuple[int, int, int]
CREDIT_COLUMNS = ("weights", "token_advantages", "divergence")  # output of a credit rule; the rest is evidence
COLUMNS = ("entropy", "teacher_entropy", "policy_logprobs", "teacher_logprobs", "sampler_logprobs", *CREDIT_COLUMNS)


@dataclass(frozen=True)
class Trace:
    """One rollout with its row of the record's tensors: T tokens, N of them sampled by the policy.

    Attributes:
        rollout: its JSON object (see `gear_lightning.runs.records.ROLLOUT_KEYS`).
        advantage: group advantage; None without a row, or if it is not finite.
        tokens: T ids; empty without a row.
        sections: runs (turn, start, end) that cover all T tokens in order; turn -1 is prompt or observation.
        segments: runs (anchor, start, end) of the tokens that share an anchor, in order.
        columns: N values each, under the names of `gear_lightning.runs.records.TENSOR_KEYS`; those of the teacher are
            missing if they are zeros (no teacher ran).
        decisions: runs (1 for right or -1 for wrong, start, end) of the tokens that the environment judged; a run does
            not extend over several turns.
        solved: number of solved rollouts of the group; None without a row.
    """

    rollout: dict[str, Any]
    advantage: float | None
    tokens: list[int]
    sections: list[Run]
    segments: list[Run]
    columns: dict[str, Tensor]
    decisions: list[Run]
    solved: int | None

    @property
    def sampled(self) -> int:
        """N, the number of tokens that the policy sampled."""
        return sum(end - start for turn, start, end in self.sections if turn >= 0)

    @property
    def anchors(self) -> set[int]:
        """Indices of the anchor tokens, one per segment."""
        return {anchor for anchor, _, _ in self.segments}

    @property
    def covered(self) -> int:
        """Number of tokens in segments."""
        return sum(end - start for _, start, end in self.segments)


def _runs(values: Tensor) -> list[Run]:
    runs, start = [], 0
    for value, same in groupby(values.tolist()):
        end = start + len(list(same))
        runs.append((value, start, end))
        start = end
    return runs


def trace(record: Record, index: int) -> Trace:
    """Return the rollout at position ``index`` of a record.

    Raises:
        UserError: the rollout names a row that the record's tensors do not have.
    """
    rollout, tensors = record.rollouts[index], record.tensors
    row = rollout["row"]
    if row is None:
        return Trace(rollout, None, [], [], [], {}, [], None)
    if not 0 <= row < len(tensors["tokens"]):
        raise UserError(
            f"iteration {record.iteration}, rank {record.rank}: rollout {index} names row {row}, but the tensors have "
            f"{len(tensors['tokens'])} rows"
        )
    length = int(tensors["valid"][row].sum())
    action = tensors["action_mask"][row, :length]
    columns = {name: tensors[name][row, :length][action] for name in COLUMNS}
    for name in ("teacher_logprobs", "teacher_entropy"):
        if not columns[name].any():
            del columns[name]
    advantage = float(tensors["advantages"][row])
    turns = torch.where(action, tensors["turn_ids"][row, :length].clamp_min(0), -1)
    marks = torch.where(action, tensors["decisions"][row, :length].sign(), 0)
    sections = _runs(turns)
    return Trace(
        rollout,
        advantage if math.isfinite(advantage) else None,
        tensors["tokens"][row, :length].tolist(),
        sections,
        [run for run in _runs(torch.where(action, tensors["anchor"][row, :length], -1)) if run[0] >= 0],
        columns,
        [(m, start + a, start + b) for _, start, end in sections for m, a, b in _runs(marks[start:end]) if m],
        int(tensors["solved"][row]),
    )


def visible(piece: str) -> str:
    """Return a token's text with visible whitespace and control characters; a line break is shown and kept."""
    if piece.isspace():
        piece = piece.replace(" ", "·")
    for character, shown in (("\n", "⏎\n"), ("\t", "⇥"), ("\r", "␍")):
        piece = piece.replace(character, shown)
    return printable(piece) or "∅"


def load_decoder(run: Path) -> Decode:
    """Return a function that decodes single token ids with the tokenizer saved in ``run/tokenizer``.

    A token is shown as in the middle of a text, with the space that its tokenizer puts before it; bytes that do not
    form a whole character are shown as ``\\xf0``.

    Raises:
        UserError: there is no tokenizer, or it cannot be loaded.
    """
    folder = Path(run) / "tokenizer"
    if not folder.is_dir():
        raise UserError(f"{folder}: no tokenizer; is this a run directory?")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{folder}: cannot be loaded as a tokenizer ({error})") from None
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the byte alphabet of byte-level tokenizers
    alphabet = {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in plain)}
    alphabet |= {chr(b): b for b in plain}
    known: dict[int, str] = {}

    def text(*ids: int) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def decode(token: int) -> str:
        if token not in known:
            once, twice = text(token), text(token, token)
            known[token] = twice[len(once) :] if twice.startswith(once) else once
            if "\N{REPLACEMENT CHARACTER}" in once:
                piece = tokenizer.convert_ids_to_tokens(token)
                if all(c in alphabet for c in piece):
                    piece = bytes(alphabet[c] for c in piece).decode(errors="backslashreplace")
                known[token] = piece
        return known[token]

    return decode
