"""Rollouts, token by token, and the groups of rollouts of one task."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .environments.base import Message, Task
from .generation.engine import SampledTurn

Status = Literal[
    "done",  # the environment ended the episode
    "truncated",  # a budget (turns, tokens, seconds, the environment's own) ended it, or cut the last turn short
    "invalid_tool_call",  # the policy wrote an invalid tool call
    "empty_response",  # the policy ended the episode with a turn without text: only a stop token, or white space
    "stopped",  # enough other rollouts were complete (data.oversample)
    "environment_flood",  # reset, step or a tool returned more text than the budget allows
    "prompt_too_long",  # the prompt leaves no space for a response
    "environment_error",  # reset, step or a tool raised
    "environment_timeout",  # reset, step or a tool took too long
    "invalid_reward",  # the reward is not a finite number, or raised
]
STATUSES: tuple[Status, ...] = get_args(Status)
# Statuses that the policy causes: the rollout keeps its reward so far and is used for learning. If such rollouts were
# excluded, learning could never correct them. All other statuses are failures of the task or environment.
LEARNABLE: frozenset[str] = frozenset({"done", "truncated", "invalid_tool_call", "empty_response", "environment_flood"})

COLUMNS = ("tokens", "action_mask", "turn_ids", "stop_mask", "sampler_logprobs", "decisions", "parts", "versions")


@dataclass
class Rollout:
    """One episode, token by token.

    Example of a rollout with one tool call (P prompt, S sampled, O observation)::

        tokens       P P P S S S O O S S
        action_mask  0 0 0 1 1 1 0 0 1 1
        turn_ids    -1-1-1 0 0 0-1-1 1 1

    Context may also stand within a turn: the mark that closes reasoning which exceeds its budget. ``closed_thoughts``
    counts these marks. ``decisions`` is 1 on tokens of decisions that the environment judged right, -1 on those judged
    wrong, 0 elsewhere. ``parts`` is 1 on sampled tokens of reasoning, 2 on those of tool calls, 0 elsewhere.
    ``opening_messages`` counts the messages before the first turn, ``prompt_messages`` those of the prompt: more, if
    earlier reasoning was dropped (`ChatOptions.earlier_reasoning`). ``turn_rewards`` and ``states`` have one entry per
    turn: its reward, and the state in which it began. ``error`` is the reason of the status; ``side_error`` is the
    first failure that changed neither status nor reward; ``tool_errors`` are exceptions of tools that the policy has
    read as answers. ``versions`` has the policy version that sampled each token, -1 elsewhere, up to the last sampled
    token; empty: all are ``policy_version``, the version with which the episode began.
    """

    task: Task
    messages: list[Message]
    tokens: list[int] = field(default_factory=list)
    action_mask: list[bool] = field(default_factory=list)
    turn_ids: list[int] = field(default_factory=list)
    stop_mask: list[bool] = field(default_factory=list)
    sampler_logprobs: list[float] = field(default_factory=list)
    decisions: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    prompt_length: int = 0
    opening_messages: int = 0
    prompt_messages: int = 0
    turns: int = 0
    reward: float = 0.0
    reward_parts: dict[str, float] = field(default_factory=dict)
    turn_rewards: list[float] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    feedback: str | None = None
    success: bool = False
    status: Status = "done"
    error: str | None = None
    side_error: str | None = None
    tool_errors: list[str] = field(default_factory=list)
    retries: int = 0
    policy_version: int = 0
    closed_thoughts: int = 0

    @property
    def learnable(self) -> bool:
        """Whether the rollout takes part in its group's advantages."""
        caused = self.status != "environment_flood" or self.turns > 0  # the policy does not cause a flood in reset
        return self.status in LEARNABLE and caused

    @property
    def prompt(self) -> list[Message]:
        """The messages of the prompt."""
        return self.messages[: max(self.opening_messages, self.prompt_messages)]

    def note(self, failure: str) -> None:
        """Record a failure that changes neither the status nor the reward."""
        self.side_error = self.side_error or failure

    def restart(self, prompt: list[int]) -> None:
        """Replace all tokens by a prompt with the conversation so far."""
        for column in COLUMNS:
            setattr(self, column, [])
        self.prompt_messages, self.prompt_length = len(self.messages), len(prompt)
        self.add_context(prompt)

    def add_context(self, ids: list[int]) -> None:
        """Append ids that the policy did not sample."""
        self.tokens += ids
        self.action_mask += [False] * len(ids)
        self.turn_ids += [-1] * len(ids)
        self.stop_mask += [False] * len(ids)
        self.sampler_logprobs += [0.0] * len(ids)
        self.decisions += [0] * len(ids)
        self.parts += [0] * len(ids)

    def add_turn(self, turn: SampledTurn) -> None:
        """Append a sampled turn."""
        self.turn_rewards.append(0.0)
        self.turns += 1
        self.continue_turn(turn)

    def continue_turn(self, turn: SampledTurn) -> None:
        """Append the next sampled tokens of the last turn."""
        n = len(turn.ids)
        if turn.version is not None:
            self.versions += [-1] * (len(self.tokens) - len(self.versions)) + [turn.version] * n
        self.tokens += turn.ids
        self.action_mask += [True] * n
        self.turn_ids += [self.turns - 1] * n
        self.stop_mask += [False] * (n - 1) + [turn.stopped] * (n > 0)
        self.sampler_logprobs += turn.logprobs
        self.decisions += [0] * n
        self.parts += [0] * n

    def set_parts(self, begin: int, parts: list[int]) -> None:
        """Set the parts of the last turn, whose first token is at ``begin``; those of context are 0."""
        self.parts[begin:] = [part * own for part, own in zip(parts, self.action_mask[begin:], strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return the rollout as plain data for checkpoints, without the task, which its source can provide again."""
        return {name: value for name, value in vars(self).items() if name != "task"}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], task: Task) -> "Rollout":
        """Return a rollout from the result of `state_dict`."""
        return cls(task, **state)


@dataclass
class RolloutGroup:
    """The rollouts of one task. ``group_id`` counts groups over the whole run."""

    task: Task
    group_id: int
    rollouts: list[Rollout]

    @property
    def solved(self) -> int:
        """Number of rollouts in the group that solved the task."""
        return sum(r.success and r.learnable for r in self.rollouts)

    def peer(self, index: int) -> Rollout | None:
        """Return the next successful rollout of the group after ``index``, cyclically; None if there is no other."""
        others = self.rollouts[index + 1 :] + self.rollouts[:index]
        return next((r for r in others if r.success and r.learnable), None)
