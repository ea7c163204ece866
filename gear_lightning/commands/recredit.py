"""``gear-lightning recredit``: what another credit rule would have made of a run's rollouts."""

import argparse
import heapq
import json
import re
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..batch import Credit
from ..credit import CreditAssigner
from ..errors import UserError, printable
from ..lens.difference import CHANGED, Pair, compare, largest_changes, summary
from ..lens.page import render_credit_page
from ..lens.recredit import check_credit, recorded_credit, recredit, stands_in, told
from ..lens.recredit_report import change_data, finite, report, rule_data
from ..lens.trace import Decode, load_decoder
from ..recipes.rule_options import RULES, read_rule, run_rule, split
from ..runs.files import check_place, write_asked
from ..runs.records import Record, read_records, record_files

PAGE = "recredit.html"
UNCHECKED = "the run's own rule is not known, so nothing checks that recomputing gives what was recorded"
ON_PAGE = 1000  # rollouts
SHOWN = 10  # tokens


def parser() -> argparse.ArgumentParser:
    """Options of the command. Those of the rules are here for the help alone."""
    out = argparse.ArgumentParser(
        "gear-lightning recredit",
        usage="gear-lightning recredit RUN --credit RULE [--credit.OPTION VALUE ...] [--against RULE "
        "[--against.OPTION VALUE ...]] [--iterations A-B] [--html [PATH]] [--json PATH]",
        description="Compute the credit of a run's recorded rollouts anew, without its model, and show what differs "
        "from the credit that was recorded, or from that of a second rule. RULE is a class of gear_lightning.credit "
        "(GEAR, RLSD, ...), the import path of your own, or a YAML file with model.credit; --credit.help RULE tells "
        "its options.",
        allow_abbrev=False,
    )
    out.add_argument("run", type=Path, metavar="RUN", help="run directory (holds rollouts/ and tokenizer/)")
    out.add_argument("--credit", metavar="RULE", help="rule to compute")
    out.add_argument("--against", metavar="RULE", help="rule to compare with (default: the recorded credit)")
    out.add_argument("--iterations", metavar="A-B", help="only these, both ends included; or one number (default: all)")
    out.add_argument(
        "--html", nargs="?", type=Path, const=Path(), metavar="PATH",
        help=f"write the credit page with the computed credit beside the recorded one (default RUN/{PAGE}; the newest "
        f"{ON_PAGE:,} rollouts)",
    )  # fmt: skip
    out.add_argument("--json", type=Path, metavar="PATH", help="write all figures, of every iteration, as JSON")
    return out


def recredit_command(argv: list[str]) -> int:
    """``gear-lightning recredit``.

    Args:
        argv: the arguments after ``recredit``.

    Returns:
        The exit status.

    Raises:
        UserError: a rule that cannot be made, or that needs what was not recorded; no records, or none of the
            iterations asked for; a file that cannot be read or written, or a folder that is not there; a rule that
            fails, or gives no finite credit.
        SystemExit: help was asked for, or an option is unknown; the parser has said so.
    """
    rest, typed = split(argv)
    options = parser().parse_args(rest)
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
        raise UserError(f"{run}: no rollout of these iterations has credit; none was learned from")
    if found.own is None:
        print(printable(f"gear-lightning: warning: {UNCHECKED} ({found.unknown})"), file=sys.stderr)
    data = found.data(run)
    print(printable(report(data)), end="")
    if page is not None:
        shown = told(rules[0].rule) if found.there is None else f"{told(rules[0].rule)} against {told(rules[1].rule)}"
        # Of two rules those two are compared, as in all figures; the recorded credit is there to be chosen.
        kept: dict[str, Any] = {"max_rollouts": ON_PAGE, "left_out": found.left_out, "others": found.others}
        kept |= {"title": f"Credit of {run.resolve().name} by {shown}", "opens": (0, 1) if len(rules) == 1 else (2, 1)}
        write_asked(page, render_credit_page([record for record, _ in found.kept], decode, **kept))
        opens = f"; {data['changes'][0]['page']} after a # opens the first of these" if data["changes"] else ""
        print(f"{page}: the credit page of it{opens}")
    if options.json is not None:
        write_asked(options.json, json.dumps(data, indent=1, allow_nan=False) + "\n")
        print(f"{options.json}: all figures, of every iteration")
    return 0


def _iterations(run: Path, asked: str | None) -> list[int]:
    """The recorded iterations that were asked for.

    Raises:
        UserError: none of them is recorded.
    """
    next(read_records(run, []), None)  # has the error message for a run without records
    there = sorted({iteration for iteration, _, _ in record_files(run)})
    if asked is None:
        return there
    if not (match := re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", asked)):
        raise UserError(f"--iterations {asked}: give one number, or two as 3-7")
    first, last = int(match[1]), int(match[2] or match[1])
    wanted = [i for i in there if first <= i <= last]
    if not wanted:
        raise UserError(
            f"--iterations {asked}: {run} has no records of them; it has {len(there)}, of {there[0]} to {there[-1]}"
        )
    return wanted


@dataclass(frozen=True)
class _Rule:
    """A rule that can be recomputed; see `stands_in`."""

    rule: CreditAssigner
    divergence: bool

    def credit(self, record: Record) -> Credit:
        """What it gives to a record's rollouts.

        Raises:
            UserError: it fails, gives no credit, or none that is finite; or the record does not hold what it needs.
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
    """A rule, once it is clear that the run's records can hold what it needs.

    Raises:
        UserError: they do not.
    """
    if rule.needs_decisions and not any(_decided(record) for record in read_records(run)):
        raise UserError(
            f"{told(rule)} needs to know which decisions were right, and {run} has recorded none: the policy made "
            "none, or the environment does not tell. Those with tells_decisions do "
            "(gear_lightning.environments.lookup_chain)"
        )
    return _Rule(rule, stands_in(rule, own, unknown))


def _learned(record: Record) -> bool:
    return any(rollout["row"] is not None for rollout in record.rollouts)


def _decided(record: Record) -> bool:
    return _learned(record) and bool(record.tensors["decisions"].any())


@dataclass
class _Findings:
    """What is kept of the records, taken one by one.

    Attributes:
        here: the rule that was asked for.
        there: the rule to compare with; None: what was recorded.
        own: the run's own rule; None where it is not known.
        unknown: why it is not.
        keep: hold records and their credits for the page.
        pairs: iteration -> both credits of its rollouts.
        changes: iteration -> its most changed tokens, as plain data.
        kept: the newest records, and what the rules make of each; nothing for one without tokens.
        left_out: rollouts of older ones.
        check: how the recomputed credit of ``own`` compares with the recorded one.
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
        """Recompute a record of the last iteration taken, or of a later one.

        Raises:
            UserError: it does not hold what a rule needs.
        """
        credits: list[Credit] = []
        if _learned(record):
            here, recorded = self.here.credit(record), recorded_credit(record)
            there = recorded if self.there is None else self.there.credit(record)
            self._check(record, recorded)
            self.pairs.setdefault(record.iteration, []).extend(compare(record, here, there))
            places = {rollout["row"]: index for index, rollout in enumerate(record.rollouts)}
            found = largest_changes(record, here, there, SHOWN)
            told_ones = [change_data(c, record.rollouts, places[c.row], decode) for c in found if c.row in places]
            self.changes[record.iteration] = _largest([*self.changes.get(record.iteration, []), *told_ones])
            credits = [here] if self.there is None else [here, there]
        if self.keep:
            self.kept.append((record, credits))
            while sum(len(r.rollouts) for r, _ in self.kept if r.iteration > self.kept[0][0].iteration) >= ON_PAGE:
                self.left_out += len(self.kept.pop(0)[0].rollouts)

    @property
    def others(self) -> dict[str, list[Credit | None]]:
        """What the rules make of the kept records, by their names."""
        names = [told(rule.rule) for rule in (self.here, self.there) if rule is not None]
        if len(set(names)) < len(names):  # classes of one name, or one rule twice
            names[1] += " (against)"
        return {name: [credits[i] if credits else None for _, credits in self.kept] for i, name in enumerate(names)}

    def _check(self, record: Record, recorded: Credit) -> None:
        """Recompute the run's own rule, too: whether that gives what was recorded tells what the figures are worth."""
        if self.own is None:
            return
        try:
            again = recredit(record, self.own, divergence=stands_in(self.own, self.own))
        except Exception as error:  # its options are what a file says, which may be anybody's
            self.own, self.unknown = None, f"{told(self.own)} cannot be recomputed: {error}"
            return
        gap = (again.weights - recorded.weights).abs()[record.tensors["action_mask"]]
        self.check["tokens"] += gap.numel()
        self.check["differ"] += int((~(gap <= CHANGED)).sum())
        self.check["largest"] = max(self.check["largest"], *gap.tolist(), 0.0)

    def data(self, run: Path) -> dict[str, Any]:
        """Everything that is shown, as plain data that JSON has words for."""
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
