"""Rollouts, and the agent loop that generates them: it samples turns, calls environments, and tracks masks and
budgets."""

import copy
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

from .batch import REASONING
from .environments.awaiting import EpisodeTasks
from .environments.base import Environment, FloodError, Message, RewardError, Step, Task, TransientError
from .environments.checks import CheckedStep, checked_messages, checked_step, text_bytes
from .environments.deadline import DeadlineRunner
from .environments.decisions import decision_marks
from .errors import UserError
from .generation.budgets import Budgets
from .generation.chat import Chat, ToolCallError
from .generation.engine import GenerationEngine, SampledTurn, Sampling, TurnRequest

Status = Literal[
    "done",  # the environment ended the episode
    "truncated",  # a budget (turns, tokens, seconds, the environment's own) ended it, or cut the last turn short
    "invalid_tool_call",  # the policy wrote an invalid tool call
    "empty_response",  # the policy ended the episode with a turn without text: only a stop token, or white space
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
CHECK = 64  # tokens between two searches for reasoning that the policy has opened again, see `Budgets.thinking_tokens`
SLOW_CALL = 1.0  # duration of an environment's call in seconds from which on progress is reported after it


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
    read as answers.
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
        for column in ("tokens", "action_mask", "turn_ids", "stop_mask", "sampler_logprobs", "decisions", "parts"):
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


@dataclass
class _Episode:
    rollout: Rollout
    environment: Environment
    seed: tuple[int, ...]
    started: float
    sampled: int = 0
    begin: int | None = None  # index of the first token of a turn that has not ended
    requests: int = 0  # of that turn
    environment_bytes: int = 0  # bytes of text from the environment
    state: str = ""  # state in which the next turn begins
    transient: bool = False  # a retry may fix its failure
    tasks: EpisodeTasks = field(default_factory=EpisodeTasks)  # what its async code starts


class AgentLoop:
    """Generates rollouts: runs episodes of tasks with a policy and a generation engine.

    Args:
        chat: converts messages to ids and back.
        engine: samples turns.
        environment: creates one environment per rollout.
        budgets: limits of a rollout.
        sampling: sampling options.
        success_threshold: reward from which a rollout counts as solved if the environment does not set ``success``.
        on_progress: called from time to time with (finished rollouts, all rollouts, sampled tokens).
        stop: called before every call of an environment. If it returns True, unfinished rollouts stay as they are, and
            rollouts that have not begun are omitted.
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
        """Generate one rollout per job.

        Args:
            model: the policy; used in eval mode.
            jobs: (task, seed) pairs; the seed determines all randomness of that rollout.
            policy_version: recorded in the rollouts.
            check: called after the engine has received the model and before it samples.

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
        """Open an episode for each job. Retry those with a transient failure after all others."""
        waiting = list(range(len(jobs)))
        for attempt in range(self.budgets.retries + 1):
            for key in waiting:
                if self.stop():
                    return
                failed = None
                if attempt:
                    self._close(episodes[key])
                    failed = episodes[key].rollout.side_error
                episodes[key] = self._open(key, *jobs[key], version, attempt)
                episodes[key].rollout.side_error = failed
            waiting = [key for key in waiting if episodes[key].transient]

    def _open(self, key: int, task: Task, seed: tuple[int, ...], version: int, attempt: int) -> _Episode:
        rollout = Rollout(task, list(task.messages), policy_version=version, retries=attempt)
        episode = _Episode(rollout, _NotCreated(), seed, time.monotonic())

        def make() -> list[Message]:
            task.check_format()  # not every task was checked before training
            episode.environment = episode.tasks.call(self.environment)
            mine = copy.deepcopy(task)  # the environment may modify its copy
            opening = episode.tasks.call(episode.environment.reset, mine, seed=hash(seed) & 0x7FFFFFFF)
            return checked_messages(opening, "reset", self.budgets.output_bytes)

        opening = self._guard(episode, make)
        if rollout.error is None:
            episode.environment_bytes = text_bytes(opening, self.budgets.output_bytes)
            episode.state = _text_of(opening)
            rollout.messages += opening
            rollout.opening_messages = len(rollout.messages)
            prompt = self._guard(episode, lambda: self.chat.prompt(rollout.messages, task.tools))
            if rollout.error is None:
                rollout.prompt_length = len(prompt)
                rollout.add_context(prompt)
                self._request(key, episode, "prompt_too_long")
        return episode

    def _guard(self, episode: _Episode, function: Callable[[], Any]) -> Any:
        """Call the environment, or render its messages. A failure ends the rollout."""
        rollout = episode.rollout
        try:
            return self._timed(function)
        except Exception as error:
            rollout.status = _status_of(error)
            rollout.error = str(error)
            episode.transient = isinstance(error, TransientError | TimeoutError)
        return None

    def _timed(self, function: Callable[[], Any]) -> Any:
        """Call the environment for at most ``step_seconds``. Report progress after slow and abandoned calls, so that
        many such calls do not look like a run that hangs."""
        started = time.monotonic()
        try:
            return self._call(function, self.budgets.step_seconds)
        finally:
            if time.monotonic() - started >= min(SLOW_CALL, self.budgets.step_seconds):
                self.on_progress(*self._progress)

    def _turn_limit(self, episode: _Episode) -> int:
        """Return the maximum number of tokens of the next turn; 0 if the budgets allow no further turn."""
        budgets, rollout = self.budgets, episode.rollout
        late = budgets.seconds is not None and time.monotonic() - episode.started > budgets.seconds
        if late or rollout.turns >= budgets.turns:
            return 0
        left = min(budgets.tokens - episode.sampled, budgets.context - len(rollout.tokens))
        return max(0, min(left, budgets.turn_tokens or budgets.tokens))

    def _left_in_turn(self, episode: _Episode) -> int:
        """Return the maximum number of further tokens of a turn that has not ended."""
        budgets, rollout = self.budgets, episode.rollout
        left = min(budgets.tokens - episode.sampled, budgets.context - len(rollout.tokens))
        return min(left, (budgets.turn_tokens or budgets.tokens) - sum(rollout.action_mask[episode.begin :]))

    def _request(self, key: int, episode: _Episode, otherwise: Status) -> bool:
        """Request the next turn, or end the rollout with status ``otherwise`` if the budgets allow none. Return whether
        a turn was requested."""
        rollout, limit = episode.rollout, self._turn_limit(episode)
        if not limit:
            rollout.status = otherwise
            if otherwise == "prompt_too_long":
                rollout.error = (
                    f"the prompt has {len(rollout.tokens)} tokens, which leaves no space for a response "
                    f"(budgets.context={self.budgets.context})"
                )
            return False
        if self.budgets.thinking_tokens is not None:
            limit = min(limit, self.budgets.thinking_tokens)
        episode.requests = 1
        self.engine.submit(TurnRequest(key, list(rollout.tokens), limit, (*episode.seed, rollout.turns)))
        return True

    def _continue(self, key: int, episode: _Episode) -> bool:
        """Request further tokens of a turn that was cut to look at its reasoning. Close the reasoning if its budget is
        used up. Return whether tokens were requested; if not, the turn has reached another limit."""
        rollout, budget = episode.rollout, self.budgets.thinking_tokens
        if budget is None:
            return False
        parts, inside = self.chat.open_thought(
            rollout.tokens[episode.begin :], rollout.task.tools, rollout.tokens[: episode.begin]
        )
        sampled = rollout.action_mask[episode.begin :]
        used = sum(part == REASONING for part, own in zip(parts, sampled, strict=True) if own)
        mark = self.chat.closing() if inside and used >= budget else []
        left = min(self._left_in_turn(episode), self.budgets.context - len(rollout.tokens) - len(mark))
        if left < 1:
            return False
        rollout.add_context(mark)
        rollout.closed_thoughts += bool(mark)
        wait = budget - used if inside and not mark else max(budget - used, CHECK, budget // 4)
        seed = (*episode.seed, rollout.turns - 1, episode.requests)
        episode.requests += 1
        self.engine.submit(TurnRequest(key, list(rollout.tokens), min(left, wait), seed))
        return True

    def _advance(self, key: int, episode: _Episode, turn: SampledTurn) -> bool:
        """Add a sampled turn, call the environment, and request the next turn. Return whether the rollout is over."""
        rollout = episode.rollout
        if not all(map(math.isfinite, turn.logprobs)):
            raise UserError(
                "the policy's log-probs are not finite while it samples: its weights are not finite, or have grown too "
                "large for this precision. Resume from an earlier checkpoint, by its name (--ckpt_path FILE), with a "
                "lower learning rate, gradient clipping (trainer.gradient_clip_val) or a wider trainer.precision"
            )
        if episode.begin is None:
            episode.begin = len(rollout.tokens)
            rollout.states.append(episode.state)
            rollout.add_turn(turn)
        else:
            rollout.continue_turn(turn)
        episode.sampled += len(turn.ids)
        if not turn.stopped and self._continue(key, episode):
            return False
        begin, episode.begin = episode.begin, None
        turn = replace(turn, ids=rollout.tokens[begin:])  # all of it, with marks that closed its reasoning
        context, tools = rollout.tokens[:begin], rollout.task.tools
        made = sum(len(m.get("tool_calls") or ()) for m in rollout.messages)
        try:
            read = self.chat.read(turn.ids, tools, context, made)
        except ToolCallError as error:
            read = self.chat.read_invalid(turn.ids, tools, context)
            rollout.messages.append(read.message)
            rollout.set_parts(begin, read.parts)
            rollout.status, rollout.error = ("invalid_tool_call" if turn.stopped else "truncated"), str(error)
            return True
        rollout.set_parts(begin, read.parts)
        message = read.message
        rollout.messages.append(message)
        if not turn.stopped and message.get("tool_calls"):
            rollout.status = "truncated"  # an incomplete call is not executed
            return True
        over = self._answer(key, episode, turn, message)
        if rollout.error is not None and turn.stopped and _empty(message):
            # the policy caused this end: the rollout stays learnable even if the environment fails on an empty answer
            rollout.note(rollout.error)
            rollout.status, rollout.error = "empty_response", None
        return over

    def _answer(self, key: int, episode: _Episode, turn: SampledTurn, message: Message) -> bool:
        """Call the environment with a message, and request the next turn. Return whether the rollout is over."""
        rollout, limit = episode.rollout, self.budgets.output_bytes - episode.environment_bytes
        mine = copy.deepcopy(message)  # the environment may modify its copy, now or later
        step: CheckedStep = self._guard(
            episode, lambda: checked_step(episode.tasks.call(episode.environment.step, mine), limit)
        )
        if rollout.error is not None:
            return True
        self._score(rollout, step)
        self._mark(rollout, turn.ids, step.info["decisions"])
        episode.environment_bytes += text_bytes(step.messages, limit)
        episode.state = step.info.get("state", _text_of(step.messages))
        rollout.messages += step.messages
        ended = step.done or not (step.messages or step.broken)
        cut = step.truncated or not turn.stopped or not (ended or self._turn_limit(episode))
        if step.broken and not (ended or cut):
            rollout.status, rollout.error = step.broken, step.problem
            return True
        if step.problem is not None:  # the dropped part is not needed
            rollout.note(step.problem)
        if ended or cut:
            rollout.status = "truncated" if cut else "empty_response" if _empty(message) else "done"
            return True
        restart = REASONING in rollout.parts and self.chat.drops_reasoning(step.messages)
        context = self._guard(episode, partial(self._context, rollout, step.messages, turn.ids[-1], restart))
        if rollout.error is not None:
            return True
        before = 0 if restart else len(rollout.tokens)
        if before + len(context) >= self.budgets.context:  # the limit also applies to training rows
            rollout.status = "truncated"
            return True
        if restart:
            rollout.restart(context)
            self.engine.release(key)  # it continues other ids
        else:
            rollout.add_context(context)
        return not self._request(key, episode, "truncated")

    def _context(self, rollout: Rollout, messages: list[Message], stop: int, restart: bool) -> list[int]:
        """Return the ids between two turns; ``restart``: of the conversation so far, without its reasoning."""
        if restart:
            return self.chat.prompt(rollout.messages, rollout.task.tools)
        return self.chat.continuation(messages, stop)

    def _score(self, rollout: Rollout, step: Step) -> None:
        """Add a step's reward."""
        rollout.reward += step.reward
        rollout.turn_rewards[-1] = step.reward
        rollout.feedback = step.info.get("feedback", rollout.feedback)
        for name, value in step.info["reward_parts"].items():
            rollout.reward_parts[name] = rollout.reward_parts.get(name, 0.0) + value
        rollout.success = step.info.get("success", rollout.reward >= self.success_threshold)
        rollout.tool_errors += step.info.get("tool_errors", [])

    def _mark(self, rollout: Rollout, ids: list[int], decisions: list[dict[str, Any]]) -> None:
        """Mark the tokens of the last sampled turn with the environment's judgments of its decisions."""
        if not decisions:
            return
        try:
            marks = decision_marks([self.chat.text([token]) for token in ids], decisions)
        except ValueError as error:
            rollout.note(str(error))
        else:
            begin = len(rollout.decisions) - len(ids)
            rollout.decisions[begin:] = [m * own for m, own in zip(marks, rollout.action_mask[begin:], strict=True)]

    def _close(self, episode: _Episode) -> None:
        """Close an episode's environment, and cancel what it leaves behind. A failure is recorded but does not change
        the outcome, which is already known."""
        if not isinstance(episode.environment, _NotCreated):
            self._end(episode, lambda: episode.tasks.call(episode.environment.close))
        if episode.tasks.left:
            self._end(episode, episode.tasks.cancel)

    def _end(self, episode: _Episode, function: Callable[[], None]) -> None:
        try:
            self._timed(function)
        except Exception as error:
            episode.rollout.note(f"close: {error}")


def _empty(message: Message) -> bool:
    """Return whether an assistant message has neither text nor tool calls."""
    return not message["content"] and not message.get("tool_calls")


def _text_of(messages: list[Message]) -> str:
    """Return the text of messages, which is the default name of the state after them."""
    return "\n".join(str(m.get("content")) for m in messages)


def _status_of(error: Exception) -> Status:
    if isinstance(error, TimeoutError):
        return "environment_timeout"
    if isinstance(error, FloodError):
        return "environment_flood"
    return "invalid_reward" if isinstance(error, RewardError) else "environment_error"


class _NotCreated(Environment):
    """Placeholder for an environment whose constructor has not returned."""

    def step(self, message: Message) -> Step:
        raise NotImplementedError
