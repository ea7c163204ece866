"""Credit from the environment's labels of right and wrong decisions: a reference for rules without these labels."""

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
    """Return the first run of consecutive marked tokens of each row, within one turn.

    Tokens outside ``mask`` do not interrupt a run.
    """
    marked = marked & mask
    before = (mask & ~marked).cumsum(-1)  # equal for two marked tokens: no unmarked one between them
    none = turn_ids.shape[-1] + 1
    turns = torch.where(marked, turn_ids, torch.iinfo(turn_ids.dtype).max)
    earliest = torch.where(marked, before, none).amin(-1, keepdim=True)
    return marked & (before == earliest) & (turns == turns.amin(-1, keepdim=True))


@dataclass(frozen=True)
class Oracle(CreditAssigner):
    """Credit from an environment that labels decisions as right or wrong: a reference that this project defines.

    The labels are exact, but weights alone do not make the rule an upper bound: its gain depends on the task and on the
    number of steps.

    Where A < 0, the tokens of the first wrong decision have weight 1 + clip and all others 1 - clip; where A > 0, the
    tokens of all right decisions have 1 + clip and all others 1 - clip. Weights are 1 if there is no such decision. Two
    decisions of a turn with no token between them count as one.

    With ``normalise=mean`` each weight is divided by the rollout's mean over the tokens of that sign, so that the total
    credit does not change: the one wrong decision of a long rollout then carries the negative advantage of all its
    tokens.

    Runs no teacher.

    Args:
        clip: distance of weights from 1 before they are divided by their mean.
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
                "Oracle needs labels of right and wrong decisions (Evidence.decisions), and these rollouts have none; "
                "use an environment that provides them (reports_decisions), or another credit rule"
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
