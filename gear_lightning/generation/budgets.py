"""Limits of a rollout."""

import math
from dataclasses import dataclass, fields

from ..errors import UserError


@dataclass(frozen=True)
class Budgets:
    """Limits of one rollout.

    Args:
        turns: maximum number of assistant turns.
        tokens: maximum number of sampled tokens over all turns.
        turn_tokens: maximum number of sampled tokens in one turn. Null: only ``tokens`` applies.
        context: maximum length of prompt and response together, tokens.
        step_seconds: wall-clock limit of one call of the environment (reset, step, close). A call that takes longer is
            abandoned. Without ``generation.workers`` environments are called one after another, so a call that hangs
            delays all rollouts by this time.
        seconds: wall-clock limit of the whole rollout. It is checked between turns, so a rollout may exceed it by one
            turn and one call. Null: no limit. A limit makes the results of a run depend on the machine's speed.
        output_bytes: maximum size of the environment's messages over all turns (opening, tool results), as UTF-8
            including their keys. The call that exceeds it ends the rollout; none of its messages is kept.
        retries: number of retries of a rollout whose reset raises an ``OSError`` (for example a failed connection) or
            takes too long. Each retry creates a new environment, after the other rollouts have been opened. Nothing is
            retried once a token is sampled, because that would change what the policy saw.
        thinking_tokens: maximum number of sampled tokens of reasoning in one turn. Longer reasoning is closed: the chat
            template's mark is added as context, which the policy did not sample, and the policy continues the turn.
            Reasoning that it opens again is closed within a quarter of the budget (64 tokens if that is more). Null: no
            limit.
    """

    turns: int = 8
    tokens: int = 256
    turn_tokens: int | None = None
    context: int = 2048
    step_seconds: float = 30.0
    seconds: float | None = None
    output_bytes: int = 1_000_000
    retries: int = 1
    thinking_tokens: int | None = None

    def __post_init__(self):
        if self.retries < 0:
            raise UserError(f"budgets.retries={self.retries}: must be at least 0")
        for name in (f.name for f in fields(self) if f.name != "retries"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"budgets.{name}={value}: must be above 0 and finite")
        turn = min(self.tokens, self.turn_tokens or self.tokens)
        if self.thinking_tokens is not None and self.thinking_tokens >= turn:
            raise UserError(
                f"budgets.thinking_tokens={self.thinking_tokens} must be less than the {turn} tokens of a turn "
                "(budgets.tokens, budgets.turn_tokens): a turn would end before its reasoning is closed"
            )
