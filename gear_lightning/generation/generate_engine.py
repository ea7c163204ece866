"""A slow engine without a key-value cache, for any model."""

from typing import Any

import numpy as np
import torch

from ..distributed.sharding import fingerprint
from .engine import GenerationEngine, SampledTurn, Sampling, TurnRequest, draw, next_logits


class GenerateEngine(GenerationEngine):
    """Samples with a forward of the whole context per token. Slow; for models that `CachedEngine` does not support."""

    def begin(self, model: Any, sampling: Sampling, stop_ids: set[int]) -> None:
        self._model, self._sampling, self._stop_ids = model, sampling, stop_ids
        self._device = model.get_output_embeddings().weight.device
        self._waiting: list[TurnRequest] = []

    def submit(self, request: TurnRequest) -> None:
        self._waiting.append(request)

    @torch.no_grad()
    def poll(self) -> list[SampledTurn]:
        requests, self._waiting = self._waiting, []
        turns = [SampledTurn(r.key) for r in requests]
        draws = [
            np.random.Generator(np.random.Philox(np.random.SeedSequence(r.seed))).random(r.max_tokens) for r in requests
        ]
        while live := [i for i, t in enumerate(turns) if not t.stopped and len(t.ids) < requests[i].max_tokens]:
            contexts = [requests[i].ids + turns[i].ids for i in live]
            width = max(map(len, contexts))
            ids = torch.tensor([c + [0] * (width - len(c)) for c in contexts], device=self._device)
            last = torch.tensor([len(c) - 1 for c in contexts], device=self._device)
            self.before_forward()
            logits = next_logits(self._model, last, ids, use_cache=False)
            uniforms = torch.tensor([draws[i][len(turns[i].ids)] for i in live], device=self._device)
            for i, token, logprob in zip(
                live, *(x.tolist() for x in draw(logits, uniforms, self._sampling)), strict=True
            ):
                turns[i].ids.append(token)
                turns[i].logprobs.append(logprob)
                turns[i].stopped = token in self._stop_ids
        return turns

    def release(self, key: int) -> None:
        return None

    def end(self) -> None:
        del self._model

    def fingerprint(self, dtype: torch.dtype | None) -> str | None:
        return fingerprint(self._model, dtype)
