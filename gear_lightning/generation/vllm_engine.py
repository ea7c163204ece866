"""Samples with vLLM servers, which get the policy's new weights before each rollout phase."""

import copy
import itertools
import math
import queue
import uuid
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..distributed.collective import gather, run_on_all_ranks
from ..distributed.sharding import fingerprint, is_sharded, shape
from ..errors import UserError
from ..serving.client import START, Server, ServerError
from ..serving.launch import Launch
from ..serving.own import OwnServers
from ..serving.pool import Pool, connect_servers, start_servers
from ..serving.transfer import Transfer, deliver
from ..serving.weights import served_weights
from .engine import GenerationEngine, RunFacts, SampledTurn, Sampling, TurnRequest
from .vllm_checks import Probe, logprobs_mode, seed_of
from .vllm_gate import Gate

SLICE = 0.01  # seconds between two looks at `GenerationEngine.interrupted`
ADDRESS = "http://127.0.0.1:8765"
SHARED = "/dev/shm"
OPTIONS = "servers", "start", "transfer", "folder", "seconds", "requests"  # of the constructor


class VLLMEngine(GenerationEngine):
    """Samples with vLLM servers, which ``gear-lightning serve`` or the run itself starts.

    Token ids go to the server and come back with their log-probs. Before each rollout phase the server gets the
    policy's weights (adapters merged), if they have changed. It then has to give the log-probs of the
    policy's own forward for fixed ids: checksums do not notice a layer that computes with a stale copy. A turn is drawn
    from the seed of its request.

    Args:
        servers: addresses of the servers; processes and servers are assigned to each other in turn. Null:
            ``http://127.0.0.1:8765``, or the servers of ``start``.
        start: servers that the run starts itself on each of its machines, and that end with it. Null: none.
        transfer: how new weights get to the servers. ``file``: through a file in ``folder``. ``broadcast``: from memory
            to memory, with NCCL if policy and server are on different GPUs, else with Gloo. The servers must then
            reach the ports of the machine that trains.
        folder: directory for the files, which the servers' machines share. Null: ``/dev/shm``. Not for ``broadcast``.
        seconds: wall-clock limit of an answer (a turn, or an update of the weights).
        requests: most turns that a process has requested at the same time.
    """

    continuous = detached = True

    def __init__(
        self,
        servers: list[str] | None = None,
        start: OwnServers | None = None,
        transfer: Transfer = "file",
        folder: str | None = None,
        seconds: float = 600.0,
        requests: int = 256,
    ):
        if servers is not None and not servers:
            raise UserError("generation.engine.servers: give at least one address")
        if servers is not None and start is not None:
            raise UserError("generation.engine.servers and .start exclude each other: leave one of the two out")
        if not 0 < seconds < math.inf:
            raise UserError(f"generation.engine.seconds={seconds}: must be above 0 and finite")
        if requests < 1:
            raise UserError(f"generation.engine.requests={requests}: must be at least 1")
        if transfer == "broadcast" and folder is not None:
            raise UserError("generation.engine.folder does nothing with transfer=broadcast, which writes no file")
        self.servers, self.start, self.folder = servers or [ADDRESS], start, folder
        self.transfer: Transfer = transfer
        self.seconds, self.requests = seconds, requests
        self._reset()

    def _reset(self) -> None:
        self._pool: Pool | None = None
        self._facts: RunFacts | None = None
        self._options: list[dict[str, Any]] = []
        self._gate = Gate()  # shared by the engines of all phases
        self._open: dict[Future, tuple[int, str, Server]] = {}

    def fork(self) -> "VLLMEngine":
        fork = copy.copy(self)
        vars(fork).update(vars(self), _open={})
        return fork

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OPTIONS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    # -- weights --------------------------------------------------------------------------------------------------

    def check(self, model: Any) -> None:
        if is_sharded(model):
            raise UserError("VLLMEngine needs whole weights: set generation.weights=gather")

    def prepare(self, facts: RunFacts) -> None:
        self._facts = facts

    def close(self) -> None:
        """End the servers that this process has started."""
        if self.start is not None and self._pool is not None:
            self._pool.close()
            self._pool, self._options, self._gate.weights = None, [], None

    def check_context(self, tokens: int) -> None:
        for server in () if self.start is not None else self._connected():  # own ones are started for this run
            if (longest := server.info()["max_model_len"]) < tokens:
                raise ServerError(
                    f"the vLLM server {server.url} takes {longest} tokens, and generation.budgets.context={tokens}; "
                    "start it again with this recipe"
                )

    def begin(self, model: Any, sampling: Sampling, stop_ids: set[int]) -> None:
        self.check(model)
        self._sampling, self._stop_ids = sampling, sorted(stop_ids)
        self._vocabulary = shape(model.get_output_embeddings().weight)[0]
        self._start_servers(model)
        now = fingerprint(model)
        run_on_all_ranks(lambda: self._check_servers(sampling))
        if any(gather(now != self._gate.weights)):
            with self._gate.update():
                self._gate.weights = None  # also if loading fails
                run_on_all_ranks(lambda: None)  # no rank samples
                run_on_all_ranks(lambda: self._load(model, now))
                run_on_all_ranks(lambda: self._probe(model, now))
                self._gate.weights, self._gate.version = now, self.version  # before waiting turns begin
        else:
            self._gate.version = self.version
        self._done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(self.requests, thread_name_prefix="vllm")
        self._phase = uuid.uuid4().hex  # other processes and phases use the same servers
        self._numbers, self._turns = itertools.count(), itertools.cycle(self._mine)
        self._homes: dict[int, Server] = {}

    @property
    def _mine(self) -> list[Server]:
        return [] if self._pool is None else self._pool.servers

    def _connected(self) -> list[Server]:
        """Return this process's servers."""
        if self._pool is None:
            self._pool = connect_servers(self.servers, self.seconds)
        return self._mine

    def _start_servers(self, model: Any) -> None:
        """Start the run's own servers, if they are not running. All ranks must call it."""
        if self.start is None or self._pool is not None:
            return
        facts, options, device = self._facts, self.start, model.get_output_embeddings().weight.device
        if facts is None:
            raise UserError("generation.engine.start needs a GenerationCallback, which knows the run")

        def launch(folder: Path) -> Launch:
            facts.write_model(folder)
            mode = logprobs_mode(facts.sampling) or "raw_logprobs"
            given = (options.python.absolute(), folder.absolute(), facts.dtype, facts.context, mode, self.transfer)
            return Launch(*given, cpu=not options.gpus, kv_gib=options.kv_gib)

        self._pool = start_servers(options, launch, facts.folder, device, self.seconds)

    def _check_servers(self, sampling: Sampling) -> None:
        if not self._options:
            self._options = [server.options() for server in self._connected()]
        for server, options in zip(self._mine, self._options, strict=True):
            if (has := (options.get("weight_transfer_config") or {}).get("backend")) != self.transfer:
                raise ServerError(
                    f"the vLLM server {server.url} was started for weights by {has or 'nothing'}, and "
                    f"generation.engine.transfer={self.transfer}; start it again with this recipe ({START})"
                )
            has, needs = options["model_config"]["logprobs_mode"], logprobs_mode(sampling)
            if needs is not None and has != needs:
                raise ServerError(
                    f"the vLLM server {server.url} was started with --logprobs-mode {has}, and temperature "
                    f"{sampling.temperature:g} needs {needs}; start it again with this recipe"
                )
            if self._gate.weights is not None and (found := server.version()) != self._gate.weights:
                raise ServerError(
                    f"the vLLM server {server.url} has weights of version {found}, and this run gave it "
                    f"{self._gate.weights}: it was restarted, or another run uses it"
                )

    def _load(self, model: Any, version: str) -> None:
        """Give the weights to the servers for which this process is responsible: one process for each."""
        if self._pool is None or not self._pool.sends:
            return
        deliver(self._mine, served_weights(model), version, self.transfer, self.folder or SHARED, self.seconds)

    def _probe(self, model: Any, version: str) -> None:
        """Compare log-probs of fixed ids with those of the policy's own forward."""
        longest = min(options["model_config"]["max_model_len"] for options in self._options)
        probe = Probe(model, self._vocabulary, longest)
        for server, options in zip(self._mine, self._options, strict=True):
            if (found := server.version()) != version:
                raise ServerError(
                    f"the vLLM server {server.url} has weights of version {found} after {version} were sent"
                )
            answer = server.complete(
                prompt=probe.ids, max_tokens=1, temperature=1.0, prompt_logprobs=0, cache_salt=f"probe {version}"
            )
            found = answer["choices"][0]["prompt_logprobs"][1:]
            theirs = [entry[str(token)]["logprob"] for entry, token in zip(found, probe.ids[1:], strict=True)]
            probe.check(theirs, str(options["model_config"]["dtype"]), f"the vLLM server {server.url}")

    def fingerprint(self, dtype: torch.dtype | None) -> str | None:
        return self._gate.weights

    # -- turns ----------------------------------------------------------------------------------------------------

    def submit(self, request: TurnRequest) -> None:
        server = self._homes.setdefault(request.key, next(self._turns))  # its cache holds the conversation
        longest = self._options[self._mine.index(server)]["model_config"]["max_model_len"]
        if len(request.ids) + request.max_tokens > longest:  # vLLM would cut the turn short without an error
            raise ServerError(
                f"the vLLM server {server.url} takes {longest} tokens, and a turn needs {len(request.ids)} + "
                f"{request.max_tokens}; start it again with this recipe"
            )
        name = f"{self._phase}-{next(self._numbers)}"
        future = self._threads.submit(self._sample, server, name, request)
        self._open[future] = request.key, name, server
        future.add_done_callback(self._done.put)

    def _sample(self, server: Server, name: str, request: TurnRequest) -> tuple[int, dict[str, Any]]:
        """Return the version of the weights that sample a turn, and the server's answer."""
        sampling = self._sampling
        with self._gate.turn():
            return self._gate.version, server.complete(
                request_id=name,
                prompt=request.ids,
                max_tokens=request.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=seed_of(request.seed),
                logprobs=0,
                return_token_ids=True,
                stop_token_ids=self._stop_ids,
                ignore_eos=True,
                add_special_tokens=False,
                cache_salt=self._gate.weights,
            )

    def poll(self) -> list[SampledTurn]:
        while self._open and not self.interrupted():
            try:
                done = [self._done.get(timeout=SLICE)]
            except queue.Empty:
                continue
            while self._done.qsize():
                done.append(self._done.get())
            return [self._turn(future) for future in done]
        return []

    def _turn(self, future: Future) -> SampledTurn:
        key, _, server = self._open.pop(future)
        version, answer = future.result()
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        reason = choice["finish_reason"]
        if reason not in ("stop", "length") or len(ids) != len(logprobs) or not ids:
            raise ServerError(
                f"the vLLM server {server.url} gave a turn up: {reason!r}, {len(ids)} ids, {len(logprobs)} log-probs"
            )
        if max(ids) >= self._vocabulary:
            raise ServerError(
                f"the vLLM server {server.url} sampled id {max(ids)}, and the policy has {self._vocabulary}"
            )
        self._gate.prompted += usage.get("prompt_tokens", 0)
        self._gate.cached += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return SampledTurn(key, ids, logprobs, reason == "stop", version)

    def release(self, key: int) -> None:
        self._homes.pop(key, None)

    def end(self) -> None:
        left, self._open = self._open, {}
        if left:  # the phase was interrupted
            for future in left:
                future.cancel()
            for server in self._mine:
                names = [name for future, (_, name, at) in left.items() if at is server and not future.done()]
                try:
                    server.abort(names)
                except ServerError as error:
                    warnings.warn(str(error), stacklevel=2)
        self._threads.shutdown(wait=False, cancel_futures=True)
        if left:
            return
        with self._gate.turn():
            for server in self._mine:
                if (found := server.version()) != self._gate.weights:
                    raise ServerError(
                        f"the vLLM server {server.url} got other weights while it sampled ({found}, not "
                        f"{self._gate.weights}): another run uses it"
                    )

    def metrics(self) -> list[tuple[str, float, int]]:
        weight = max(self._gate.prompted, 1)
        rate = self._gate.cached / weight
        self._gate.cached = self._gate.prompted = 0
        return [("perf/prefix_hit_rate", rate, weight)]
