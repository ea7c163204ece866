"""Limits of a rollout."""

import math
from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True)
class Budgets:
    """Limits of one rollout.

    Args:
        turns: assistant turns.
        tokens: sampled tokens, over all turns.
        turn_tokens: sampled tokens in one turn. Null: only ``tokens`` counts.
        context: prompt and response together, tokens.
        step_seconds: one call of the environment (reset, step, close), wall clock. A call that takes longer is given
            up. Environments are called one after another: each call that hangs holds all rollouts up for so long.
        seconds: the whole rollout, wall clock, looked at between turns: it may go over by one turn and one call. Null:
            no limit. Wall clock makes runs differ.
        output_bytes: the environment's messages over all turns (opening, tool results), as UTF-8, their keys included.
            The call that gives more ends the rollout; none of its messages is kept.
        retries: further tries of a rollout whose reset raises an ``OSError`` (a connection, say) or takes too long.
            Each is a new environment, after the other rollouts have been opened. Once a token is sampled nothing is
            tried again, for that would change what the policy saw.
    """

    turns: int = 8
    tokens: int = 256
    turn_tokens: int | None = None
    context: int = 2048
    step_seconds: float = 30.0
    seconds: float | None = None
    output_bytes: int = 1_000_000
    retries: int = 1

    def __post_init__(self):
        if self.retries < 0:
            raise UserError(f"budgets.retries={self.retries} must be at least 0")
        for name in ("turns", "tokens", "turn_tokens", "context", "step_seconds", "seconds", "output_bytes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"budgets.{name}={value} must be above 0, and finite")
