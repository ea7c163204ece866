"""Statistics of one rank's rollouts in an iteration."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from ..batch import CALL, REASONING
from ..rollout import Rollout, RolloutGroup


@dataclass
class IterationStats:
    """Counts for logging. Lists have one entry for each rollout that takes part in its group's advantages.

    Attributes:
        tokens: sampled tokens.
        reasoning: sampled tokens of reasoning.
        calls: sampled tokens of tool calls.
        closed_thoughts: rollouts in which the budget closed reasoning.
        zero_spread: groups without a learning signal.
        overlong: rollouts whose privileged text was dropped for its length.
        retried: rollouts whose environment was opened more than once.
        masked: rollouts that count in their group's baseline but not in the loss.
        side_errors: rollouts with a `Rollout.side_error`.
        tool_errors: rollouts in which a tool raised an exception that the policy has read.
        statuses: statuses of all rollouts.
        left_out: statuses of the rollouts that are not in the loss.
    """

    seconds: float = 0.0
    tokens: int = 0
    reasoning: int = 0
    calls: int = 0
    closed_thoughts: int = 0
    groups: int = 0
    zero_spread: int = 0
    overlong: int = 0
    retried: int = 0
    masked: int = 0
    side_errors: int = 0
    tool_errors: int = 0
    statuses: Counter = field(default_factory=Counter)
    left_out: Counter = field(default_factory=Counter)
    rewards: list[float] = field(default_factory=list)
    successes: list[bool] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)

    def add(self, group: RolloutGroup, *, signal: bool, masked: Callable[[Rollout], bool]) -> None:
        """Count a group."""
        self.groups += 1
        self.zero_spread += not signal
        for rollout in group.rollouts:
            self.statuses[rollout.status] += 1
            self.retried += rollout.retries > 0
            self.tokens += sum(rollout.action_mask)
            self.reasoning += rollout.parts.count(REASONING)
            self.calls += rollout.parts.count(CALL)
            self.closed_thoughts += rollout.closed_thoughts > 0
            self.masked += masked(rollout)
            self.side_errors += rollout.side_error is not None
            self.tool_errors += bool(rollout.tool_errors)
            if masked(rollout) or not rollout.learnable:
                self.left_out[rollout.status] += 1
            if rollout.learnable:
                self.rewards.append(rollout.reward)
                self.successes.append(rollout.success)
                self.lengths.append(sum(rollout.action_mask))
                self.turns.append(rollout.turns)
