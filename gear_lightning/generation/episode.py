"""One episode: reads the policy's turns, calls the environment, and tracks masks and budgets."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..batch import REASONING
from ..environments.awaiting import EpisodeTasks
from ..environments.base import Environment, FloodError, Message, RewardError, Step, Task, TransientError
from ..environments.checks import CheckedStep, checked_messages, checked_step, text_bytes
from ..environments.decisions import decision_marks
from ..errors import UserError
from ..rollout import Rollout, Status
from .budgets import Budgets
from .chat import Chat, ToolCallError
from .engine import SampledTurn, TurnRequest

CHECK = 64  # tokens between two searches for reasoning that the policy has opened again, see `Budgets.thinking_tokens`


@dataclass(frozen=True)
class EnvironmentCall:
    """A call of the environment that an episode needs.

    Attributes:
        function: makes the call, on any thread.
        then: takes the result (None if the call failed) and the error, and returns what the episode needs next.
    """

    function: Callable[[], Any]
    then: "Callable[[Any, Exception | None], Needs]"


Needs = TurnRequest | EnvironmentCall | None  # None: the episode is over


@dataclass(frozen=True)
class Setting:
    """What all episodes have in common: see `AgentLoop`."""

    chat: Chat
    environment: Callable[[], Environment]
    budgets: Budgets
    success_threshold: float


class Episode:
    """One episode.

    Args:
        key: its number.
        task: the task.
        seed: determines all randomness of the episode.
        setting: what all episodes have in common.
        version: the policy's version.
        attempt: number of earlier attempts to open it.

    Attributes:
        rollout: the rollout.
        transient: whether a retry may fix the failure of its opening.
        restarted: whether the next request does not extend the ids of the one before.
        over: whether nothing but closing the environment is left to do.
    """

    def __init__(self, key: int, task: Task, seed: tuple[int, ...], setting: Setting, version: int, attempt: int = 0):
        self.key, self.seed, self.attempt = key, seed, attempt
        self.chat, self.budgets, self.setting = setting.chat, setting.budgets, setting
        self.rollout = Rollout(task, list(task.messages), policy_version=version, retries=attempt)
        self.transient = self.restarted = self.over = False
        self._environment: Environment | None = None
        self._tasks = EpisodeTasks()  # what its async code starts
        self._started = time.monotonic()
        self._sampled = 0
        self._begin: int | None = None  # index of the first token of a turn that has not ended
        self._requests = 0  # of that turn
        self._bytes = 0  # of text from the environment
        self._state = ""  # state in which the next turn begins

    # -- opening and closing --------------------------------------------------------------------------------------

    def open(self) -> EnvironmentCall:
        """Return the call that creates the environment and resets it."""
        return EnvironmentCall(self._open, self._opened)

    def _open(self) -> list[Message]:
        self._started = time.monotonic()
        task = self.rollout.task
        task.check_format()  # not every task was checked before training
        environment = self._tasks.call(self.setting.environment)
        self._environment = environment
        mine = copy.deepcopy(task)  # the environment may modify its copy
        opening = self._tasks.call(environment.reset, mine, seed=hash(self.seed) & 0x7FFFFFFF)
        return checked_messages(opening, "reset", self.budgets.output_bytes)

    def _opened(self, opening: list[Message], error: Exception | None) -> Needs:
        rollout = self.rollout
        if self._failed(error):
            self.transient = isinstance(error, TransientError | TimeoutError)
            return None
        self._bytes = text_bytes(opening, self.budgets.output_bytes)
        self._state = _text_of(opening)
        rollout.messages += opening
        rollout.opening_messages = len(rollout.messages)
        prompt = self._render(lambda: self.chat.prompt(rollout.messages, rollout.task.tools))
        if prompt is None:
            return None
        rollout.prompt_length = len(prompt)
        rollout.add_context(prompt)
        return self._request("prompt_too_long")

    def close(self) -> EnvironmentCall | None:
        """Return the call that closes the environment. A failure is recorded but does not change the outcome, which is
        already known."""
        if self._environment is None:
            return self._closed(None, None)
        return EnvironmentCall(self._close, self._closed)

    def _close(self) -> None:
        environment, self._environment = self._environment, None
        if environment is not None:
            self._tasks.call(environment.close)

    def _closed(self, _: Any, error: Exception | None) -> EnvironmentCall | None:
        """Return the call that cancels what the environment leaves behind."""
        self._cancelled(None, error)
        return EnvironmentCall(self._tasks.cancel, self._cancelled) if self._tasks.left else None

    def _cancelled(self, _: Any, error: Exception | None) -> None:
        if error is not None:
            self.rollout.note(f"close: {error}")

    # -- failures -------------------------------------------------------------------------------------------------

    def _failed(self, error: Exception | None) -> bool:
        """Record the failure of a call, which ends the rollout. Return whether there is one."""
        if error is None:
            return False
        self.rollout.status, self.rollout.error = _status_of(error), str(error)
        return True

    def _render(self, function: Callable[[], list[int]]) -> list[int] | None:
        """Return the ids of messages; None if the chat template fails, which ends the rollout."""
        try:
            return function()
        except Exception as error:
            self._failed(error)
            return None

    # -- budgets --------------------------------------------------------------------------------------------------

    def _turn_limit(self) -> int:
        """Return the maximum number of tokens of the next turn; 0 if the budgets allow no further turn."""
        budgets, rollout = self.budgets, self.rollout
        late = budgets.seconds is not None and time.monotonic() - self._started > budgets.seconds
        if late or rollout.turns >= budgets.turns:
            return 0
        left = min(budgets.tokens - self._sampled, budgets.context - len(rollout.tokens))
        return max(0, min(left, budgets.turn_tokens or budgets.tokens))

    def _left_in_turn(self) -> int:
        """Return the maximum number of further tokens of a turn that has not ended."""
        budgets, rollout = self.budgets, self.rollout
        left = min(budgets.tokens - self._sampled, budgets.context - len(rollout.tokens))
        return min(left, (budgets.turn_tokens or budgets.tokens) - sum(rollout.action_mask[self._begin :]))

    def _request(self, otherwise: Status) -> Needs:
        """Return the request of the next turn. If the budgets allow none, end the rollout with status ``otherwise``."""
        rollout, limit = self.rollout, self._turn_limit()
        if not limit:
            rollout.status = otherwise
            if otherwise == "prompt_too_long":
                rollout.error = (
                    f"the prompt has {len(rollout.tokens)} tokens, which leaves no space for a response "
                    f"(budgets.context={self.budgets.context})"
                )
            return None
        if self.budgets.thinking_tokens is not None:
            limit = min(limit, self.budgets.thinking_tokens)
        self._requests = 1
        return TurnRequest(self.key, list(rollout.tokens), limit, (*self.seed, rollout.turns))

    def _continue(self) -> TurnRequest | None:
        """Return the request of further tokens of a turn that was cut to look at its reasoning. Close the reasoning if
        its budget is used up. None: the turn has reached another limit."""
        rollout, budget = self.rollout, self.budgets.thinking_tokens
        if budget is None:
            return None
        parts, inside = self.chat.open_thought(
            rollout.tokens[self._begin :], rollout.task.tools, rollout.tokens[: self._begin]
        )
        sampled = rollout.action_mask[self._begin :]
        used = sum(part == REASONING for part, own in zip(parts, sampled, strict=True) if own)
        mark = self.chat.closing() if inside and used >= budget else []
        left = min(self._left_in_turn(), self.budgets.context - len(rollout.tokens) - len(mark))
        if left < 1:
            return None
        rollout.add_context(mark)
        rollout.closed_thoughts += bool(mark)
        wait = budget - used if inside and not mark else max(budget - used, CHECK, budget // 4)
        seed = (*self.seed, rollout.turns - 1, self._requests)
        self._requests += 1
        return TurnRequest(self.key, list(rollout.tokens), min(left, wait), seed)

    # -- turns ----------------------------------------------------------------------------------------------------

    def advance(self, turn: SampledTurn) -> Needs:
        """Add a sampled turn, and return what the episode needs next.

        Raises:
            UserError: the log-probs are not finite.
        """
        rollout = self.rollout
        if not all(map(math.isfinite, turn.logprobs)):
            raise UserError(
                "the policy's log-probs are not finite while it samples: its weights are not finite, or have grown too "
                "large for this precision. Resume from an earlier checkpoint, by its name (--ckpt_path FILE), with a "
                "lower learning rate, gradient clipping (trainer.gradient_clip_val) or a wider trainer.precision"
            )
        if self._begin is None:
            self._begin = len(rollout.tokens)
            rollout.states.append(self._state)
            rollout.add_turn(turn)
        else:
            rollout.continue_turn(turn)
        self._sampled += len(turn.ids)
        if not turn.stopped and (request := self._continue()) is not None:
            return request
        begin, self._begin = self._begin, None
        turn = replace(turn, ids=rollout.tokens[begin:])  # all of it, with marks that closed its reasoning
        context, tools = rollout.tokens[:begin], rollout.task.tools
        made = sum(len(m.get("tool_calls") or ()) for m in rollout.messages)
        try:
            read = self.chat.read(turn.ids, tools, context, made)
        except ToolCallError as error:
            read = self.chat.read_invalid(turn.ids, tools, context)
            rollout.status, rollout.error = ("invalid_tool_call" if turn.stopped else "truncated"), str(error)
        rollout.set_parts(begin, read.parts)
        rollout.messages.append(read.message)
        if rollout.error is not None:
            return None
        if not turn.stopped and read.message.get("tool_calls"):
            rollout.status = "truncated"  # an incomplete call is not executed
            return None
        return self._ask(turn, read.message)

    def _ask(self, turn: SampledTurn, message: Message) -> EnvironmentCall:
        """Return the call of the environment with a message."""
        limit = self.budgets.output_bytes - self._bytes
        mine = copy.deepcopy(message)  # the environment may modify its copy, now or later
        environment = self._environment
        assert environment is not None

        def then(step: CheckedStep, error: Exception | None) -> Needs:
            needs = None if self._failed(error) else self._answered(turn, message, step, limit)
            if self.rollout.error is not None and turn.stopped and _empty(message):
                # the policy caused this end: the rollout stays learnable even if the environment fails on an empty
                # answer
                self.rollout.note(self.rollout.error)
                self.rollout.status, self.rollout.error = "empty_response", None
            return needs

        return EnvironmentCall(lambda: checked_step(self._tasks.call(environment.step, mine), limit), then)

    def _answered(self, turn: SampledTurn, message: Message, step: CheckedStep, limit: int) -> Needs:
        """Add the environment's answer to a message, and return the request of the next turn."""
        rollout = self.rollout
        self._score(step)
        self._mark(turn.ids, step.info["decisions"])
        self._bytes += text_bytes(step.messages, limit)
        self._state = step.info.get("state", _text_of(step.messages))
        rollout.messages += step.messages
        ended = step.done or not (step.messages or step.broken)
        cut = step.truncated or not turn.stopped or not (ended or self._turn_limit())
        if step.broken and not (ended or cut):
            rollout.status, rollout.error = step.broken, step.problem
            return None
        if step.problem is not None:  # the dropped part is not needed
            rollout.note(step.problem)
        if ended or cut:
            rollout.status = "truncated" if cut else "empty_response" if _empty(message) else "done"
            return None
        restart = REASONING in rollout.parts and self.chat.drops_reasoning(step.messages)
        context = self._render(lambda: self._context(step.messages, turn.ids[-1], restart))
        if context is None:
            return None
        before = 0 if restart else len(rollout.tokens)
        if before + len(context) >= self.budgets.context:  # the limit also applies to training rows
            rollout.status = "truncated"
            return None
        if restart:
            rollout.restart(context)
            self.restarted = True
        else:
            rollout.add_context(context)
        return self._request("truncated")

    def _context(self, messages: list[Message], stop: int, restart: bool) -> list[int]:
        """Return the ids between two turns; ``restart``: of the conversation so far, without its reasoning."""
        if restart:
            return self.chat.prompt(self.rollout.messages, self.rollout.task.tools)
        return self.chat.continuation(messages, stop)

    def _score(self, step: Step) -> None:
        """Add a step's reward."""
        rollout = self.rollout
        rollout.reward += step.reward
        rollout.turn_rewards[-1] = step.reward
        rollout.feedback = step.info.get("feedback", rollout.feedback)
        for name, value in step.info["reward_parts"].items():
            rollout.reward_parts[name] = rollout.reward_parts.get(name, 0.0) + value
        rollout.success = step.info.get("success", rollout.reward >= self.setting.success_threshold)
        rollout.tool_errors += step.info.get("tool_errors", [])

    def _mark(self, ids: list[int], decisions: list[dict[str, Any]]) -> None:
        """Mark the tokens of the last sampled turn with the environment's judgments of its decisions."""
        if not decisions:
            return
        rollout = self.rollout
        try:
            marks = decision_marks([self.chat.text([token]) for token in ids], decisions)
        except ValueError as error:
            rollout.note(str(error))
        else:
            begin = len(rollout.decisions) - len(ids)
            rollout.decisions[begin:] = [m * own for m, own in zip(marks, rollout.action_mask[begin:], strict=True)]


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
