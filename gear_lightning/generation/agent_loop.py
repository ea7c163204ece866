"""The agent loop: runs episodes with a policy and a generation engine, and their environments side by side."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from ..environments.base import Environment, Task
from ..environments.deadline import Call, CallPool
from ..rollout import Rollout
from .budgets import Budgets
from .chat import Chat
from .engine import GenerationEngine, SampledTurn, Sampling, TurnRequest
from .episode import EnvironmentCall, Episode, Needs, Setting

SLOW_CALL = 1.0  # seconds between two reports of progress while environments are waited for
STEP, OPEN = 0, 1  # priorities of calls: episodes that have begun come first


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
        workers: calls of environments at the same time, while the engine samples; 0: one after another, between turns.
        enough: called with the index of its job and the rollout when one has ended. If it returns True, the phase ends,
            and the others get the status ``stopped``.

    Attributes:
        waited: seconds in which nothing was sampled because environments were called.
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
        workers: int = 0,
        enough: Callable[[int, Rollout], bool] = lambda *_: False,
    ):
        self.chat = chat
        self.engine = engine
        self.setting = Setting(chat, environment, budgets, success_threshold)
        self.budgets = budgets
        self.sampling = sampling
        self.on_progress = on_progress
        self.stop = stop
        self.workers = workers
        self.enough = enough
        self.waited = 0.0
        self._over = False

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
        training = model.training
        model.eval()
        try:
            self.begin(model, check)
            rollouts = self.play(jobs, policy_version)
        finally:
            model.train(training)
        return rollouts, Counter(r.status for r in rollouts)

    def begin(self, model: Any, check: Callable[[], None] = lambda: None) -> None:
        """Start a phase: hand the weights to the engine. `play` must follow.

        Args:
            model: the policy, in eval mode.
            check: see `run`.
        """
        self.engine.begin(model, self.sampling, self.chat.stop_ids)
        try:
            check()
        except BaseException:
            self.engine.end()
            raise

    def play(self, jobs: list[tuple[Task, tuple[int, ...]]], policy_version: int) -> list[Rollout]:
        """Generate one rollout per job, and end the phase; see `run`. With a detached engine, on any thread."""
        self._jobs, self._version = jobs, policy_version
        self._episodes: dict[int, Episode] = {}
        self._unopened, self._retry = set(range(len(jobs))), list[int]()
        self._requested = self._finished = self._tokens = 0
        self._reported = time.monotonic()
        self._calls = CallPool(max(self.workers, 1))
        try:
            self.engine.interrupted = self._interrupted
            for key in range(len(jobs)):
                self._open(key)
            while not self._ends() and (self._requested or self._calls.busy):
                if self._requested:
                    self._sample()
                else:
                    self._wait()
        finally:
            del self.engine.interrupted
            try:
                self.engine.end()
            finally:
                self._close_all()
        if self._over:
            return [self._outcome(key) for key in range(len(jobs))]
        return [self._episodes[key].rollout for key in sorted(self._episodes)]

    def _outcome(self, key: int) -> Rollout:
        """Return a job's rollout after a phase that ended early."""
        if key in self._episodes and self._episodes[key].over:
            return self._episodes[key].rollout
        task = self._jobs[key][0]
        rollout = self._episodes[key].rollout if key in self._episodes else Rollout(task, list(task.messages))
        rollout.status = "stopped"
        return rollout

    def _ends(self) -> bool:
        return self._over or self.stop()

    # -- sampling -------------------------------------------------------------------------------------------------

    def _sample(self) -> None:
        """Take the environments' answers at hand, sample until turns have ended, and advance their episodes."""
        for call in self._calls.finished():
            self._resume(call)
        turns = self.engine.poll()
        if not turns and not self._calls.ready:
            raise RuntimeError(f"{type(self.engine).__name__} returned no turn, and {self._requested} are requested")
        self._requested -= len(turns)
        for turn in turns:
            if self._ends():
                break
            self._advance(turn)
        self._report()

    def _advance(self, turn: SampledTurn) -> None:
        self._tokens += len(turn.ids)
        episode = self._episodes[turn.key]
        self._meet(episode, episode.advance(turn))

    def _interrupted(self) -> bool:
        """Return whether so many environments have answered that their next turns should join the engine's batch."""
        return self._calls.ready > (0 if self.engine.continuous else self._requested // 8)

    def _report(self) -> None:
        self._reported = time.monotonic()
        self.on_progress(self._finished, len(self._jobs), self._tokens)

    # -- episodes -------------------------------------------------------------------------------------------------

    def _open(self, key: int, attempt: int = 0) -> None:
        if self._ends():
            return
        before = self._episodes.get(key)
        episode = self._episodes[key] = Episode(key, *self._jobs[key], self.setting, self._version, attempt)
        if before is not None:
            episode.rollout.side_error = before.rollout.side_error
        self._call(episode, episode.open(), OPEN)

    def _meet(self, episode: Episode, needs: Needs) -> None:
        """Request the turn, or make the call, that an episode needs."""
        if isinstance(needs, TurnRequest):
            if episode.restarted:
                self.engine.release(episode.key)  # the request does not extend the earlier ids
                episode.restarted = False
            self.engine.submit(needs)
            self._requested += 1
            self._opened(episode)
        elif isinstance(needs, EnvironmentCall):
            if not self._ends():
                self._call(episode, needs)
        elif not episode.over:
            self._end(episode)
        else:
            self._opened(episode)

    def _end(self, episode: Episode) -> None:
        """Close the environment of an episode that is over."""
        episode.over = True
        if not self._again(episode):
            self._finished += 1
            self._over |= self.enough(episode.key, episode.rollout)
        if episode.rollout.turns:
            self.engine.release(episode.key)
        closing = episode.close()
        if closing is None:
            self._opened(episode)
        else:
            self._call(episode, closing)

    def _again(self, episode: Episode) -> bool:
        return episode.transient and episode.attempt < self.budgets.retries

    def _opened(self, episode: Episode) -> None:
        """Note that an episode has been opened, or has failed to and is closed. After the last one, retry those with a
        transient failure."""
        if episode.key not in self._unopened:
            return
        self._unopened.remove(episode.key)
        if self._again(episode):
            self._retry.append(episode.key)
        if self._retry and not self._unopened:
            keys, self._retry = sorted(self._retry), []
            self._unopened = set(keys)
            for key in keys:
                self._open(key, episode.attempt + 1)

    def _close_all(self) -> None:
        """Close the environments of the episodes that are not over."""
        for call in self._calls.cancel_waiting():
            episode, _, priority = call.key
            if priority == OPEN:
                del self._episodes[episode.key]
        self._settle(resume=False)
        for episode in self._episodes.values():
            if (closing := episode.close()) is not None:
                self._start(episode, closing)
        self._settle(resume=True)
        self._calls.close()

    # -- calls ----------------------------------------------------------------------------------------------------

    def _start(self, episode: Episode, needs: EnvironmentCall, priority: int = STEP) -> Call:
        return self._calls.start((episode, needs.then, priority), needs.function, self.budgets.step_seconds, priority)

    def _call(self, episode: Episode, needs: EnvironmentCall, priority: int = STEP) -> None:
        call = self._start(episode, needs, priority)
        while not self.workers and call in self._calls:
            self._wait()

    def _wait(self) -> None:
        """Wait for a call, and resume its episode. Report progress from time to time, so that slow and abandoned calls
        do not look like a run that hangs."""
        started = time.monotonic()
        found = self._calls.finished(SLOW_CALL)
        now = time.monotonic()
        self.waited += now - started
        for call in found:
            self._resume(call)
        if now - self._reported >= SLOW_CALL or any(isinstance(call.error, TimeoutError) for call in found):
            self._report()

    def _resume(self, call: Call) -> None:
        episode, then, _ = call.key
        self._meet(episode, then(call.result, call.error))

    def _settle(self, *, resume: bool) -> None:
        """Wait for all calls that have begun. If ``resume``, make those that follow from them."""
        while self._calls.busy:
            found = self._calls.finished(SLOW_CALL)
            for call in found if resume else ():
                episode, then, _ = call.key
                if isinstance(needs := then(call.result, call.error), EnvironmentCall):
                    self._start(episode, needs)
            if not found:
                self._report()
