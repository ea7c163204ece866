"""Recomputation of the credit of recorded rollouts by any rule, without the model."""

from dataclasses import fields, is_dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import Credit, TokenStats
from ..credit import GEAR, SCGRPO, CreditAssigner, Evidence, RoundingNoise
from ..errors import UserError
from ..runs.records import Record

SCOPES = ("all", "answer", "actions")  # values of `CreditAssigner.where`; each contains the next
CREDIT_KEYS = ("weights", "token_advantages", "divergence", "anchor")


def told(rule: CreditAssigner) -> str:
    """Return a rule as text: its class, and the options that differ from the defaults."""
    given = []
    for field in fields(rule) if is_dataclass(rule) else ():
        value = getattr(rule, field.name)
        if value != field.default:
            given.append(f"{field.name}={value!r}")
    return type(rule).__name__ + (f"({', '.join(given)})" if given else "")


def evidence_of(record: Record, rule: CreditAssigner, *, divergence: bool = False) -> Evidence:
    """Return the evidence that a rule would have received for a record's rollouts in training.

    Args:
        record: at least one of its rollouts has a row.
        rule: the teacher is passed only to a rule that needs one, as in training.
        divergence: use the recorded divergence instead of one of full distributions (see `stands_in`).

    Raises:
        UserError: the rule needs a teacher, and none scored these rollouts.
    """
    t = record.tensors
    teacher = None
    if rule.needs_teacher:
        if t["action_mask"].any() and not t["teacher_logprobs"].any():
            raise UserError(
                f"iteration {record.iteration}, rank {record.rank}: no teacher scored these rollouts (its log-probs "
                f"are zeros), and {told(rule)} needs one. Record with a rule that runs a teacher: --model.credit GEAR "
                "--model.credit.mix 0 trains as plain GRPO does"
            )
        teacher = TokenStats(t["teacher_logprobs"], t["teacher_entropy"])
    return Evidence(
        t["advantages"],
        t["action_mask"],
        t["turn_ids"],
        t["stop_mask"],
        t["policy_version"],
        TokenStats(t["policy_logprobs"], t["entropy"]),
        teacher,
        t["divergence"] if divergence else None,
        privileged=t["privileged"],
        turn_advantages=t["base_advantages"],
        decisions=t["decisions"],
        solved=t["solved"],
        parts=t.get("parts"),
        noise=recorded_noise(record),
    )


def recorded_noise(record: Record) -> RoundingNoise:
    """Return the rounding noise that training used; zeros for records that do not contain it."""
    told = (rollout.get("noise") for rollout in record.rollouts if rollout["row"] is not None)
    found = next((noise for noise in told if noise is not None), None)
    return RoundingNoise() if found is None else RoundingNoise(**found)


@torch.no_grad()
def recredit(record: Record, rule: CreditAssigner, *, divergence: bool = False) -> Credit:
    """Return the credit that a rule would have given to a record's rollouts in training.

    Args:
        record: at least one of its rollouts has a row.
        rule: any rule; its statistics are computed per rollout, so that all rows can be passed at once.
        divergence: see `evidence_of`.

    Raises:
        UserError: the rule needs data that the record does not contain: a teacher, or full distributions.
    """
    return rule(evidence_of(record, rule, divergence=divergence))


def recorded_credit(record: Record) -> Credit:
    """Return the credit that training used."""
    return Credit(*(record.tensors[name] for name in CREDIT_KEYS))


def check_credit(record: Record, rule: CreditAssigner, credit: object) -> Credit:
    """Check and return the result of a rule for a record's rollouts: a user's own rule may return anything.

    Raises:
        UserError: the result is not a `Credit`, has another shape than the rollouts, or contains a weight or advantage
            of a sampled token that is not finite.
    """
    where = f"iteration {record.iteration}, rank {record.rank}"
    if not isinstance(credit, Credit):
        raise UserError(
            f"{told(rule)} returned {type(credit).__name__} for {where}, expected a gear_lightning.batch.Credit"
        )
    mask = record.tensors["action_mask"]
    for name in CREDIT_KEYS:
        value = getattr(credit, name)
        if not isinstance(value, Tensor) or value.shape != mask.shape:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"{told(rule)} returned {name} {found} for {where}, expected {list(mask.shape)}, one value for each "
                "token of each rollout"
            )
    for name in ("weights", "token_advantages"):
        values = getattr(credit, name)
        odd = (mask & ~values.isfinite()).nonzero()
        if len(odd):
            row, token = odd[0].tolist()
            raise UserError(
                f"{told(rule)} gives {_named(record, row)} of {where} {name} that are not finite: "
                f"{float(values[row, token])} on token {token}, the first of {len(odd)}{_cause(record, row, mask[row])}"
            )
    return credit


def _named(record: Record, row: int) -> str:
    """Return a description of the rollout in a row."""
    for rollout in record.rollouts:
        if rollout["row"] == row:
            return f"rollout {rollout['rollout']} of task {rollout['task_id']}"
    return f"row {row}"


def _cause(record: Record, row: int, mask: Tensor) -> str:
    """Return the possible cause: recorded evidence that is not finite."""
    names = ("policy_logprobs", "entropy", "teacher_logprobs", "teacher_entropy", "divergence", "base_advantages")
    odd = [name for name in names if not record.tensors[name][row][mask].isfinite().all()]
    return f" (so are the recorded {', '.join(odd)})" if odd else ""


class Measured(NamedTuple):
    """A divergence of distributions, and the tokens for which it is measured."""

    kind: str
    top_k: int
    exclude_stop: bool = False
    exclude_tail: int = 0
    where: str = "all"


def measured(rule: CreditAssigner) -> Measured | None:
    """Return the kind of a rule's recorded divergence; None if it is not of full distributions, or not known."""
    if isinstance(rule, GEAR) and type(rule).measure is GEAR.measure and rule.top_k:
        return Measured(rule.divergence, rule.top_k, rule.exclude_stop, rule.exclude_tail, rule.where)
    if type(rule) is SCGRPO:
        return Measured("forward_kl", rule.top_k, where=rule.where)
    return None


def stands_in(rule: CreditAssigner, own: CreditAssigner | None, unknown: str = "") -> bool:
    """Return whether the recorded divergence can replace a rule's divergence of distributions, which are not recorded.

    Args:
        rule: the rule to recompute.
        own: the rule that the rollouts were trained with; None if it is not known.
        unknown: why it is not known.

    Returns:
        False for a rule that uses only sampled tokens: their log-probs are recorded.

    Raises:
        UserError: the rule compares distributions, and the recorded divergence is another one, or omits tokens that the
            rule counts.
    """
    if not rule.top_k or rule == own:
        return bool(rule.top_k)
    asked, there = measured(rule), None if own is None else measured(own)
    if asked is not None and there is not None and asked[:2] == there[:2]:
        if SCOPES.index(asked.where) < SCOPES.index(there.where):
            raise UserError(
                f"the records have a divergence only for where={there.where}, and {told(rule)} counts more tokens; "
                f"with where={there.where} it can be recomputed"
            )
        stop, tail = there.exclude_stop > asked.exclude_stop, there.exclude_tail > asked.exclude_tail
        if not stop and not tail:
            return True
        had = f"no divergence on {'stop tokens' if stop else f'the last {there.exclude_tail} action tokens'}, which"
        fit = (["exclude_stop true"] if stop else []) + ([f"exclude_tail {there.exclude_tail}"] if tail else [])
        fit = f"; with {' and '.join(fit)} it can be recomputed" if isinstance(rule, GEAR) else ""
        raise UserError(f"the records have {had} {told(rule)} counts (the run's rule is {told(own)}){fit}")  # pyright: ignore[reportArgumentType]
    if own is None:
        has = f"one divergence per token, of an unknown rule ({unknown})"
    elif there is None:
        has = f"log-probs of the sampled tokens (the run's rule is {told(own)})"
    else:
        has = f"the {there.kind} on {there.top_k} tokens (the run's rule is {told(own)})"
    what = f" ({asked.kind} on {asked.top_k} tokens)" if asked is not None else ""
    raise UserError(
        f"{told(rule)} compares full distributions{what}, and the records have only {has}. Train with it, or use a "
        "rule on sampled tokens: GEAR with divergence=k1, or RLSD"
    )
