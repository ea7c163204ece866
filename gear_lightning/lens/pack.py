"""Data of recorded rollouts for the credit page: short JSON with typed arrays in base64."""

import json
from base64 import b64encode
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from ..batch import Credit
from ..errors import UserError
from ..runs.records import Record
from .trace import CREDIT_COLUMNS, Decode, Trace, trace, visible

# Short names of columns, which contain only the sampled tokens; those of `_OF_A_RULE` belong to a set of credit.
_COLUMNS = {
    "h": "entropy",
    "e": "teacher_entropy",
    "p": "policy_logprobs",
    "t": "teacher_logprobs",
    "s": "sampler_logprobs",
}
_OF_A_RULE = {"w": "weights", "a": "token_advantages", "d": "divergence"}
_FACTS = (
    "task_id",
    "group_id",
    "rollout",
    "reward",
    "reward_parts",
    "success",
    "status",
    "error",
    "turns",
    "policy_version",
)
_SMALL, _LARGE = 2**15 - 1, 2**31 - 1


def pack_integers(values: np.ndarray) -> str:
    """Return a letter and base64 of little-endian integers: ``s`` for 16 bits, ``l`` for 32.

    Args:
        values: float64 [N] whole numbers. Values that are not finite become the smallest integer of the type; values
            outside 32 bits are clipped.
    """
    known = np.isfinite(values)
    whole = np.clip(np.where(known, values, 0), -_LARGE, _LARGE)
    small = bool((np.abs(whole) <= _SMALL).all())
    missing = -_SMALL - 1 if small else -_LARGE - 1
    integers = np.where(known, whole, missing).astype("<i2" if small else "<i4")
    return ("s" if small else "l") + b64encode(integers.tobytes()).decode()


def _thousandths(values: Tensor) -> str | int:
    """Pack values in thousandths: enough digits for a reader. Return one number if all values are equal."""
    scaled = np.round(values.double().numpy() * 1000)
    if len(scaled) and bool((scaled == scaled[0]).all()) and abs(scaled[0]) <= _LARGE:
        return int(scaled[0])
    return pack_integers(scaled)


def _set(one: Trace) -> dict[str, Any]:
    """Return one set of credit: runs (anchor, start, end), and columns."""
    return {"segments": one.segments} | {key: _thousandths(one.columns[name]) for key, name in _OF_A_RULE.items()}


def _entry(record: Record, index: int, vocabulary: dict[int, int], others: list[Credit | None]) -> dict[str, Any]:
    """Return one rollout in the form that the page's script reads.

    ``ids`` are indices in the vocabulary, runs and columns as in `Trace`, ``credits`` one set for each assigner, the
    recorded one first; ``messages`` only if there are no tokens.
    """
    one = trace(record, index)
    entry: dict[str, Any] = {key: one.rollout.get(key) for key in _FACTS}
    entry["error"] = entry["error"] or one.rollout.get("side_error")
    entry |= {"iteration": record.iteration, "rank": record.rank, "index": index, "advantage": one.advantage}
    if not one.tokens:
        return entry | {"messages": one.rollout["messages"]}
    places = np.array([vocabulary.setdefault(token, len(vocabulary)) for token in one.tokens], dtype=np.float64)
    return entry | {
        "ids": pack_integers(places),
        "sections": one.sections,
        "decisions": one.decisions,
        "solved": one.solved,
        "columns": {key: _thousandths(one.columns[name]) for key, name in _COLUMNS.items() if name in one.columns},
        "credits": [_set(one), *(_set(trace(_with(record, credit), index)) for credit in others)],
    }


def _with(record: Record, credit: Credit | None) -> Record:
    """Return the record with the credit of another rule.

    Raises:
        UserError: there is no credit for it, or the credit has another shape.
    """
    shape = record.tensors["tokens"].shape
    if credit is None or credit.weights.shape != shape:
        found = "none" if credit is None else f"{list(credit.weights.shape)}"
        raise UserError(
            f"iteration {record.iteration}, rank {record.rank}: credit to compare with is {found}, expected "
            f"{list(shape)}, the record's rollouts and tokens"
        )
    values = {name: getattr(credit, name).detach().cpu() for name in (*CREDIT_COLUMNS, "anchor")}
    return Record(record.iteration, record.rank, record.rollouts, {**record.tensors, **values})


def pack_rollouts(
    records: list[Record],
    decode: Decode,
    others: dict[str, Sequence[Credit | None]],
    max_rollouts: int,
    max_bytes: int,
    left_out: int,
    opens: tuple[int, int],
) -> str:
    """Return the page's data as JSON, newest iterations first.

    Args:
        records: in any order.
        decode: returns the text of a token id.
        others: name of an assigner -> its credit for each record, in the order of ``records``; None if a record has no
            tokens.
        max_rollouts: maximum number of rollouts.
        max_bytes: no further rollouts are added above this size.
        left_out: number of rollouts that the caller has already omitted.
        opens: the sets of credit that the page shows first, left and right; if a set does not exist, the last one.
    """
    for name, credits in others.items():
        if len(credits) != len(records):
            raise UserError(f"credit of {name} is for {len(credits)} records, expected {len(records)}")
    order = sorted(range(len(records)), key=lambda i: (-records[i].iteration, records[i].rank))
    vocabulary: dict[int, int] = {}

    def entries() -> Iterator[str]:
        for i in order:
            there = [credits[i] for credits in others.values()]
            for index in range(len(records[i].rollouts)):
                entry = _entry(records[i], index, vocabulary, there)
                yield json.dumps(entry, allow_nan=False, separators=(",", ":"))

    packed, size = [], 0
    for entry in islice(entries(), max_rollouts):
        if packed and size + len(entry) > max_bytes:
            break
        packed.append(entry)
        size += len(entry)
    left_out += sum(len(record.rollouts) for record in records) - len(packed)
    words = json.dumps([[token, visible(decode(token))] for token in vocabulary], separators=(",", ":"))
    names, first = json.dumps(["recorded", *others]), [min(n, len(others)) for n in opens]
    return (
        f'{{"left_out":{left_out},"sets":{names},"opens":{first},"vocabulary":{words},"rollouts":[{",".join(packed)}]}}'
    )
