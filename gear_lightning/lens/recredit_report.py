"""Output of ``gear-lightning recredit``, built from the data that it writes as JSON."""

import math
from dataclasses import asdict, is_dataclass
from typing import Any

from ..credit import CreditAssigner
from .difference import CHANGED, Change
from .recredit import told
from .trace import Decode, visible

MOST_ROWS = 20  # maximum iterations in a table; the JSON file has all


def rule_data(rule: CreditAssigner) -> dict[str, Any]:
    """Return a rule as plain data."""
    options = asdict(rule) if is_dataclass(rule) else {}
    return {
        "class": f"{type(rule).__module__}.{type(rule).__qualname__}",
        "options": options,
        "told": told(rule),
        "lacks": rule.lacks,
    }


def change_data(change: Change, rollouts: list[dict[str, Any]], index: int, decode: Decode) -> dict[str, Any]:
    """Return a changed token as plain data, with decoded text.

    Args:
        change: the token.
        rollouts: those of its record.
        index: position of its rollout in ``rollouts``.
        decode: returns the text of a token id.
    """
    rollout = rollouts[index]
    before, text, after = ("".join(map(decode, ids)) for ids in (change.before, [change.id], change.after))
    return {
        "iteration": change.iteration,
        "rank": change.rank,
        "task_id": rollout["task_id"],
        "group_id": rollout["group_id"],
        "rollout": rollout["rollout"],
        "page": f"i{change.iteration}.r{change.rank}.{index}",
        "token": change.token,
        "text": text,
        "before": before,
        "after": after,
        "weight": {"here": change.weights[0], "there": change.weights[1]},
        "advantage": {"here": change.advantages[0], "there": change.advantages[1]},
    }


def finite(data: Any) -> Any:
    """Return plain data with None for every number that JSON cannot represent."""
    if isinstance(data, dict):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data if isinstance(data, str | int | float | type(None)) else str(data)


def report(data: dict[str, Any]) -> str:
    """Return the text for a terminal; texts from records and recipes are not yet `printable`."""
    rows = [*data["iterations"], {"iteration": "all", **data["overall"]}]
    if len(rows) > MOST_ROWS + 1:
        rows = [*rows[: MOST_ROWS // 2], {}, *rows[-MOST_ROWS // 2 - 1 :]]
    here, there = data["credit"]["told"], "the recorded credit"
    if data["against"] is not None:
        there = data["against"]["told"]
    lines = [f"here:  {here}", f"there: {there}", *_caveats(data), _check(data), ""]
    lines += _table(HEAD, [_cells(row) for row in rows])
    lines += ["", *_legend(data["overall"]), "", "mean weight by fifth of a rollout, first to last"]
    lines += _table(["iteration", "here", *[""] * 4, "there", *[""] * 4], [_fifths(row) for row in rows])
    if data["overall"]["decisions"]:
        lines += ["", *_decisions(data["overall"]["decisions"], rows)]
    lines += ["", *_changes(data)]
    return "\n".join(lines) + "\n"


HEAD = [
    *("iteration", "rollouts", "tokens", "changed", "rank corr.", "moved"),
    *("anchors shared", "only here", "only there", "segments here", "there", "in them here", "there"),
]


def _caveats(data: dict[str, Any]) -> list[str]:
    """Return what the shown rules lack compared with the papers that they are named after."""
    shown = [data["credit"], data["against"] or data["own"]]
    told = {rule["class"].rpartition(".")[2]: rule["lacks"] for rule in shown if rule is not None and rule["lacks"]}
    return [f"{name} is in the style of its paper, and lacks {lacks}" for name, lacks in told.items()]


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _both(pair: dict[str, Any], form: str) -> list[str]:
    return [_number(pair["here"], form), _number(pair["there"], form)]


def _cells(row: dict[str, Any]) -> list[str]:
    if not row:
        return ["..."]
    anchors = row["anchors"]
    return [
        *(str(row[key]) for key in ("iteration", "rollouts", "tokens")),
        _number(row["changed"], ".1%"),
        _number(row["rank_correlation"]),
        _number(row["moved"], ".1%"),
        *(str(anchors[key]) for key in ("shared", "only_here", "only_there")),
        *_both(row["segments_per_rollout"], ".2f"),
        *_both(row["in_segments"], ".1%"),
    ]


def _fifths(row: dict[str, Any]) -> list[str]:
    if not row:
        return ["..."]
    weights = row["weight_by_fifth"]
    return [str(row["iteration"]), *(_number(w, ".2f") for w in [*weights["here"], *weights["there"]])]


def _decisions(overall: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    def cells(row: dict[str, Any]) -> list[str]:
        told = row.get("decisions")
        if not told:
            return [str(row.get("iteration", "..."))]
        counts = str(row["iteration"]), str(told["wrong"]), str(told["right"])
        return [*counts, *_both(told["auc"], ".3f"), *_both(told["blame"], ".1%"), *_both(told["praise"], ".1%")]

    head = ["iteration", "wrong", "right", "AUC here", "there", "blame here", "there", "praise here", "there"]
    return [
        "decisions that the environment marks as wrong and right, in tokens",
        *_table(head, [cells(row) for row in rows]),
        "AUC: probability that the divergence on a wrong one is above that on a right one. blame, praise: share of a",
        "rollout's negative, positive advantage that falls on its first wrong decision",
    ]


def _legend(overall: dict[str, Any]) -> list[str]:
    ranked, moved, n = overall["rank_correlation_rollouts"], overall["moved_rollouts"], overall["rollouts"]
    return [
        f"changed: share of tokens whose weight differs by more than {CHANGED}. rank corr.: of the weights within a",
        f"rollout (mean of the {ranked} of {n} rollouts whose weights vary on both sides). moved: share of a rollout's",
        f"|advantage| that lies on other tokens (mean of the {moved} that have an advantage). segments: per rollout;",
        "in them: share of tokens",
    ]


def _check(data: dict[str, Any]) -> str:
    """Return a line that compares the recomputed credit of the run's own rule with the recorded credit."""
    own, check = data["own"], data["check"]
    if own is None:
        return f"check: not possible, the run's own rule is not known ({data['unknown']})"
    what = f"check: the run's own rule, {own['told']}, recomputed, gives"
    if not check["differ"]:
        return f"{what} the recorded weights (largest difference {_number(check['largest'], '.1g')})"
    share = check["differ"] / check["tokens"]
    largest = _number(check["largest"], ".2g")
    return (
        f"{what} other weights than recorded on {share:.1%} of the tokens (largest difference {largest}). Rounding on "
        "another device changes single segments; larger differences mean that config.yaml, which the run's last start "
        "wrote, does not belong to these iterations"
    )


def _changes(data: dict[str, Any]) -> list[str]:
    if not data["changes"]:
        return ["no token's advantage differs"]
    lines = ["tokens whose advantage differs most: advantage (weight), there -> here"]
    for change in data["changes"]:
        there, here = (
            f"{_number(change['advantage'][side], '+.3f')} ({_number(change['weight'][side], '.2f')})"
            for side in ("there", "here")
        )
        before, text, after = (_line(change[key]) for key in ("before", "text", "after"))
        place = ", ".join(f"{key} {change[key]}" for key in ("rollout", "iteration", "rank", "token"))
        lines.append(f"  {there} -> {here}  {before}▸{text}◂{after}")
        lines.append(f"      {change['page']}: task {_line(change['task_id'])}, {place}")
    return lines


def _line(text: str) -> str:
    return visible(text).replace("\n", "") if text else ""


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return lines with columns aligned to the right; short rows are padded."""
    every = [[*row, *[""] * (len(head) - len(row))] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    return ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in every]
