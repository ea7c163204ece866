"""Samples with a vLLM in the training process."""

import contextlib
import math
import os
import random
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..distributed.collective import gather, run_on_all_ranks
from ..distributed.sharding import fingerprint, is_sharded, shape
from ..errors import UserError
from ..serving.client import ServerError
from ..serving.gear_repack import repack_head
from ..serving.launch import BLOCK
from ..serving.weights import served_weights
from .engine import GenerationEngine, RunFacts, SampledTurn, Sampling, TurnRequest
from .vllm_checks import Probe, logprobs_mode, seed_of

WHO = "vLLM in this process"
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's core in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


class ColocatedVLLM(GenerationEngine):
    """Samples with a vLLM in the training process, which needs an environment with both: ``make vllm-colocated``.

    Each process has a vLLM, with its own copy of the weights. Before each rollout phase it gets the policy's weights
    (adapters merged) from memory, if they have changed, and has to give the log-probs of the policy's own forward.

    Args:
        kv_gib: memory of the key-value cache of each process, GiB.
        options: further arguments of vLLM's class ``LLM``.
    """

    continuous = True

    def __init__(self, kv_gib: float = 2.0, options: dict[str, Any] | None = None):
        if not 0 < kv_gib < math.inf:
            raise UserError(f"generation.engine.kv_gib={kv_gib}: must be above 0 and finite")
        self.kv_gib, self.options = kv_gib, options
        self._reset()

    def _reset(self) -> None:
        self._llm: Any = None
        self._facts: RunFacts | None = None
        self._print: str | None = None  # fingerprint of the weights that vLLM has
        self._open: dict[str, int] = {}
        self._groups = False  # whether vLLM has made the default process group
        self._numbers = self._cached = self._prompted = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"kv_gib": self.kv_gib, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    # -- weights --------------------------------------------------------------------------------------------------

    @property
    def _engine(self) -> Any:
        return self._llm.llm_engine

    def prepare(self, facts: RunFacts) -> None:
        self._facts = facts

    def check(self, model: Any) -> None:
        if is_sharded(model):
            raise UserError("ColocatedVLLM needs whole weights: set generation.weights=gather")

    def begin(self, model: Any, sampling: Sampling, stop_ids: set[int]) -> None:
        self.check(model)
        self._sampling, self._stop_ids, mode = sampling, sorted(stop_ids), logprobs_mode(sampling)
        self._vocabulary = shape(model.get_output_embeddings().weight)[0]
        if self._llm is None:
            run_on_all_ranks(lambda: self._start(model))
        sampler = self._engine.model_executor.driver_worker.worker.model_runner.sampler
        if mode is not None:
            sampler.logprobs_mode = sampler.topk_topp_sampler.logprobs_mode = mode
        now = fingerprint(model)
        if any(gather(now != self._print)):
            self._print = None  # also if loading fails
            run_on_all_ranks(lambda: self._load(model, now))
            self._print = now

    def _start(self, model: Any) -> None:
        """Start vLLM with random weights."""
        if self._facts is None:
            raise UserError("ColocatedVLLM needs a GenerationCallback, which knows the run")
        if model.get_output_embeddings().weight.device.type != "cpu":
            raise UserError("ColocatedVLLM runs on CPUs; on GPUs, use VLLMEngine, with start on GPUs of its own")
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        alone = not dist.is_initialized()
        try:
            from vllm import LLM  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                f"vLLM cannot be imported in this environment ({error}); start the run with the Python of the one that "
                "make vllm-colocated makes, or use VLLMEngine"
            ) from None
        with _undisturbed(), tempfile.TemporaryDirectory() as folder:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder)
            self._llm = LLM(
                **{
                    "model": folder,
                    "skip_tokenizer_init": True,
                    "load_format": "dummy",
                    "dtype": self._facts.dtype,
                    "max_model_len": self._facts.context,
                    "kv_cache_memory_bytes": int(self.kv_gib * 2**30),
                    "block_size": BLOCK,
                    "enforce_eager": True,
                    "enable_prefix_caching": True,
                    "generation_config": "vllm",
                    **(self.options or {}),
                }
            )
        if alone:  # vLLM has made a process group, and Lightning takes the run for a distributed one
            warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log")
            self._groups = True

    def close(self) -> None:
        """End vLLM, and free its memory."""
        if self._llm is None:
            return
        self._engine.engine_core.shutdown()
        self._llm = self._print = None
        if self._groups:
            from vllm.distributed import parallel_state  # pyright: ignore[reportMissingImports]

            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
            self._groups = False

    def _load(self, model: Any, version: str) -> None:
        """Give vLLM the weights, and compare log-probs of fixed ids with those of the policy's own forward."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        probe = Probe(model, self._vocabulary, self._facts.context if self._facts else 0)
        with _undisturbed():
            pairs = served_weights(model).items()
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(pairs)})
            self._llm.apply_model(repack_head)
            if not self._llm.reset_prefix_cache():
                raise ServerError(f"{WHO} keeps the keys and values of older weights")
            prompt = {"prompt_token_ids": probe.ids, "cache_salt": f"probe {version}"}
            params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
            (answer,) = self._llm.generate([prompt], params, use_tqdm=False)
        found = zip(answer.prompt_logprobs[1:], probe.ids[1:], strict=True)
        probe.check([entry[token].logprob for entry, token in found], self._facts.dtype if self._facts else "", WHO)

    def fingerprint(self, dtype: torch.dtype | None) -> str | None:
        return self._print

    # -- turns ----------------------------------------------------------------------------------------------------

    def submit(self, request: TurnRequest) -> None:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        sampling, longest = self._sampling, 0 if self._facts is None else self._facts.context
        if len(request.ids) + request.max_tokens > longest:  # vLLM would cut the turn short without an error
            raise ServerError(
                f"{WHO} takes {longest} tokens, and a turn needs {len(request.ids)} + {request.max_tokens}; raise "
                "generation.budgets.context"
            )
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=request.max_tokens,
            seed=seed_of(request.seed),
            stop_token_ids=self._stop_ids,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        name, self._numbers = f"{request.key}-{self._numbers}", self._numbers + 1
        prompt = {"prompt_token_ids": request.ids, "cache_salt": self._print}
        with _undisturbed():
            self._engine.add_request(name, prompt, params)
        self._open[name] = request.key

    def poll(self) -> list[SampledTurn]:
        while self._open and not self.interrupted():
            with _undisturbed():
                done = [answer for answer in self._engine.step() if answer.finished]
            if done:
                return [self._turn(answer) for answer in done]
        return []

    def _turn(self, answer: Any) -> SampledTurn:
        key, found = self._open.pop(answer.request_id), answer.outputs[0]
        ids = list(found.token_ids)
        if found.finish_reason not in ("stop", "length") or not ids:
            raise ServerError(f"{WHO} gave a turn up: {found.finish_reason!r}, {len(ids)} ids")
        if max(ids) >= self._vocabulary:
            raise ServerError(f"{WHO} sampled id {max(ids)}, and the policy has {self._vocabulary}")
        logprobs = [entry[token].logprob for entry, token in zip(found.logprobs, ids, strict=True)]
        self._prompted += len(answer.prompt_token_ids or ())
        self._cached += answer.num_cached_tokens or 0
        return SampledTurn(key, ids, logprobs, found.finish_reason == "stop")

    def release(self, key: int) -> None:
        return None

    def end(self) -> None:
        left, self._open = self._open, {}
        if left:  # the phase was interrupted
            with _undisturbed():
                self._engine.abort_request(list(left))
                while self._engine.has_unfinished_requests():
                    self._engine.step()

    def metrics(self) -> list[tuple[str, float, int]]:
        rate, weight = self._cached / max(self._prompted, 1), max(self._prompted, 1)
        self._cached = self._prompted = 0
        return [("perf/prefix_hit_rate", rate, weight)]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep what vLLM changes for the whole process: states of random numbers, threads, autocast."""
    threads, setter = torch.get_num_threads(), torch.set_num_threads
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_num_threads = setter
        torch.set_num_threads(threads)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
