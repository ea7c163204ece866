"""Rollouts and the agent loop that makes them: sampling turns, calling environments, keeping masks and budgets."""

import copy
import itertools
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from .chat import Chat, ToolCallError
from .engines import GenerationEngine, SampledTurn, Sampling, TurnRequest
from .environments.base import Environment, FloodError, Message, RewardError, Step, Task, TransientError
from .environments.checks import checked_messages, checked_step, text_bytes
from .environments.deadline import DeadlineRunner
from .errors import UserError

Status = Literal[
    "done",  # the environment ended the episode
    "truncated",  # a budget (turns, tokens, seconds, the environment's own) ended it
    "invalid_tool_call",  # the policy wrote a tool call that cannot be read; keeps the reward so far
    "empty_response",  # the policy stopped at once
    "prompt_too_long",  # the prompt leaves no room for an answer
    "environment_error",  # reset, step or a tool raised
    "environment_timeout",  # reset, step or a tool took too long
    "environment_flood",  # reset, step or a tool gave more text than the budget holds
    "invalid_reward",  # the reward is not a finite number, or raised
]
# these say something about the policy; the others say something about the environment, and are left out of learning
LEARNABLE: frozenset[str] = frozenset({"done", "truncated", "invalid_tool_call"})


@dataclass
class Rollout:
    """One episode, token by token.

    Example of a rollout with one tool call (P prompt, S sampled, O observation)::

        tokens       P P P S S S O O S S
        action_mask  0 0 0 1 1 1 0 0 1 1
        turn_ids    -1-1-1 0 0 0-1-1 1 1

    ``decisions`` is 1 on tokens of a decision that the environment called right, -1 on those of a wrong one, 0
    elsewhere. ``turn_rewards`` and ``states`` have one entry per turn: its reward, and where it began.
    """

    task: Task
    messages: list[Message]
    tokens: list[int] = field(default_factory=list)
    action_mask: list[bool] = field(default_factory=list)
    turn_ids: list[int] = field(default_factory=list)
    stop_mask: list[bool] = field(default_factory=list)
    sampler_logprobs: list[float] = field(default_factory=list)
    decisions: list[int] = field(default_factory=list)
    prompt_length: int = 0
    opening_messages: int = 0
    turns: int = 0
    reward: float = 0.0
    reward_parts: dict[str, float] = field(default_factory=dict)
    turn_rewards: list[float] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    feedback: str | None = None
    success: bool = False
    status: Status = "done"
    error: str | None = None
    retries: int = 0
    policy_version: int = 0

    @property
    def learnable(self) -> bool:
        """Whether the rollout takes part in its group's advantages."""
        return self.status in LEARNABLE

    def add_context(self, ids: list[int]) -> None:
        """Append ids the policy did not sample."""
        self.tokens += ids
        self.action_mask += [False] * len(ids)
        self.turn_ids += [-1] * len(ids)
        self.stop_mask += [False] * len(ids)
        self.sampler_logprobs += [0.0] * len(ids)
        self.decisions += [0] * len(ids)

    def add_turn(self, turn: SampledTurn) -> None:
        """Append a sampled turn."""
        n = len(turn.ids)
        self.tokens += turn.ids
        self.action_mask += [True] * n
        self.turn_ids += [self.turns] * n
        self.stop_mask += [False] * (n - 1) + [turn.stopped]
        self.sampler_logprobs += turn.logprobs
        self.decisions += [0] * n
        self.turn_rewards.append(0.0)
        self.turns += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain data, for checkpoints; without the task, which its source gives again."""
        return {name: value for name, value in vars(self).items() if name != "task"}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], task: Task) -> "Rollout":
        """Inverse of `state_dict`."""
        return cls(task, **state)


@dataclass
class RolloutGroup:
    """The rollouts of one task. ``group_id`` counts groups over the whole run."""

    task: Task
    group_id: int
    rollouts: list[Rollout]

    @property
    def solved(self) -> int:
        """Number of its rollouts that solved the task."""
        return sum(r.success and r.learnable for r in self.rollouts)

    def peer(self, index: int) -> Rollout | None:
        """The next successful rollout of the group after ``index``, around the end, other than itself."""
        others = self.rollouts[index + 1 :] + self.rollouts[:index]
        return next((r for r in others if r.success and r.learnable), None)


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
            The call that gives more ends the rollout; nothing of what it gave is kept.
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


@dataclass
class _Episode:
    rollout: Rollout
    environment: Environment
    seed: tuple[int, ...]
    started: float
    sampled: int = 0
    heard: int = 0  # bytes of the environment's text
    state: str = ""  # where the next turn begins
    transient: bool = False  # its failure may pass


class AgentLoop:
    """Plays tasks with a policy through an engine.

    Args:
        chat: messages to ids and back.
        engine: samples turns.
        environment: makes one environment per rollout.
        budgets: limits of a rollout.
        sampling: how tokens are drawn.
        success_threshold: reward from which a rollout counts as solved, where the environment does not say.
        on_progress: called with (finished rollouts, all rollouts, sampled tokens) now and then.
        stop: asked before every call of an environment; where it says yes, the rollouts that are not over stay as
            they are, and those that have not begun are left out.
    """

    def __init__(
        self,
        chat: Chat,
        engine: GenerationEngine,
        environment: Callable[[], Environment],
        budgets: Budgets,
        sampling: Sampling,
        success_threshold: float = 1.0,
        on_progress: Callable[[int, int, int], None] = lambda *_: None,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.chat = chat
        self.engine = engine
        self.environment = environment
        self.budgets = budgets
        self.sampling = sampling
        self.success_threshold = success_threshold
        self.on_progress = on_progress
        self.stop = stop

    def run(
        self,
        model: Any,
        jobs: list[tuple[Task, tuple[int, ...]]],
        *,
        policy_version: int,
        check: Callable[[], None] = lambda: None,
    ) -> tuple[list[Rollout], Counter]:
        """Play one rollout per job.

        Args:
            model: the policy; used in eval mode.
            jobs: (task, seed) pairs; the seed decides everything random in that rollout.
            policy_version: recorded on the rollouts.
            check: called when the engine has the model, before it samples.

        Returns:
            The rollouts in the order of the jobs, and counts of their statuses. Failures are recorded, never raised.
        """
        self._call = DeadlineRunner()
        self._progress = (0, len(jobs), 0)
        training = model.training
        model.eval()
        self.engine.begin(model, self.sampling, self.chat.stop_ids)
        episodes: dict[int, _Episode] = {}
        try:
            check()
            self._open_all(episodes, jobs, policy_version)
            tokens, finished = 0, sum(e.rollout.status != "done" for e in episodes.values())
            while not self.stop() and (turns := self.engine.poll()):
                for turn in turns:
                    if self.stop():
                        break
                    tokens += len(turn.ids)
                    if self._advance(turn.key, episodes[turn.key], turn):
                        finished += 1
                        self.engine.release(turn.key)
                self._progress = (finished, len(jobs), tokens)
                self.on_progress(*self._progress)
        finally:
            self.engine.end()
            model.train(training)
            for episode in episodes.values():
                self._close(episode)
            self._call.close()
        rollouts = [episodes[key].rollout for key in sorted(episodes)]
        return rollouts, Counter(r.status for r in rollouts)

    def _open_all(self, episodes: dict[int, _Episode], jobs: list[tuple[Task, tuple[int, ...]]], version: int) -> None:
        """Open an episode for each job; those whose failure may pass again, after all others."""
        waiting = list(range(len(jobs)))
        for attempt in range(self.budgets.retries + 1):
            for key in waiting:
                if self.stop():
                    return
                if attempt:
                    self._close(episodes[key])
                episodes[key] = self._open(key, *jobs[key], version, attempt)
            waiting = [key for key in waiting if episodes[key].transient]

    def _open(self, key: int, task: Task, seed: tuple[int, ...], version: int, attempt: int) -> _Episode:
        rollout = Rollout(task, list(task.messages), policy_version=version, retries=attempt)
        episode = _Episode(rollout, _Unmade(), seed, time.monotonic())

        def make() -> list[Message]:
            episode.environment = self.environment()
            mine = copy.deepcopy(task)  # what an environment does to its task stays there
            opening = episode.environment.reset(mine, seed=hash(seed) & 0x7FFFFFFF)
            return checked_messages(opening, "reset", self.budgets.output_bytes)

        opening = self._guard(episode, make)
        if rollout.error is None:
            episode.heard = text_bytes(opening, self.budgets.output_bytes)
            episode.state = _said(opening)
            rollout.messages += opening
            rollout.opening_messages = len(rollout.messages)
            prompt = self._guard(episode, lambda: self.chat.prompt(rollout.messages, task.tools))
            if rollout.error is None:
                rollout.prompt_length = len(prompt)
                rollout.add_context(prompt)
                self._request(key, episode, "prompt_too_long")
        return episode

    def _guard(self, episode: _Episode, function: Callable[[], Any]) -> Any:
        """Call the environment, or render what it said; a failure ends the rollout."""
        rollout = episode.rollout
        try:
            return self._call(function, self.budgets.step_seconds)
        except Exception as error:
            rollout.status = _status_of(error)
            rollout.error = str(error)
            episode.transient = isinstance(error, TransientError | TimeoutError)
            if isinstance(error, TimeoutError):
                self.on_progress(*self._progress)  # however many of them take their time, this is no standstill
        return None

    def _request(self, key: int, episode: _Episode, otherwise: Status) -> bool:
        """Ask for the next turn, or end the rollout where the budgets leave no room. Returns whether it asked."""
        budgets, rollout = self.budgets, episode.rollout
        room = min(
            budgets.tokens - episode.sampled,
            budgets.context - len(rollout.tokens),
            budgets.turn_tokens or budgets.tokens,
        )
        late = budgets.seconds is not None and time.monotonic() - episode.started > budgets.seconds
        if room < 1 or late or rollout.turns >= budgets.turns:
            rollout.status = otherwise
            if otherwise == "prompt_too_long":
                rollout.error = f"the prompt has {len(rollout.tokens)} tokens, the context {budgets.context}"
            return False
        self.engine.submit(TurnRequest(key, list(rollout.tokens), room, (*episode.seed, rollout.turns)))
        return True

    def _advance(self, key: int, episode: _Episode, turn: SampledTurn) -> bool:
        """Take a turn in, let the environment answer, and ask for the next one. Returns whether the rollout is over."""
        rollout = episode.rollout
        rollout.states.append(episode.state)
        rollout.add_turn(turn)
        episode.sampled += len(turn.ids)
        if turn.stopped and len(turn.ids) == 1:
            rollout.messages.append({"role": "assistant", "content": ""})
            rollout.status = "empty_response"
            return True
        try:
            message = self.chat.parse(turn.ids, rollout.task.tools)
        except ToolCallError as error:
            rollout.messages.append({"role": "assistant", "content": self.chat.text(turn.ids)})
            rollout.status, rollout.error = ("invalid_tool_call" if turn.stopped else "truncated"), str(error)
            return True
        rollout.messages.append(message)
        if not turn.stopped and message.get("tool_calls"):
            rollout.status = "truncated"  # half a call is not carried out
            return True
        room = self.budgets.output_bytes - episode.heard
        mine = copy.deepcopy(message)  # what an environment does to it, now or later, stays there
        step = self._guard(episode, lambda: checked_step(episode.environment.step(mine), room))
        if rollout.error is not None:
            return True
        episode.heard += text_bytes(step.messages, room)
        self._score(rollout, step)
        self._mark(rollout, turn.ids, step.info["decisions"])
        if rollout.error is not None:
            return True
        episode.state = step.info.get("state", _said(step.messages))
        rollout.messages += step.messages
        if step.done or step.truncated or not turn.stopped or not step.messages:
            rollout.status = "truncated" if step.truncated or not (turn.stopped or step.done) else "done"
            return True
        context = self._guard(episode, lambda: self.chat.continuation(step.messages))
        if rollout.error is not None:
            return True
        if len(rollout.tokens) + len(context) >= self.budgets.context:  # training must not see more than fits either
            rollout.status = "truncated"
            return True
        rollout.add_context(context)
        return not self._request(key, episode, "truncated")

    def _score(self, rollout: Rollout, step: Step) -> None:
        """Add a step's reward."""
        rollout.reward += step.reward
        rollout.turn_rewards[-1] = step.reward
        rollout.feedback = step.info.get("feedback", rollout.feedback)
        for name, value in step.info["reward_parts"].items():
            rollout.reward_parts[name] = rollout.reward_parts.get(name, 0.0) + value
        rollout.success = step.info.get("success", rollout.reward >= self.success_threshold)

    def _mark(self, rollout: Rollout, ids: list[int], decisions: list[dict[str, Any]]) -> None:
        """Mark the tokens of the turn that was sampled last by what the environment says of its decisions."""
        if not decisions:
            return
        pieces = [self.chat.text([token]) for token in ids]
        for decision in decisions:
            where = _find(pieces, decision["text"], decision["occurrence"])
            if not where:
                rollout.status = "environment_error"
                rollout.error = f"the environment tells of a decision {decision['text']!r} that the turn does not hold"
                return
            for place in where:
                rollout.decisions[len(rollout.tokens) - len(ids) + place] = 1 if decision["right"] else -1

    def _close(self, episode: _Episode) -> None:
        if not isinstance(episode.environment, _Unmade):
            status, error = episode.rollout.status, episode.rollout.error
            self._guard(episode, episode.environment.close)
            if error is not None:  # the first failure is the one to tell
                episode.rollout.status, episode.rollout.error = status, error


def _said(messages: list[Message]) -> str:
    """What messages say, as the name of the state that they lead to."""
    return "\n".join(str(m.get("content")) for m in messages)


def _find(pieces: list[str], text: str, occurrence: int) -> list[int]:
    """Places of the pieces that hold one occurrence of a text: whole pieces, or a part of all of them; none without."""
    spans = [[place] for place, piece in enumerate(pieces) if piece.strip() == text]
    if not spans:
        starts = [0, *itertools.accumulate(map(len, pieces))]
        for found in re.finditer(re.escape(text), "".join(pieces)):
            spans.append([p for p in range(len(pieces)) if starts[p] < found.end() and starts[p + 1] > found.start()])
    return spans[occurrence] if -len(spans) <= occurrence < len(spans) else []


def _status_of(error: Exception) -> Status:
    if isinstance(error, TimeoutError):
        return "environment_timeout"
    if isinstance(error, FloodError):
        return "environment_flood"
    return "invalid_reward" if isinstance(error, RewardError) else "environment_error"


class _Unmade(Environment):
    """Stands for an environment whose constructor has not returned."""

    def step(self, message: Message) -> Step:
        raise NotImplementedError
