"""The generation callback: connects engine, environments and agent loop to the policy and the data module."""

import itertools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from gear_lightning import __version__
from gear_lightning.data import RolloutDataModule, RolloutGenerator
from gear_lightning.distributed.collective import gather, run_on_all_ranks
from gear_lightning.distributed.sharding import shape
from gear_lightning.environments.awaiting import awaited
from gear_lightning.environments.base import Environment, Task
from gear_lightning.environments.checks import refuse_generator_methods
from gear_lightning.environments.single_turn import SingleTurn
from gear_lightning.environments.task_check import check_calls, check_teacher_views
from gear_lightning.errors import UserError
from gear_lightning.generation.agent_loop import AgentLoop
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.cached_engine import CachedEngine
from gear_lightning.generation.engine import GenerationEngine, Sampling
from gear_lightning.generation.sampling_weights import SamplingWeights, WeightsMode
from gear_lightning.generation.vocabulary import check_sampled, check_vocabulary
from gear_lightning.learning.positions import longest_row
from gear_lightning.module import GearModule
from gear_lightning.probes.sampling_check import TRIES, compare, explain, make_trial, ordinary_ids, sample
from gear_lightning.rewards import OverlongPenalty
from gear_lightning.rollout import STATUSES, Rollout
from gear_lightning.runs.identity import UnknownIdentityError, identity_of
from gear_lightning.teacher import SHOWN, OverlongError, privileged_text

SLOW_ENVIRONMENTS = 5.0  # seconds of waiting for environments from which on a warning is due
EnvironmentFactory = Callable[[], Environment]


class GenerationCallback(L.Callback, RolloutGenerator):
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
    ):
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
        self._weights = SamplingWeights(weights)
        self.listeners: list[Callable[[str, int, int, int], None]] = []  # (stage, finished, rollouts, tokens)
        self.stop: Callable[[], bool] = lambda: False  # whether this process's rollouts must end now
        self._checked = self._warned_stream = self._warned = self._warned_tool = self._warned_prompt = False
        self._warned_slow, self._waited = False, 0.0
        self._module: GearModule | None = None
        self._trainer: L.Trainer | None = None
        self._data: RolloutDataModule | None = None

    @property
    def temperature(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.sampling.scoring_temperature

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(data, RolloutDataModule) or not isinstance(pl_module, GearModule):
            raise UserError("GenerationCallback works with a GearModule and a RolloutDataModule")
        self._trainer = trainer
        if self._module is not pl_module or data.generator is not self:
            self.attach(pl_module, data)

    def attach(self, module: GearModule, data: RolloutDataModule) -> None:
        """Connect a data module to this generator and check its tasks.

        Args:
            module: the module whose policy generates the rollouts.
            data: the data module that requests them.

        Raises:
            UserError: a task cannot be used (the message names it), no task's privileged prompt fits, or an option
                needs reasoning or tool calls, and there are none.
        """
        self.check_reasoning(module)
        self._module, self._data = module, data
        data.generator = self
        data.check_tasks()
        check_teacher_views(module, data.train_tasks)
        check_calls(module.credit, data.train_tasks)

    def generate(self, jobs: list[tuple[Task, tuple[int, ...]]], stage: str) -> list[Rollout]:
        assert self._module is not None
        assert self._trainer is not None
        loop = AgentLoop(
            self._module.chat_format,
            self.engine,
            self.environment,
            self.budgets,
            self.sampling if stage == "fit" else self.val_sampling,
            self.success_threshold,
            partial(self._report, stage),
            self.stop,
            self.workers,
        )
        module, version = self._module, self._trainer.global_step
        if not self._checked:
            run_on_all_ranks(lambda: self.check_policy(module, module.policy))
            self.check_sampling(self._trainer, module, module.policy, module.blank)
            self._checked = True
        # one context for the whole phase, so that the weights are cast once and not at every token
        opened = self._opened(self._trainer, module.policy, module.blank, len(jobs))
        with self._computing(self._trainer), opened as (model, check):
            started = time.monotonic()
            rollouts, _ = loop.run(model, jobs, policy_version=version, check=check)
        self._note_waiting(loop.waited, time.monotonic() - started, stage)
        check_sampled(self.engine, rollouts, module.policy.tokenizer_ids)
        self._warn_of_errors(rollouts)
        if stage == "fit" and self.overlong is not None:
            for rollout in rollouts:
                _penalise(rollout, self.overlong)
        if self._weights.streamed and not self._warned_stream:
            self._warned_stream = True
            rate = sum(sum(r.action_mask) for r in rollouts) / max(time.monotonic() - started, 1e-9)
            rank_zero_warn(
                f"Rollouts stream the policy's layers at every token: {rate:,.0f} tokens/s on each process. "
                "generation.weights=gather is faster if a full copy fits."
            )
        return rollouts

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

    def _computing(self, trainer: L.Trainer) -> Any:
        """Return an autocast context for the precision in which the policy computes."""
        mixed = trainer.precision == "bf16-mixed"
        return torch.autocast(trainer.strategy.root_device.type, dtype=torch.bfloat16, enabled=mixed)

    def _opened(self, trainer: L.Trainer, policy: Any, blank: Any, rollouts: int) -> Any:
        """Return the context that holds the weights for sampling this many rollouts, see `SamplingWeights.open`."""
        strategy = trainer.strategy
        computes_in, streams = getattr(strategy, "computes_in", None), getattr(strategy, "streams", True)
        dtype = getattr(torch, self.weights_dtype) if self.weights_dtype else computes_in
        cache = self._cache_bytes(trainer, policy, rollouts)
        return self._weights.open(policy, blank, trainer.global_step, cache, self.engine, dtype, streams)

    def _cache_bytes(self, trainer: L.Trainer, policy: Any, rollouts: int) -> int:
        """Return the bytes of the keys and values of this many full contexts; an upper estimate for models whose layers
        differ in width."""
        config = policy.config.get_text_config()
        try:
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            width = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        except Exception:  # recurrent models; transformers raises its own error if layers differ
            width = config.hidden_size
        size = 2 if self.weights_dtype == "bfloat16" or "bf16" in str(trainer.precision) else 4
        return rollouts * self.budgets.context * config.num_hidden_layers * 2 * width * size

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

    def _new_environment(self) -> Environment:
        try:
            environment: Environment = awaited(self.environment())
            refuse_generator_methods(environment)
            return environment
        except (UserError, KeyboardInterrupt):
            raise
        except BaseException as error:  # its constructor may raise anything, SystemExit included
            raise UserError(f"generation.environment cannot be created: {type(error).__name__}: {error}") from error

    def check_reasoning(self, module: GearModule) -> None:
        """Check that options which need the policy's reasoning get it.

        Raises:
            UserError: reasoning is not separated from the answer.
        """
        if module.chat_options.thinking != "off":
            return
        names = ["generation.budgets.thinking_tokens"] * (self.budgets.thinking_tokens is not None)
        names += ["model.credit.where=answer"] * (module.credit.where == "answer")
        if names:
            raise UserError(
                f"{' and '.join(names)} {'does' if len(names) == 1 else 'do'} nothing with model.chat.thinking=off, "
                "which does not separate reasoning from the answer; leave one of them out"
            )

    def check_model(self, module: GearModule, policy: Any) -> None:
        """Check an unsharded policy before it generates rollouts.

        Raises:
            UserError: its maximum length or its vocabulary is too small, or the engine cannot sample from it.
        """
        self.check_policy(module, policy)
        self.check_engine(policy)

    def check_policy(self, module: GearModule, policy: Any) -> None:
        """Check the maximum length and the vocabulary size of a policy.

        Raises:
            UserError: its maximum length or its vocabulary is too small, or its rotary frequencies would depend on the
                length of a row.
        """
        longest = longest_row(policy.config, type(policy).__name__)
        if longest is not None and self.budgets.context > longest.tokens:
            raise UserError(
                f"generation.budgets.context={self.budgets.context} is more than {longest.why}; set it to "
                f"{longest.tokens} or less"
            )
        self.engine.check_context(self.budgets.context)
        rows = shape(policy.get_input_embeddings().weight)[0]
        sources = () if self._data is None else (self._data.train_tasks, self._data.val_tasks)
        check_vocabulary(module.chat_format, rows, type(policy).__name__, sources)

    def check_sampling(self, trainer: L.Trainer, module: GearModule, policy: Any, blank: Any) -> None:
        """Compare the engine's log-probs with the trainer's, see `sampling_check`. All ranks must call it.

        Args:
            trainer: provides the policy's strategy and precision.
            module: the recipe's module.
            policy: the policy, sharded or not.
            blank: the policy's modules without values, if it is sharded.

        Raises:
            UserError: the log-probs differ by more than rounding, or the engine cannot sample from the policy.
        """
        longest = longest_row(policy.config, type(policy).__name__)
        teacher = self.budgets.context + module.teacher_options.max_prompt if module.needs_teacher else 0
        teacher = teacher if longest is None else min(teacher, longest.tokens)
        ids = ordinary_ids(module.chat_format.tokenizer, policy)
        sizes = (self.budgets.context, teacher, self.budgets.turns)
        for attempt in itertools.count():
            trial = make_trial(ids, policy.config, *sizes, seed=attempt)
            with self._computing(trainer):
                with self._opened(trainer, policy, blank, 2) as (model, _):
                    if not attempt:
                        self.check_engine(model)
                    rows = sample(self.engine, model, self.sampling, trial)
                # without streaming, the sharded policy cannot run a forward here
                scorer = policy if getattr(trainer.strategy, "streams", True) else model
                found = compare(scorer, model, rows, trial.filler, self.sampling.scoring_temperature)
            differences = [difference for difference in gather(found) if difference is not None]
            if not differences:
                return
            if attempt + 1 == TRIES:
                raise UserError(explain(differences[0], policy, self.engine, trial))

    def check_engine(self, model: Any) -> None:
        """Check that the engine can sample from a model.

        Raises:
            UserError: it cannot.
        """
        training = model.training
        self.engine.begin(model.eval(), self.sampling, set())
        self.engine.end()
        model.train(training)

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

    def check_key(self) -> str | None:
        module = self._module
        assert module is not None
        tokenizer = module.chat_format.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts = [module.chat_format.options, module.teacher_options, module.credit, module.distillation, module.longest]
        try:
            if backend is None:
                return None
            made_of = identity_of([*parts, self.budgets, self._new_environment(), tokenizer.chat_template])
        except UnknownIdentityError:
            return None
        return repr([__version__, made_of, backend.to_str(), sorted(tokenizer.get_added_vocab())])

    def check_task(self, task: Task) -> None:
        assert self._module is not None
        chat = self._module.chat_format
        task.check_format()
        environment = self._new_environment()
        awaited(environment.check(task))
        if self._module.credit.needs_decisions and not environment.reports_decisions:
            raise UserError(
                f"{type(self._module.credit).__name__} needs to know which decisions were right, and "
                f"{type(environment).__name__} does not report it (reports_decisions); use another model.credit"
            )
        options, credit = self._module.teacher_options, self._module.credit
        of_the_task = options.shows in SHOWN  # every other option comes from rollouts
        if self._module.needs_teacher and of_the_task and privileged_text(task, options) is None:
            user, other = (credit, "credit=Uniform") if credit.needs_teacher else (self._module.distillation, None)
            kind = "answer" if options.shows == "reference" else "reference"
            there = privileged_text(task, replace(options, shows=kind)) is not None
            missing = "add one, or use model.teacher.shows=peer"
            instead = f"use model.teacher.shows={kind}, which it has," if there else missing
            raise UserError(
                f"task {task.id} has no {options.shows}, and {type(user).__name__} needs one for its teacher; "
                f"{instead} or model.{other or 'distillation=null'}"
            )
        if task.tools:
            chat.check_tools()
        try:
            chat.check_task(task.messages, task.tools)
            length = len(chat.prompt(task.messages, task.tools))
            if task.messages:  # else the environment writes the prompt
                self._module.privileged_prompt(task, task.messages)
        except ValueError as error:  # from the template, or half a character; report it now, not in mid-run
            named = str(error) if f"task {task.id}" in str(error) else f"task {task.id}: {error}"
            raise UserError(named) from None
        if length >= self.budgets.context:
            raise UserError(
                f"task {task.id}: its prompt has {length} tokens and leaves no space for a response; "
                f"generation.budgets.context={self.budgets.context}"
            )

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
            log(f"rollouts/{status}", stats.statuses[status] / max(total, 1), total)


def _penalise(rollout: Rollout, overlong: OverlongPenalty) -> None:
    """Subtract the penalty from the reward and from the last turn's reward, so that turn rewards still sum to it."""
    if not rollout.learnable or not rollout.turns:  # no turn: the run was stopped, and the rollout is repeated
        return
    penalty = overlong(sum(rollout.action_mask))
    rollout.reward -= penalty
    rollout.turn_rewards[-1] -= penalty
    rollout.reward_parts["overlong"] = 0.0 - penalty  # not -0.0
