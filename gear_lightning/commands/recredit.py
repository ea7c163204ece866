"""``gear-lightning recredit``: compute the credit of a run's recorded rollouts under another credit rule."""

import heapq
import json
import re
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..batch import CALL, REASONING, Credit
from ..credit import CreditAssigner
from ..errors import UserError, printable
from ..lens.difference import CHANGED, Pair, compare, largest_changes, summary
from ..lens.page import render_credit_page
from ..lens.recredit import check_credit, recorded_credit, recredit, stands_in, told
from ..lens.recredit_report import change_data, finite, report, rule_data
from ..lens.trace import Decode, load_decoder
from ..recipes.rule_arguments import RULES, split
from ..recipes.rule_options import read_rule, run_rule
from ..runs.files import check_place, write_asked
from ..runs.records import Record, read_records, record_files
from . import parsers
from .parsers import ON_PAGE, PAGE

UNCHECKED = "the run's own rule is not known, so the recomputation cannot be checked against the recorded credit"
SHOWN = 10  # tokens


def recredit_command(argv: list[str]) -> int:
    """Run ``gear-lightning recredit``.

    Args:
        argv: the arguments after ``recredit``.

    Returns:
        The exit status.

    Raises:
        UserError: a rule cannot be created, fails, returns non-finite credit, or needs data that was not recorded;
            there are no records, or none of the given iterations; a file cannot be read or written, or a folder does
            not exist.
        SystemExit: help was requested, or an option is unknown; the parser has reported it.
    """
    rest, typed = split(argv)
    options = parsers.recredit().parse_args(rest)
    run: Path = options.run
    page = run / PAGE if options.html == Path() else options.html
    for path in (page, options.json):
        if path is not None:
            check_place(path)
    named = {name: read_rule(name, typed[name], run) for name in RULES if typed[name] or name == "--credit"}
    iterations = _iterations(run, options.iterations)
    own, unknown = run_rule(run, {path: type(rule) for rule, path in named.values()})
    rules = [_recordable(run, rule, own, unknown) for rule, _ in named.values()]
    decode = load_decoder(run)
    found = _Findings(rules[0], rules[1] if len(rules) > 1 else None, own, unknown, keep=page is not None)
    for record in read_records(run, iterations):
        found.take(record, decode)
    if not found.pairs:
        raise UserError(f"{run}: no rollout of these iterations has credit, because none was used for learning")
    if found.own is None:
        print(printable(f"gear-lightning: warning: {UNCHECKED} ({found.unknown})"), file=sys.stderr)
    data = found.data(run)
    print(printable(report(data)), end="")
    if page is not None:
        shown = told(rules[0].rule) if found.there is None else f"{told(rules[0].rule)} against {told(rules[1].rule)}"
        # with two rules, the page opens with their comparison; the recorded credit can be selected
        kept: dict[str, Any] = {"max_rollouts": ON_PAGE, "left_out": found.left_out, "others": found.others}
        kept |= {"title": f"Credit of {run.resolve().name} by {shown}", "opens": (0, 1) if len(rules) == 1 else (2, 1)}
        write_asked(page, render_credit_page([record for record, _ in found.kept], decode, **kept))
        opens = f"; append #{data['changes'][0]['page']} to open the first change" if data["changes"] else ""
        print(f"{page}: the credit page{opens}")
    if options.json is not None:
        write_asked(options.json, json.dumps(data, indent=1, allow_nan=False) + "\n")
        print(f"{options.json}: all values, of every iteration")
    return 0


def _iterations(run: Path, asked: str | None) -> list[int]:
    """Return the recorded iterations among the requested ones.

    Raises:
        UserError: none of them is recorded.
    """
    next(read_records(run, []), None)  # raises the error for a run without records
    there = sorted({iteration for iteration, _, _ in record_files(run)})
    if asked is None:
        return there
    if not (match := re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", asked)):
        raise UserError(f"--iterations {asked}: must be one number, or a range such as 3-7")
    first, last = int(match[1]), int(match[2] or match[1])
    wanted = [i for i in there if first <= i <= last]
    if not wanted:
        raise UserError(
            f"--iterations {asked}: {run} has no records of them; it has {len(there)}, from {there[0]} to {there[-1]}"
        )
    return wanted


@dataclass(frozen=True)
class _Rule:
    """A rule that can be recomputed; see `stands_in`."""

    rule: CreditAssigner
    divergence: bool

    def credit(self, record: Record) -> Credit:
        """Return the rule's credit for a record's rollouts.

        Raises:
            UserError: the rule fails, returns no credit or non-finite credit, or needs data that the record lacks.
        """
        try:
            credit = recredit(record, self.rule, divergence=self.divergence)
        except UserError:
            raise
        except Exception as error:  # the rule may be a user's own
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"{told(self.rule)} failed on iteration {record.iteration}, rank {record.rank}: {_text(error)} "
                f"(at {place.filename}:{place.lineno})"
            ) from error
        return check_credit(record, self.rule, credit)


def _text(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _recordable(run: Path, rule: CreditAssigner, own: CreditAssigner | None, unknown: str) -> _Rule:
    """Check that the run's records hold the data that a rule needs, and return the rule with that information.

    Raises:
        UserError: they do not hold it.
    """
    if rule.needs_decisions and not any(_decided(record) for record in read_records(run)):
        raise UserError(
            f"{told(rule)} needs to know which decisions were right, but {run} has recorded none: the policy made "
            "none, or the environment does not report them. Environments with reports_decisions do "
            "(gear_lightning.environments.lookup_chain)"
        )
    if rule.where != "all":
        part, name = (CALL, "tool calls") if rule.where == "actions" else (REASONING, "reasoning")
        if not any(_learned(record) and bool((record.tensors["parts"] == part).any()) for record in read_records(run)):
            raise UserError(
                f"{told(rule)} weighs {'only' if part == CALL else 'everything but'} {name}, and {run} has recorded "
                f"none: the policy wrote none, or the run is of an earlier version. Leave out where={rule.where}"
            )
    return _Rule(rule, stands_in(rule, own, unknown))


def _learned(record: Record) -> bool:
    return any(rollout["row"] is not None for rollout in record.rollouts)


def _decided(record: Record) -> bool:
    return _learned(record) and bool(record.tensors["decisions"].any())


@dataclass
class _Findings:
    """Results, collected record by record.

    Attributes:
        here: the requested rule.
        there: the rule to compare with; None for the recorded credit.
        own: the run's own rule; None if it is not known.
        unknown: why it is not known.
        keep: whether to keep records and their credits for the page.
        pairs: iteration -> both credits of its rollouts.
        changes: iteration -> its most changed tokens, as plain data.
        kept: the newest records, each with the credits of the rules; no credits for a record without tokens.
        left_out: number of rollouts in older records, which are not kept.
        check: how the recomputed credit of ``own`` differs from the recorded one.
    """

    here: _Rule
    there: _Rule | None
    own: CreditAssigner | None
    unknown: str
    keep: bool
    pairs: dict[int, list[Pair]] = field(default_factory=dict)
    changes: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    kept: list[tuple[Record, list[Credit]]] = field(default_factory=list)
    left_out: int = 0
    check: dict[str, Any] = field(default_factory=lambda: {"tokens": 0, "differ": 0, "largest": 0.0})

    def take(self, record: Record, decode: Decode) -> None:
        """Recompute the credit of a record. Records must come in the order of their iterations.

        Raises:
            UserError: the record lacks data that a rule needs.
        """
        credits: list[Credit] = []
        if _learned(record):
            here, recorded = self.here.credit(record), recorded_credit(record)
            there = recorded if self.there is None else self.there.credit(record)
            self._check(record, recorded)
            self.pairs.setdefault(record.iteration, []).extend(compare(record, here, there))
            places = {rollout["row"]: index for index, rollout in enumerate(record.rollouts)}
            found = largest_changes(record, here, there, SHOWN)
            changed = [change_data(c, record.rollouts, places[c.row], decode) for c in found if c.row in places]
            self.changes[record.iteration] = _largest([*self.changes.get(record.iteration, []), *changed])
            credits = [here] if self.there is None else [here, there]
        if self.keep:
            self.kept.append((record, credits))
            while sum(len(r.rollouts) for r, _ in self.kept if r.iteration > self.kept[0][0].iteration) >= ON_PAGE:
                self.left_out += len(self.kept.pop(0)[0].rollouts)

    @property
    def others(self) -> dict[str, list[Credit | None]]:
        """The credits of the kept records by the name of their rule."""
        names = [told(rule.rule) for rule in (self.here, self.there) if rule is not None]
        if len(set(names)) < len(names):  # two classes with the same name, or the same rule twice
            names[1] += " (against)"
        return {name: [credits[i] if credits else None for _, credits in self.kept] for i, name in enumerate(names)}

    def _check(self, record: Record, recorded: Credit) -> None:
        """Recompute the credit of the run's own rule and compare it with the recorded one, to validate the results."""
        if self.own is None:
            return
        try:
            again = recredit(record, self.own, divergence=stands_in(self.own, self.own))
        except Exception as error:  # its options come from a file, which may be untrusted
            self.own, self.unknown = None, f"{told(self.own)} cannot be recomputed: {error}"
            return
        gap = (again.weights - recorded.weights).abs()[record.tensors["action_mask"]]
        self.check["tokens"] += gap.numel()
        self.check["differ"] += int((~(gap <= CHANGED)).sum())
        self.check["largest"] = max(self.check["largest"], *gap.tolist(), 0.0)

    def data(self, run: Path) -> dict[str, Any]:
        """Return all results as plain data for JSON."""
        return finite(
            {
                "run": str(run),
                "credit": rule_data(self.here.rule),
                "against": None if self.there is None else rule_data(self.there.rule),
                "own": None if self.own is None else rule_data(self.own),
                "unknown": self.unknown,
                "check": self.check,
                "overall": summary([pair for pairs in self.pairs.values() for pair in pairs]),
                "iterations": [
                    {"iteration": i, **summary(pairs), "changes": self.changes[i]} for i, pairs in self.pairs.items()
                ],
                "changes": _largest([change for changes in self.changes.values() for change in changes]),
            }
        )


def _largest(changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return heapq.nlargest(SHOWN, changes, key=lambda c: abs(c["advantage"]["here"] - c["advantage"]["there"]))
