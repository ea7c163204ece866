"""The generation callback: connects engine, environments and agent loop to the policy and the data module."""

import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from gear_lightning.callbacks.generation_checks import EnvironmentFactory, GenerationChecks
from gear_lightning.collection.generator import Enough, Job
from gear_lightning.data import RolloutDataModule
from gear_lightning.distributed.collective import run_on_all_ranks
from gear_lightning.environments.single_turn import SingleTurn
from gear_lightning.environments.task_check import check_calls, check_teacher_views
from gear_lightning.errors import UserError
from gear_lightning.generation.agent_loop import AgentLoop
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.cached_engine import CachedEngine
from gear_lightning.generation.engine import GenerationEngine, RunFacts, Sampling
from gear_lightning.generation.flight import Flight
from gear_lightning.generation.sampling_weights import SamplingWeights, WeightsMode
from gear_lightning.generation.vocabulary import check_sampled
from gear_lightning.module import GearModule
from gear_lightning.rewards import OverlongPenalty
from gear_lightning.rollout import STATUSES, Rollout
from gear_lightning.serving.launch import served_dtype, write_model
from gear_lightning.teacher import OverlongError

SLOW_ENVIRONMENTS = 5.0  # seconds of waiting for environments from which on a warning is due


class GenerationCallback(L.Callback, GenerationChecks):
    """Generates rollouts for the data module with the policy's newest weights.

    Args:
        environment: runs and scores the tasks; one instance per rollout.
        engine: samples the policy's turns.
        sampling: how tokens are sampled in training.
        val_sampling: how tokens are sampled in evaluation. Null: as in training.
        budgets: limits of one rollout.
        success_threshold: minimum reward of a solved rollout, if the environment does not report success.
        overlong: length penalty, subtracted from the rewards of finished training rollouts. It does not change whether
            a rollout counts as solved, and does not apply in evaluation. Null: no penalty.
        weights: how to sample under a strategy that shards the weights: ``gather`` a full copy on every process for
            each rollout phase, ``stream`` the layers through every process at every token, or ``auto``: gather if the
            copy fits.
        weights_dtype: dtype of the copy; if set, a copy is also made of weights that are not sharded. Null: the dtype
            in which the policy computes.
        workers: environments (reset, step, close; with their tools and rewards) that are called at the same time, on
            threads, while the policy samples other rollouts. 0: one after another, between the policy's turns: right
            for fast environments in Python. Environments must then share nothing that is not safe between threads;
            `Isolated` ones share nothing. The seeds of all draws are the same, so sampled ids change at most by the
            rounding of other batch sizes.
        ahead: number of iterations whose rollouts are begun before they are needed, and sampled while the policy is
            updated. Needs an engine that samples outside of this process (`VLLMEngine`), and
            ``model.objective.sampler_cap``, which corrects for the older policy. A token is learned from at most
            ``ahead`` iterations after the weights that sampled it (``train/staleness``). With 2 or more, conversations
            are open while the weights change, and continue with the new ones from their next turn on (partial
            rollouts). 0: rollouts are always those of the newest policy, and a resumed run equals an uninterrupted one;
            otherwise, rollouts that were begun are sampled again after a resume, with newer weights.
    """

    def __init__(
        self,
        environment: EnvironmentFactory = SingleTurn,
        engine: GenerationEngine = CachedEngine(),
        sampling: Sampling = Sampling(),
        val_sampling: Sampling | None = None,
        budgets: Budgets = Budgets(),
        success_threshold: float = 1.0,
        overlong: OverlongPenalty | None = None,
        weights: WeightsMode = "auto",
        weights_dtype: Literal["float32", "bfloat16"] | None = None,
        workers: int = 0,
        ahead: int = 0,
    ):
        if ahead < 0:
            raise UserError(f"generation.ahead={ahead}: must be at least 0")
        if ahead and not engine.detached:
            raise UserError(
                f"generation.ahead={ahead}: {type(engine).__name__} samples in the training process, with the policy "
                "that is updated; use generation.engine gear_lightning.generation.VLLMEngine, or ahead=0"
            )
        if workers < 0:
            raise UserError(f"generation.workers={workers}: must be at least 0")
        if sampling.temperature == 0:
            raise UserError(
                "generation.sampling.temperature=0 makes all rollouts of a group equal; use it in val_sampling"
            )
        if not math.isfinite(success_threshold):
            raise UserError(f"generation.success_threshold={success_threshold}: must be a finite number")
        if overlong is not None and overlong.expected + overlong.buffer > budgets.tokens:
            raise UserError(
                f"generation.overlong: expected + buffer = {overlong.expected + overlong.buffer} tokens is more than "
                f"generation.budgets.tokens={budgets.tokens}, so no rollout can get the full penalty; lower "
                "generation.overlong.expected or .buffer, or raise generation.budgets.tokens"
            )
        self.environment = environment
        self.engine = engine
        self.sampling = sampling
        self.val_sampling = val_sampling or sampling
        self.budgets = budgets
        self.success_threshold = success_threshold
        self.overlong = overlong
        self.weights = weights
        self.weights_dtype = weights_dtype
        self.workers = workers
        self.ahead = ahead
        self._weights = SamplingWeights(weights)
        self.listeners: list[Callable[[str, int, int, int], None]] = []  # (stage, finished, rollouts, tokens)
        self.stop: Callable[[], bool] = lambda: False  # whether this process's rollouts must end now
        self._checked = self._warned_stream = self._warned = self._warned_tool = self._warned_prompt = False
        self._warned_slow, self._waited = False, 0.0
        self._module: GearModule | None = None
        self._trainer: L.Trainer | None = None
        self._flights: dict[Flight, Callable[[list[Rollout]], None]] = {}  # what completes their rollouts
        self._handed: int | None = None  # optimizer steps of the weights that a detached engine has
        self._data: RolloutDataModule | None = None

    @property
    def temperature(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.sampling.scoring_temperature

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(data, RolloutDataModule) or not isinstance(pl_module, GearModule):
            raise UserError("GenerationCallback works with a GearModule and a RolloutDataModule")
        self._trainer = trainer
        self.prepare_engine(pl_module, trainer)
        if self._module is not pl_module or data.generator is not self:
            self.attach(pl_module, data)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.engine.close()

    def prepare_engine(self, module: GearModule, trainer: L.Trainer) -> None:
        """Give the engine the facts of the run."""
        source, folder = module.source, Path(trainer.default_root_dir)
        dtype = served_dtype(trainer.precision, self.weights_dtype)
        write = lambda to: write_model(source.skeleton(), source.tokenizer(), to)  # noqa: E731
        self.engine.prepare(RunFacts(folder, self.budgets.context, self.sampling, dtype, write))

    def attach(self, module: GearModule, data: RolloutDataModule) -> None:
        """Connect a data module to this generator and check its tasks.

        Args:
            module: the module whose policy generates the rollouts.
            data: the data module that requests them.

        Raises:
            UserError: a task cannot be used (the message names it), no task's privileged prompt fits, an option
                needs reasoning or tool calls, and there are none, or older rollouts would not be corrected for.
        """
        self.check_reasoning(module)
        self.check_correction(module)
        module.ahead = self.ahead
        self._module, self._data = module, data
        data.generator = self
        data.check_tasks()
        check_teacher_views(module, data.train_tasks)
        check_calls(module.credit, data.train_tasks)

    def generate(self, jobs: list[Job], stage: str, enough: Enough | None = None) -> list[Rollout]:
        module, trainer = self._ready()
        engine = self.engine
        loop = self._loop(stage, engine, self.stop, partial(self._report, stage), enough)
        self._hand_over(engine)
        # one context for the whole phase, so that the weights are cast once and not at every token
        opened = self._opened(trainer, module.policy, module.blank, len(jobs), engine)
        with self._computing(trainer), opened as (model, check):
            started = time.monotonic()
            rollouts, _ = loop.run(model, jobs, policy_version=trainer.global_step, check=check)
        self._complete(rollouts, loop, time.monotonic() - started, stage)
        if self._weights.streamed and not self._warned_stream:
            self._warned_stream = True
            rate = sum(sum(r.action_mask) for r in rollouts) / max(time.monotonic() - started, 1e-9)
            rank_zero_warn(
                f"Rollouts stream the policy's layers at every token: {rate:,.0f} tokens/s on each process. "
                "generation.weights=gather is faster if a full copy fits."
            )
        return rollouts

    def begin(self, jobs: list[Job], enough: Enough | None = None) -> Callable[[], list[Rollout]]:
        if not self.ahead:
            return super().begin(jobs, enough)
        flight = self.fly(jobs, "fit", enough)
        return lambda: self.land(flight)

    def fly(self, jobs: list[Job], stage: str, enough: Enough | None = None, *, keeps_weights: bool = False) -> Flight:
        """Begin to generate rollouts on a thread, with the newest weights. All ranks must call it; `land` must follow.

        Args:
            jobs: as in `generate`, also for the next two.
            stage: as there.
            enough: as there.
            keeps_weights: finish all conversations with these weights, even if newer ones could be handed over.
        """
        module, trainer = self._ready()
        flight, engine = Flight(self.stop, partial(self._report, stage), keeps_weights), self.engine.fork()
        loop = self._loop(stage, engine, flight.stop, flight.report, enough)
        self._hand_over(engine)
        policy, version, started = module.policy, trainer.global_step, time.monotonic()
        training = policy.training
        opened = self._opened(trainer, policy, module.blank, len(jobs), engine)
        with self._computing(trainer), opened as (model, check):
            loop.begin(model.eval(), check)
        policy.train(training)
        self._weights.close()  # the engine has weights of its own
        self._flights[flight] = lambda found: self._complete(found, loop, time.monotonic() - started, stage)
        flight.start(lambda: loop.play(jobs, version))
        return flight

    def land(self, flight: Flight) -> list[Rollout]:
        """Wait for rollouts. All ranks must call it.

        Raises:
            UserError: generating them has failed, on any rank.
        """
        found = run_on_all_ranks(flight.result)
        self._flights.pop(flight)(found)
        return found

    def _ready(self) -> tuple[GearModule, L.Trainer]:
        """Return module and trainer. Before the first rollouts, check the policy and the engine."""
        assert self._module is not None
        assert self._trainer is not None
        module, trainer = self._module, self._trainer
        if not self._checked:
            run_on_all_ranks(lambda: self.check_policy(module, module.policy))
            self.check_sampling(trainer, module, module.policy, module.blank)
            self._checked = True
        return module, trainer

    def _loop(
        self,
        stage: str,
        engine: GenerationEngine,
        stop: Callable[[], bool],
        report: Callable[[int, int, int], None],
        enough: Enough | None,
    ) -> AgentLoop:
        assert self._module is not None
        overlong = self.overlong if stage == "fit" else None

        def ended(job: int, rollout: Rollout) -> bool:
            if overlong is not None:
                _penalise(rollout, overlong)
            return enough is not None and enough(job, rollout)

        return AgentLoop(
            self._module.chat_format,
            engine,
            self.environment,
            self.budgets,
            self.sampling if stage == "fit" else self.val_sampling,
            self.success_threshold,
            report,
            stop,
            self.workers,
            ended,
        )

    def _hand_over(self, engine: GenerationEngine) -> None:
        """Prepare a phase with the newest weights: wait for open conversations, unless they may change theirs."""
        assert self._trainer is not None
        engine.version = self._trainer.global_step
        for flight in self._flights if self._handed != engine.version else ():
            if self.ahead < 2 or flight.keeps_weights:
                flight.wait()
        self._handed = engine.version

    def _complete(self, rollouts: list[Rollout], loop: AgentLoop, seconds: float, stage: str) -> None:
        """Check and count the rollouts of a phase."""
        assert self._module is not None
        self._note_waiting(loop.waited, seconds, stage)
        check_sampled(self.engine, rollouts, self._module.policy.tokenizer_ids)
        self._warn_of_errors(rollouts)

    def _end_flights(self) -> None:
        flights, self._flights = self._flights, {}
        for flight in flights:
            flight.cancel()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end_flights()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end_flights()

    def _note_waiting(self, waited: float, seconds: float, stage: str) -> None:
        """Count the seconds in which nothing was sampled because environments were called, and warn once of many."""
        self._waited += waited if stage == "fit" else 0.0
        if not self.workers and waited > max(SLOW_ENVIRONMENTS, seconds / 2) and not self._warned_slow:
            self._warned_slow = True
            warnings.warn(
                f"{waited:,.0f} of the {seconds:,.0f} s of these rollouts went by in calls of environments, one after "
                "another, while nothing was sampled. generation.workers (16, for example) calls that many at the same "
                "time; time/environment_s shows the seconds; this warning appears once.",
                stacklevel=2,
            )

    def _warn_of_errors(self, rollouts: list[Rollout]) -> None:
        """Warn once of an environment failure that changed no outcome, and once of an exception of a tool that the
        policy has read. ``rollouts/side_errors`` and ``rollouts/tool_errors`` count both."""
        found = next((r for r in rollouts if r.side_error is not None), None)
        if found is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"task {found.task.id}: the environment failed, which changed no outcome ({found.side_error}). The "
                "rollout keeps its reward. rollouts/side_errors counts such rollouts; this warning appears once.",
                stacklevel=2,
            )
        raised = next((r for r in rollouts if r.tool_errors), None)
        if raised is not None and not self._warned_tool:
            self._warned_tool = True
            warnings.warn(
                f"task {raised.task.id}: a tool raised an exception, which the policy reads as its answer "
                f"({raised.tool_errors[0]}). If the tool is wrong and not the call, correct it, or set the "
                "environment's on_error=end. rollouts/tool_errors counts such rollouts; this warning appears once.",
                stacklevel=2,
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._weights.close()  # free memory for the update

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._weights.close()

    on_test_end = on_predict_end = on_validation_end

    def _report(self, stage: str, finished: int, rollouts: int, tokens: int) -> None:
        for listen in self.listeners:
            listen(stage, finished, rollouts, tokens)

    def teacher_prompt(self, rollout: Rollout, peer: Rollout | None) -> tuple[list[int], bool]:
        assert self._module is not None
        said = None if peer is None else peer.messages[peer.opening_messages :]
        opening = rollout.prompt
        response = len(rollout.tokens) - rollout.prompt_length
        try:
            return self._module.privileged_prompt(rollout.task, opening, said, rollout.feedback, response)
        except OverlongError:  # requested by model.teacher.overlong=error
            raise
        except Exception as error:  # a task that the check before training did not cover, or a peer's messages
            if not self._warned_prompt:
                self._warned_prompt = True
                warnings.warn(
                    f"task {rollout.task.id}: the teacher's prompt cannot be built ({error}). Its rollouts get uniform "
                    "credit. teacher/overlong counts such rollouts; this warning appears once.",
                    stacklevel=2,
                )
            return rollout.tokens[: rollout.prompt_length], True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        stats = data.stats

        def log(name: str, values: list | float, weight: int | None = None) -> None:
            mean = sum(values) / max(len(values), 1) if isinstance(values, list) else values
            weight = len(values) if isinstance(values, list) else weight or 1
            weight *= trainer.world_size  # see GearModule._log
            pl_module.log(name, float(mean), batch_size=weight, sync_dist=True, prog_bar=name == "train/reward")

        log("train/reward", stats.rewards)
        log("train/success", [float(s) for s in stats.successes])
        log("train/response_tokens", stats.lengths)
        log("train/turns", stats.turns)
        log("train/reasoning_token_fraction", stats.reasoning / max(stats.tokens, 1), stats.tokens)
        log("train/call_token_fraction", stats.calls / max(stats.tokens, 1), stats.tokens)
        log("train/zero_spread_groups", stats.zero_spread / max(stats.groups, 1), stats.groups)
        pl_module.log("teacher/overlong", float(stats.overlong), batch_size=1, sync_dist=True, reduce_fx="sum")
        total = sum(stats.statuses.values())
        log("time/environment_s", self._waited)
        self._waited = 0.0
        for name, value, weight in self.engine.metrics():
            log(name, value, weight)
        log("rollouts/retried", stats.retried / max(total, 1), total)
        log("rollouts/side_errors", stats.side_errors / max(total, 1), total)
        log("rollouts/tool_errors", stats.tool_errors / max(total, 1), total)
        if self.budgets.thinking_tokens is not None:
            log("rollouts/closed_thoughts", stats.closed_thoughts / max(total, 1), total)
        if data.truncated == "mask":
            log("rollouts/masked", stats.masked / max(total, 1), total)
        for status in STATUSES[1:]:  # all except "done"
            if status == "stopped" and not data.oversample:
                continue
            log(f"rollouts/{status}", stats.statuses[status] / max(total, 1), total)


def _penalise(rollout: Rollout, overlong: OverlongPenalty) -> None:
    """Subtract the penalty from the reward and from the last turn's reward, so that turn rewards still sum to it."""
    if not rollout.learnable or not rollout.turns:  # no turn: the run was stopped, and the rollout is repeated
        return
    penalty = overlong(sum(rollout.action_mask))
    rollout.reward -= penalty
    rollout.turn_rewards[-1] -= penalty
    rollout.reward_parts["overlong"] = 0.0 - penalty  # not -0.0
