"""Checks of the generation callback: the policy, its engine and its tasks, before the first rollouts."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import lightning as L
import torch

from gear_lightning import __version__
from gear_lightning.collection.generator import RolloutGenerator
from gear_lightning.data import RolloutDataModule
from gear_lightning.distributed.collective import gather
from gear_lightning.distributed.sharding import shape
from gear_lightning.environments.awaiting import awaited
from gear_lightning.environments.base import Environment, Task
from gear_lightning.environments.checks import refuse_generator_methods
from gear_lightning.errors import UserError
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.engine import GenerationEngine, Sampling
from gear_lightning.generation.sampling_weights import SamplingWeights
from gear_lightning.generation.vocabulary import check_vocabulary
from gear_lightning.learning.positions import longest_row
from gear_lightning.module import GearModule
from gear_lightning.probes.sampling_check import TRIES, compare, explain, make_trial, ordinary_ids, sample
from gear_lightning.runs.identity import UnknownIdentityError, identity_of
from gear_lightning.teacher import SHOWN, privileged_text

EnvironmentFactory = Callable[[], Environment]


class GenerationChecks(RolloutGenerator):
    """Mixin of `GenerationCallback`: what it checks, and the weights that are sampled with."""

    environment: EnvironmentFactory
    engine: GenerationEngine
    sampling: Sampling
    budgets: Budgets
    weights_dtype: Literal["float32", "bfloat16"] | None
    _weights: SamplingWeights
    _module: GearModule | None
    _data: RolloutDataModule | None

    def _computing(self, trainer: L.Trainer) -> Any:
        """Return an autocast context for the precision in which the policy computes."""
        mixed = trainer.precision == "bf16-mixed"
        return torch.autocast(trainer.strategy.root_device.type, dtype=torch.bfloat16, enabled=mixed)

    def _opened(self, trainer: L.Trainer, policy: Any, blank: Any, rollouts: int, engine: GenerationEngine) -> Any:
        """Return the context that holds the weights for sampling this many rollouts, see `SamplingWeights.open`."""
        strategy = trainer.strategy
        computes_in, streams = getattr(strategy, "computes_in", None), getattr(strategy, "streams", True)
        dtype = getattr(torch, self.weights_dtype) if self.weights_dtype else computes_in
        cache = self._cache_bytes(trainer, policy, rollouts)
        return self._weights.open(policy, blank, trainer.global_step, cache, engine, dtype, streams)

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

    def check_correction(self, module: GearModule) -> None:
        """Check that rollouts of an older policy are corrected for.

        Raises:
            UserError: they are not.
        """
        if self.ahead and module.objective is not None and getattr(module.objective, "sampler_cap", 0) is None:
            raise UserError(
                f"generation.ahead={self.ahead} makes rollouts with an older policy, and the objective does not "
                "correct for it; set model.objective.sampler_cap (2.0 is usual)"
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
                with self._opened(trainer, policy, blank, 2, self.engine) as (model, _):
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
