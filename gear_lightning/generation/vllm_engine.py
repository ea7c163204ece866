"""Samples with vLLM servers, which get the policy's new weights before each rollout phase."""

import contextlib
import copy
import hashlib
import itertools
import math
import queue
import threading
import uuid
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ..distributed.collective import gather, place, run_on_all_ranks
from ..distributed.sharding import fingerprint, is_sharded, shape
from ..errors import UserError
from ..serving.client import Server, ServerError, weights_file
from ..serving.weights import served_weights
from .engine import GenerationEngine, SampledTurn, Sampling, TurnRequest

SLICE = 0.01  # seconds between two looks at `GenerationEngine.interrupted`
PROBE = 64  # tokens whose log-probs are compared after each update
# Largest mean difference of log-probs, in nats, that rounding explains. Measured on a CPU: 5e-6 in float32, 0.06 in
# bfloat16; stale weights, or keys and values of older weights, differ by 0.1 and more in float32.
ROUNDING = {"float32": 1e-3}
COARSE = 0.15


class Gate:
    """Lets turns through side by side, and updates of the weights alone.

    Attributes:
        weights: fingerprint of the weights that the servers have; None while it is unknown.
        version: optimizer steps of these weights.
        cached: tokens of prompts that were found in the servers' caches.
        prompted: tokens of all prompts.
    """

    def __init__(self) -> None:
        self.weights: str | None = None
        self.version = self.cached = self.prompted = 0
        self._changed = threading.Condition()
        self._turns, self._closed = 0, False

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no update is in progress; in the context, none begins."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._turns += 1
        try:
            yield
        finally:
            with self._changed:
                self._turns -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """Wait until the turns that have begun have ended; in the context, none begins."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._turns)
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()


class VLLMEngine(GenerationEngine):
    """Samples with vLLM servers, which ``gear-lightning serve`` starts.

    Token ids go to the server and come back with their log-probs. Before each rollout phase the server gets the
    policy's weights (adapters merged) through a file, if they have changed. It then has to give the log-probs of the
    policy's own forward for fixed ids: checksums do not notice a layer that computes with a stale copy. A turn is drawn
    from the seed of its request.

    Args:
        servers: addresses of the servers; processes and servers are assigned to each other in turn.
        folder: directory in which weights are handed over. On several machines: one that all of them share.
        seconds: wall-clock limit of an answer (a turn, or an update of the weights).
        requests: most turns that a process has requested at the same time.
    """

    continuous = detached = True

    def __init__(
        self,
        servers: list[str] = ["http://127.0.0.1:8765"],  # noqa: B006 - never changed
        folder: str = "/dev/shm",
        seconds: float = 600.0,
        requests: int = 256,
    ):
        if not servers:
            raise UserError("generation.engine.servers: give at least one address")
        if not 0 < seconds < math.inf:
            raise UserError(f"generation.engine.seconds={seconds}: must be above 0 and finite")
        if requests < 1:
            raise UserError(f"generation.engine.requests={requests}: must be at least 1")
        self.servers, self.folder, self.seconds, self.requests = servers, folder, seconds, requests
        self._mine: list[Server] = []
        self._options: list[dict[str, Any]] = []
        self._gate = Gate()  # shared by the engines of all phases
        self._open: dict[Future, tuple[int, str, Server]] = {}

    def fork(self) -> "VLLMEngine":
        fork = copy.copy(self)
        vars(fork).update(vars(self), _open={})
        return fork

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("servers", "folder", "seconds", "requests")}

    # -- weights --------------------------------------------------------------------------------------------------

    def check(self, model: Any) -> None:
        if is_sharded(model):
            raise UserError("VLLMEngine needs whole weights: set generation.weights=gather")

    def check_context(self, tokens: int) -> None:
        for server in self._connected():
            if (longest := server.info()["max_model_len"]) < tokens:
                raise ServerError(
                    f"the vLLM server {server.url} takes {longest} tokens, and generation.budgets.context={tokens}; "
                    "start it again with this recipe"
                )

    def begin(self, model: Any, sampling: Sampling, stop_ids: set[int]) -> None:
        self.check(model)
        self._sampling, self._stop_ids = sampling, sorted(stop_ids)
        self._vocabulary = shape(model.get_output_embeddings().weight)[0]
        now = fingerprint(model)
        run_on_all_ranks(lambda: self._check_servers(sampling))
        if any(gather(now != self._gate.weights)):
            with self._gate.update():
                self._gate.weights = None  # also if loading fails
                run_on_all_ranks(lambda: None)  # no rank samples
                run_on_all_ranks(lambda: self._load(model, now))
                run_on_all_ranks(lambda: self._probe(model, now))
                self._gate.weights = now
        self._gate.version = self.version
        self._done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(self.requests, thread_name_prefix="vllm")
        self._phase = uuid.uuid4().hex  # other processes and phases use the same servers
        self._numbers, self._turns = itertools.count(), itertools.cycle(self._mine)
        self._homes: dict[int, Server] = {}

    def _connected(self) -> list[Server]:
        """Return this process's servers."""
        if not self._mine:
            rank, world = place()
            count = len(self.servers)
            urls = self.servers[rank::world] if count >= world else [self.servers[rank % count]]
            self._mine = [Server(url, self.seconds) for url in urls]
        return self._mine

    def _check_servers(self, sampling: Sampling) -> None:
        if not self._options:
            self._options = [server.options() for server in self._connected()]
        for server, options in zip(self._mine, self._options, strict=True):
            if (options.get("weight_transfer_config") or {}).get("backend") != "file":
                raise ServerError(
                    f"the vLLM server {server.url} takes no weights from a file; start it with gear-lightning serve"
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
        rank, world = place()
        mine = self._mine if len(self.servers) >= world or rank < len(self.servers) else []
        if not mine:
            return
        weights = served_weights(model)
        with weights_file(weights, self.folder) as path:
            for server in mine:
                server.load(path, len(weights), version)

    @torch.no_grad()
    def _probe(self, model: Any, version: str) -> None:
        """Compare log-probs of fixed ids with those of the policy's own forward."""
        longest = min(options["model_config"]["max_model_len"] for options in self._options)
        draws = np.random.Generator(np.random.Philox(0)).integers(0, self._vocabulary, min(PROBE, longest - 1))
        ids = draws.tolist()
        device = model.get_output_embeddings().weight.device
        logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, :-1].float()
        ours = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:], device=device)[:, None])[:, 0].cpu()
        for server, options in zip(self._mine, self._options, strict=True):
            if (found := server.version()) != version:
                raise ServerError(
                    f"the vLLM server {server.url} has weights of version {found} after {version} were sent"
                )
            answer = server.complete(
                prompt=ids, max_tokens=1, temperature=1.0, prompt_logprobs=0, cache_salt=f"probe {version}"
            )
            found = answer["choices"][0]["prompt_logprobs"][1:]
            theirs = [entry[str(token)]["logprob"] for entry, token in zip(found, ids[1:], strict=True)]
            gap = (torch.tensor(theirs) - ours).abs().mean().item()
            dtype = str(options["model_config"]["dtype"]).removeprefix("torch.")
            if not gap <= ROUNDING.get(dtype, COARSE):
                raise ServerError(
                    f"the vLLM server {server.url} does not compute what the policy computes: after an update of its "
                    f"weights, log-probs differ by {gap:.2g} nats on average. This vLLM may not support the model "
                    f"({type(model).__name__}, {dtype}); use another engine"
                )

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


def logprobs_mode(sampling: Sampling) -> str | None:
    """Return vLLM's mode in which the log-probs are those of softmax(logits / temperature); None if any is right:
    greedy turns are not learned from.

    Raises:
        UserError: there is none.
    """
    if sampling.temperature == 0:
        return None
    if sampling.temperature == 1:
        return "raw_logprobs"
    if sampling.top_p < 1 or sampling.top_k:
        raise UserError(
            f"vLLM does not give the log-probs that learning needs for temperature={sampling.temperature:g} together "
            f"with top_p={sampling.top_p:g}, top_k={sampling.top_k}: use temperature 1, or neither top_p nor top_k"
        )
    return "processed_logprobs"


def seed_of(seed: tuple[int, ...]) -> int:
    """Return a request's seed as a number of 63 bits."""
    return int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:8], "big") >> 1
