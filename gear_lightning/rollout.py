"""Rollouts and the agent loop that makes them: sampling turns, calling environments, keeping masks and budgets."""

import copy
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from .chat import Chat, ToolCallError
from .engines import GenerationEngine, SampledTurn, Sampling, TurnRequest
from .environments.base import Environment, Message, RewardError, Step, Task
from .environments.checks import as_text, checked_messages, checked_step
from .errors import UserError

Status = Literal[
    "done",  # the environment ended the episode
    "truncated",  # a budget (turns, tokens, seconds, the environment's own) ended it
    "invalid_tool_call",  # the policy wrote a tool call that cannot be read; keeps the reward so far
    "empty_response",  # the policy stopped at once
    "prompt_too_long",  # the prompt leaves no room for an answer
    "environment_error",  # reset, step or a tool raised
    "environment_timeout",  # reset, step or a tool took too long
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
    """

    task: Task
    messages: list[Message]
    tokens: list[int] = field(default_factory=list)
    action_mask: list[bool] = field(default_factory=list)
    turn_ids: list[int] = field(default_factory=list)
    stop_mask: list[bool] = field(default_factory=list)
    sampler_logprobs: list[float] = field(default_factory=list)
    prompt_length: int = 0
    opening_messages: int = 0
    turns: int = 0
    reward: float = 0.0
    reward_parts: dict[str, float] = field(default_factory=dict)
    success: bool = False
    status: Status = "done"
    error: str | None = None
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

    def add_turn(self, turn: SampledTurn) -> None:
        """Append a sampled turn."""
        n = len(turn.ids)
        self.tokens += turn.ids
        self.action_mask += [True] * n
        self.turn_ids += [self.turns] * n
        self.stop_mask += [False] * (n - 1) + [turn.stopped]
        self.sampler_logprobs += turn.logprobs
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
        step_seconds: one call of the environment (reset, step), wall clock. A call that takes longer is given up.
        seconds: the whole rollout, wall clock, looked at between turns. Null: no limit. Wall clock makes runs differ.
    """

    turns: int = 8
    tokens: int = 256
    turn_tokens: int | None = None
    context: int = 2048
    step_seconds: float = 30.0
    seconds: float | None = None

    def __post_init__(self):
        for name in ("turns", "tokens", "turn_tokens", "context", "step_seconds", "seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"budgets.{name}={value} must be above 0")


class _Worker:
    """A thread that runs calls one after another; given up for good when one hangs."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True, name="environment").start()

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            function, answer = call
            try:
                answer.put((function(), None))
            except BaseException as error:  # even SystemExit of a tool is that tool's failure
                answer.put((None, error))

    def stop(self) -> None:
        """End the thread after the calls that it has."""
        self._calls.put(None)

    def start(self, function: Callable[[], Any]) -> "queue.SimpleQueue":
        answer: queue.SimpleQueue = queue.SimpleQueue()
        self._calls.put((function, answer))
        return answer


class DeadlineRunner:
    """Runs functions with a deadline, on a thread that is replaced when a function does not come back in time."""

    def __init__(self) -> None:
        self._worker = _Worker()

    def close(self) -> None:
        """Let the thread go."""
        self._worker.stop()

    def __call__(self, function: Callable[[], Any], seconds: float) -> Any:
        """The function's result.

        Raises:
            TimeoutError: no result in time; the call is left behind on a daemon thread.
            Exception: what the function raised.
        """
        answer = self._worker.start(function)
        try:
            result, error = answer.get(timeout=seconds)
        except queue.Empty:
            self._worker = _Worker()
            raise TimeoutError(f"no answer within {seconds:g} s") from None
        if error is None:
            return result
        if isinstance(error, Exception):
            raise error
        raise RuntimeError(f"{type(error).__name__}: {error}") from error  # a tool may not end the process


@dataclass
class _Episode:
    rollout: Rollout
    environment: Environment
    seed: tuple[int, ...]
    started: float
    sampled: int = 0


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
        stop: asked between turns; where it says yes, the rollouts that are not over stay as they are.
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
        training = model.training
        model.eval()
        self.engine.begin(model, self.sampling, self.chat.stop_ids)
        episodes = []
        try:
            check()
            for key, (task, seed) in enumerate(jobs):
                episodes.append(self._open(key, task, seed, policy_version))
            tokens, finished = 0, sum(e.rollout.status != "done" for e in episodes)
            while not self.stop() and (turns := self.engine.poll()):
                for turn in turns:
                    tokens += len(turn.ids)
                    if self._advance(turn.key, episodes[turn.key], turn):
                        finished += 1
                        self.engine.release(turn.key)
                self.on_progress(finished, len(jobs), tokens)
        finally:
            self.engine.end()
            model.train(training)
            for episode in episodes:
                self._close(episode)
            self._call.close()
        return [e.rollout for e in episodes], Counter(e.rollout.status for e in episodes)

    def _open(self, key: int, task: Task, seed: tuple[int, ...], version: int) -> _Episode:
        rollout = Rollout(task, list(task.messages), policy_version=version)
        episode = _Episode(rollout, _Unmade(), seed, time.monotonic())

        def make() -> list[Message]:
            episode.environment = self.environment()
            mine = copy.deepcopy(task)  # what an environment does to its task stays there
            return checked_messages(episode.environment.reset(mine, seed=hash(seed) & 0x7FFFFFFF), "reset")

        opening = self._guard(episode, make)
        if rollout.error is None:
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
        except TimeoutError as error:
            rollout.status, rollout.error = "environment_timeout", str(error)
        except RewardError as error:
            rollout.status, rollout.error = "invalid_reward", as_text(error)
        except Exception as error:
            rollout.status, rollout.error = "environment_error", f"{type(error).__name__}: {as_text(error)}"
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
        step = self._guard(episode, lambda: checked_step(episode.environment.step(message)))
        if rollout.error is not None:
            return True
        self._score(rollout, step)
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
        for name, value in step.info["reward_parts"].items():
            rollout.reward_parts[name] = rollout.reward_parts.get(name, 0.0) + value
        rollout.success = step.info.get("success", rollout.reward >= self.success_threshold)

    def _close(self, episode: _Episode) -> None:
        if not isinstance(episode.environment, _Unmade):
            status, error = episode.rollout.status, episode.rollout.error
            self._guard(episode, episode.environment.close)
            if error is not None:  # the first failure is the one to tell
                episode.rollout.status, episode.rollout.error = status, error


class _Unmade(Environment):
    """Stands for an environment whose constructor has not returned."""

    def step(self, message: Message) -> Step:
        raise NotImplementedError
