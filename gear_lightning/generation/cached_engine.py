"""An engine that caches the keys and values of each conversation and feeds only new tokens."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed.sharding import fingerprint, shape
from ..errors import UserError
from .engine import GenerationEngine, SampledTurn, Sampling, TurnRequest, draw, next_logits
from .perturbation import low_precision, rounded_anew

OTHER_ENGINE = "set generation.engine to gear_lightning.generation.GenerateEngine"


class _RowCache:
    """Keys and values of conversations at different lengths: row r of every layer holds conversation r.

    Replaces a transformers cache: attention layers call `update`. Columns beyond a row's length hold stale values that
    the attention mask hides. Stored as [rows, columns, heads, dim]: the heads of a token are adjacent, so writing one
    token of each row is one contiguous copy, and attention over few columns reads few cache lines.
    """

    def __init__(self) -> None:
        self.layers: list[list[Tensor]] = []
        self.rows: Tensor | None = None  # rows of this forward; None for all of them
        self.places = torch.empty(0)  # [rows x queries] flat indices (row, column) that this forward writes
        self.height = self.width = self.view = 0

    def aim(self, rows: Tensor | None, columns: Tensor, view: int) -> None:
        """Set where the next forward writes (``columns`` [rows, queries]) and how many columns it attends to."""
        self.rows, self.view = rows, view
        start = torch.arange(len(columns), device=columns.device) if rows is None else rows
        self.places = (start[:, None] * self.width + columns).flatten()

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        while len(self.layers) <= layer_idx:
            shape = (self.height, self.width, key.shape[1], key.shape[3])
            self.layers.append([key.new_zeros(shape), value.new_zeros((*shape[:3], value.shape[3]))])
        out = []
        for store, new in zip(self.layers[layer_idx], (key, value), strict=True):
            store.flatten(0, 1).index_copy_(0, self.places, new.transpose(1, 2).flatten(0, 1))
            seen = store[:, : self.view] if self.rows is None else store[self.rows, : self.view]
            out.append(seen.transpose(1, 2))
        return out[0], out[1]

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def resize(self, height: int, width: int) -> None:
        """Grow the cache to at least ``height`` rows and ``width`` columns, keeping its contents."""
        if height <= self.height and width <= self.width:
            return
        height, width = max(height, self.height), max(width, self.width)
        for layer in self.layers:
            for i, old in enumerate(layer):
                new = old.new_zeros((height, width, *old.shape[2:]))
                new[: self.height, : self.width] = old
                layer[i] = new
        self.height, self.width = height, width

    def copy_rows(self, source: Tensor, target: Tensor, width: int) -> None:
        for layer in self.layers:
            for store in layer:
                store[target, :width] = store[source, :width]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        for layer in self.layers:
            for i, store in enumerate(layer):  # one tensor at a time, so that memory never holds two whole caches
                layer[i] = store[rows]
        self.height = len(rows)


@dataclass
class _Row:
    length: int = 0  # columns in the cache
    request: TurnRequest | None = None
    turn: SampledTurn | None = None
    uniforms: np.ndarray = field(default_factory=lambda: np.empty(0))


class CachedEngine(GenerationEngine):
    """Samples with the policy itself, on this process's device.

    Keeps each conversation's keys and values across turns, and computes a prompt that a group shares once. All open
    turns advance together, one token per step; a finished turn does not wait for all others.

    Args:
        prefill_tokens: maximum number of tokens (rows x longest) in one prefill forward.
    """

    def __init__(self, prefill_tokens: int = 16384):
        if prefill_tokens < 1:
            raise UserError(f"prefill_tokens={prefill_tokens}: must be at least 1")
        self.prefill_tokens = prefill_tokens
        self._model: Any = None
        self._tested: type | None = None
        self._rows: dict[int, int] = {}
        self._table: list[_Row | None] = []
        self._waiting: list[TurnRequest] = []

    def check(self, model: Any) -> None:
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
            kinds = {"sliding_attention"}
        if kinds != {"full_attention"} or getattr(config, "_attn_implementation", "sdpa") != "sdpa":
            raise UserError(
                f"{type(model).__name__}: CachedEngine needs full attention in every layer (found {sorted(kinds)}) and "
                f"attn_implementation=sdpa; {OTHER_ENGINE}"
            )

    def begin(self, model: Any, sampling: Sampling, stop_ids: set[int]) -> None:
        self.check(model)
        self._model, self._sampling, self._stop_ids = model, sampling, stop_ids
        self._device = model.get_output_embeddings().weight.device
        self._cache = _RowCache()
        if self._tested is not type(model):
            self._test(model)
            self._tested = type(model)
        self._rows, self._table, self._waiting = {}, [], []

    @torch.no_grad()
    def _test(self, model: Any) -> None:
        """Continue two conversations of different lengths from the cache, and compare the logits with the model's own
        forward.

        Raises:
            UserError: the logits differ, so the model uses its cache in a way that this engine does not support.
        """
        size = shape(model.get_output_embeddings().weight)[0]
        first, then = [[1 % size, 2 % size, 3 % size], [n % size for n in range(4, 11)]], [5 % size]
        self._table = [_Row(), _Row()]
        self._forward([0, 1], first)
        for row, ids in zip(self._table, first, strict=True):
            row.length = len(ids)  # pyright: ignore[reportOptionalMemberAccess]
        ours = self._forward([0, 1], [then, then]).float()
        whole = [torch.tensor([ids + then], device=self._device) for ids in first]

        def theirs() -> Tensor:
            rows = []
            for ids in whole:
                self.before_forward()
                rows.append(model(input_ids=ids, use_cache=False).logits[:, -1])
            return torch.cat(rows).float()

        expected, allowed = theirs(), 1e-2
        if low_precision(model):
            with rounded_anew(model):
                allowed = 0.05 + 4 * float((theirs() - expected).abs().max() / expected.std())
        self._cache = _RowCache()
        if not (ours - expected).abs().max() <= allowed * expected.std():
            raise UserError(
                f"{type(model).__name__}: the logits of CachedEngine differ from those of the model; {OTHER_ENGINE}"
            )

    def submit(self, request: TurnRequest) -> None:
        self._waiting.append(request)

    def release(self, key: int) -> None:
        row = self._rows.pop(key, None)
        if row is not None:
            self._table[row] = None

    def end(self) -> None:
        self._rows, self._table, self._waiting = {}, [], []
        self._model = None
        del self._cache

    def fingerprint(self, dtype: torch.dtype | None) -> str | None:
        return fingerprint(self._model, dtype)

    @torch.no_grad()
    def poll(self) -> list[SampledTurn]:
        if 2 * len(self._rows) < len(self._table):  # most conversations are finished: drop their rows
            self._compact()
        self._admit()
        open_rows = [i for i, row in enumerate(self._table) if row is not None and row.turn is not None]
        # a conversation whose turn ended soon continues with the next turn: returning several turns at once keeps the
        # batches large
        enough = max(1, len(open_rows) // 8)
        while open_rows:
            done = [i for i in open_rows if self._finished(i)]
            if len(done) >= enough or len(done) == len(open_rows):
                return [self._close(i) for i in done]
            self._decode([i for i in open_rows if i not in set(done)])
        return []

    def _finished(self, index: int) -> bool:
        row = self._table[index]
        assert row is not None
        assert row.turn is not None
        assert row.request is not None
        return row.turn.stopped or len(row.turn.ids) >= row.request.max_tokens

    def _close(self, index: int) -> SampledTurn:
        row = self._table[index]
        assert row is not None
        assert row.turn is not None
        turn, row.turn, row.request = row.turn, None, None
        return turn

    def _forward(self, rows: list[int], feeds: list[list[int]]) -> Tensor:
        """Feed ids to rows and return the logits [rows, vocab] after the last id of each."""
        states = [self._table[i] for i in rows]
        lengths = [row.length if row else 0 for row in states]
        queries = max(map(len, feeds))
        self._cache.resize(len(self._table), _round_up(max(lengths) + queries))
        start = torch.tensor(lengths, device=self._device)
        columns = start[:, None] + torch.arange(queries, device=self._device)
        ids = torch.tensor([f + [0] * (queries - len(f)) for f in feeds], device=self._device)
        view = max(n + len(f) for n, f in zip(lengths, feeds, strict=True))
        everything = len(rows) == self._cache.height and rows == list(range(len(rows)))
        view = max(view, max(lengths) + queries)
        self._cache.aim(None if everything else torch.tensor(rows, device=self._device), columns, view)
        mask = torch.arange(view, device=self._device)[None, None, None, :] <= columns[:, None, :, None]
        last = torch.tensor([len(f) - 1 for f in feeds], device=self._device)
        # padding gets the position of its row's last id: larger positions could exceed the context, and rotary
        # frequencies that depend on the length use the largest position of all rows
        places = {"attention_mask": mask, "position_ids": torch.minimum(columns, start[:, None] + last[:, None])}
        self.before_forward()
        return next_logits(self._model, last, ids, **places, past_key_values=self._cache, use_cache=True)

    def _take(self, rows: list[int], logits: Tensor) -> None:
        """Draw the next token of each row."""
        states = [self._table[i] for i in rows]
        uniforms = [s.uniforms[len(s.turn.ids)] for s in states]  # pyright: ignore
        ids, logprobs = draw(logits, torch.tensor(uniforms, device=self._device), self._sampling)
        for state, token, logprob in zip(states, ids.tolist(), logprobs.tolist(), strict=True):
            state.turn.ids.append(token)  # pyright: ignore[reportOptionalMemberAccess]
            state.turn.logprobs.append(logprob)  # pyright: ignore[reportOptionalMemberAccess]
            state.turn.stopped = token in self._stop_ids  # pyright: ignore[reportOptionalMemberAccess]

    def _decode(self, rows: list[int]) -> None:
        # all rows take part, so that no keys and values need to be gathered; an idle row writes a stale entry that its
        # next real token overwrites
        live = set(rows)
        feeds = [[row.turn.ids[-1]] if i in live else [0] for i, row in enumerate(self._table)]  # pyright: ignore
        logits = self._forward(list(range(len(feeds))), feeds)
        for i in rows:
            self._table[i].length += 1  # pyright: ignore[reportOptionalMemberAccess]
        self._take(rows, logits if len(rows) == len(feeds) else logits[rows])

    def _compact(self) -> None:
        kept = [i for i, row in enumerate(self._table) if row is not None]
        self._cache.keep(torch.tensor(kept, dtype=torch.long, device=self._device))
        self._table = [self._table[i] for i in kept]
        moved = {old: new for new, old in enumerate(kept)}
        self._rows = {key: moved[i] for key, i in self._rows.items()}

    def _admit(self) -> None:
        """Feed the ids of the waiting requests that are not in the cache yet, and draw their first tokens."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        leaders: dict[tuple[int, ...], int] = {}
        followers: dict[int, list[int]] = {}
        feeding: list[int] = []
        for request in waiting:
            index = self._rows.get(request.key)
            if index is None:
                index = self._new_row(request.key)
                prompt = tuple(request.ids)
                if prompt in leaders:
                    followers.setdefault(leaders[prompt], []).append(index)
                else:
                    leaders[prompt] = index
                    feeding.append(index)
            else:
                feeding.append(index)
            row = self._table[index]
            assert row is not None
            seed = np.random.SeedSequence(request.seed)
            row.request, row.turn = request, SampledTurn(request.key)
            row.uniforms = np.random.Generator(np.random.Philox(seed)).random(request.max_tokens)
        missing = {i: self._table[i].request.ids[self._table[i].length :] for i in feeding}  # pyright: ignore
        for rows in _by_size(missing, self.prefill_tokens):
            logits = self._forward(rows, [missing[i] for i in rows])
            for i in rows:
                self._table[i].length += len(missing[i])  # pyright: ignore[reportOptionalMemberAccess]
            copies = [(place, f) for place, i in enumerate(rows) for f in followers.get(i, [])]
            if copies:
                source = torch.tensor([rows[place] for place, _ in copies], device=self._device)
                target = torch.tensor([f for _, f in copies], device=self._device)
                for place, f in copies:
                    self._table[f].length = self._table[rows[place]].length  # pyright: ignore
                self._cache.copy_rows(source, target, max(self._table[f].length for _, f in copies))  # pyright: ignore
                logits = torch.cat([logits, logits[[place for place, _ in copies]]])
            self._take(rows + [f for _, f in copies], logits)

    def _new_row(self, key: int) -> int:
        free = next((i for i, row in enumerate(self._table) if row is None), None)
        if free is None:
            free = len(self._table)
            self._table.append(None)
        self._table[free] = _Row()
        self._rows[key] = free
        return free


def _round_up(n: int, step: int = 64) -> int:
    return -(-n // step) * step


def _by_size(feeds: dict[int, list[int]], budget: int) -> list[list[int]]:
    """Split rows into forwards of similar length with at most ``budget`` tokens, padding included."""
    batches: list[list[int]] = []
    for row in sorted(feeds, key=lambda i: (len(feeds[i]), i)):
        if batches and (len(batches[-1]) + 1) * len(feeds[row]) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [sorted(batch) for batch in batches]
