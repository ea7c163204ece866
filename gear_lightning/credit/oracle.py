"""Credit by what the environment knows of the decisions: a yardstick for rules that must find out."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .. import gear
from ..batch import Credit
from ..checks import check_range
from ..errors import UserError
from .base import CreditAssigner, Evidence, spread_credit


def first_run(
    marked: Bool[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], turn_ids: Int[Tensor, "batch seq"]
) -> Bool[Tensor, "batch seq"]:
    """The first marked tokens of each row that follow one another within one turn; other tokens than those in ``mask``
    do not part them."""
    marked = marked & mask
    before = (mask & ~marked).cumsum(-1)  # equal for two marked tokens: no unmarked one between them
    none = turn_ids.shape[-1] + 1
    turns = torch.where(marked, turn_ids, torch.iinfo(turn_ids.dtype).max)
    earliest = torch.where(marked, before, none).amin(-1, keepdim=True)
    return marked & (before == earliest) & (turns == turns.amin(-1, keepdim=True))


@dataclass(frozen=True)
class Oracle(CreditAssigner):
    """Credit where it is due, by an environment that tells which decisions were right: a yardstick, ours. It knows the
    truth, but weights alone do not make it a bound: what it gains is a matter of the task and of the steps.

    Where A < 0, the tokens of the first wrong decision have weight 1 + clip and all others 1 - clip; where A > 0, the
    tokens of all right decisions have 1 + clip and all others 1 - clip. Weights are 1 where there is no such decision.
    Two decisions of a turn with no token between them count as one.

    Under ``normalise=mean`` each is divided by the rollout's mean over the tokens of that sign, so that credit is moved
    and not made: the one wrong decision of a long rollout then carries the blame of all its tokens.

    Runs no teacher.

    Args:
        clip: how far weights are from 1 before they are divided by their mean.
        blame: a rollout's ``first`` wrong decision, or ``all`` of them.
        normalise: divide by the ``mean`` weight, or not (``none``).

    Raises:
        UserError: values out of range; when called, rollouts without ``decisions``.
    """

    clip: float = 0.9
    blame: Literal["first", "all"] = "first"
    normalise: Literal["mean", "none"] = "none"

    needs_teacher = False
    needs_decisions = True

    def __post_init__(self):
        check_range(self, 0, 1, "clip")
        if self.blame not in ("first", "all"):
            raise UserError(f"Oracle: blame={self.blame} must be first or all")
        if self.normalise not in ("mean", "none"):
            raise UserError(f"Oracle: normalise={self.normalise} must be mean or none")

    def __call__(self, evidence: Evidence) -> Credit:
        if evidence.decisions is None:
            raise UserError(
                "Oracle needs to know which decisions were right (Evidence.decisions), and these rollouts do not tell; "
                "use an environment that does (tells_decisions), or another credit rule"
            )
        mask, sign = evidence.action_mask, evidence.base_advantages.sign()
        bad, good = mask & (sign < 0), mask & (sign > 0)
        blamed = bad & (evidence.decisions < 0)
        if self.blame == "first":
            blamed = first_run(blamed, mask, evidence.turn_ids)
        weights = torch.ones_like(evidence.base_advantages)
        for tokens, chosen in ((bad, blamed), (good, good & (evidence.decisions > 0))):
            moved = torch.where(chosen, 1 + self.clip, 1 - self.clip).to(weights.dtype)
            if self.normalise == "mean":
                moved = gear.normalise_weights(moved, tokens, "mean")
            weights = torch.where(tokens & chosen.any(-1, keepdim=True), moved, weights)
        return spread_credit(evidence, weights, by_teacher=False)
