"""An engine that caches the keys, values and states of each conversation and feeds only new tokens."""

import inspect
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..distributed.sharding import fingerprint, shape
from ..errors import UserError
from ..logits import decoder
from .engine import GenerationEngine, SampledTurn, Sampling, TurnRequest, draw, next_logits
from .perturbation import low_precision, rounded_anew

if TYPE_CHECKING:
    from .row_cache import RowCache

CACHES = ("past_key_values", "cache_params")  # names of the decoder's argument for its cache
OTHER_ENGINE = "set generation.engine to gear_lightning.generation.GenerateEngine"


@dataclass
class _Row:
    length: int = 0  # columns in the cache
    request: TurnRequest | None = None
    turn: SampledTurn | None = None
    uniforms: np.ndarray = field(default_factory=lambda: np.empty(0))


class CachedEngine(GenerationEngine):
    """Samples with the policy itself, on this process's device.

    Keeps each conversation's keys, values and recurrent states across turns, and computes a prompt that a group shares
    once. All open turns advance together, one token per step; a finished turn does not wait for all others.

    Args:
        prefill_tokens: maximum number of tokens (rows x longest) in one prefill forward.
    """

    def __init__(self, prefill_tokens: int = 16384):
        if prefill_tokens < 1:
            raise UserError(f"prefill_tokens={prefill_tokens}: must be at least 1")
        self.prefill_tokens = prefill_tokens
        self._model: Any = None
        self._tested: type | None = None
        self._one_by_one = False  # whether a recurrent state is continued by one token at a time
        self._rows: dict[int, int] = {}
        self._table: list[_Row | None] = []
        self._waiting: list[TurnRequest] = []

    def check(self, model: Any) -> None:
        self._new_cache(model)

    def _new_cache(self, model: Any) -> "RowCache":
        from .row_cache import RowCache  # imports transformers

        taken = inspect.signature(decoder(model).forward).parameters
        self._takes = {name for name in ("attention_mask", "position_ids", *CACHES) if name in taken}
        try:
            if not self._takes & {*CACHES}:
                raise UserError("its decoder takes no cache")
            return RowCache(model.config)
        except UserError as error:
            raise UserError(f"{type(model).__name__} cannot use CachedEngine ({error}); {OTHER_ENGINE}") from None

    def begin(self, model: Any, sampling: Sampling, stop_ids: set[int]) -> None:
        self._model, self._sampling, self._stop_ids = model, sampling, stop_ids
        self._device = model.get_output_embeddings().weight.device
        self._cache = self._new_cache(model)
        if self._tested is not type(model):
            self._test(model)
            self._tested = type(model)
        self._rows, self._table, self._waiting = {}, [], []

    @torch.no_grad()
    def _test(self, model: Any) -> None:
        """Continue two conversations of different lengths from the cache, by several tokens and by one, and compare the
        logits with those of the model's own forward. A model whose states take only single tokens is fed one by one.

        Raises:
            UserError: the logits differ, or the model fails, so it uses its cache in a way that this engine does not
                support.
        """
        size = shape(model.get_output_embeddings().weight)[0]
        numbers = ([1, 2], [4, 5, 6, 7, 8]), ([5, 8], [9, 3]), ([6], [2])  # 8 tokens: some models have few positions
        turns = [[[n % size for n in ids] for ids in turn] for turn in numbers]
        whole = [torch.tensor([[*chain(*row)]], device=self._device) for row in zip(*turns, strict=True)]

        def theirs() -> Tensor:  # after the last token of each turn
            rows = []
            for ids in whole:
                self.before_forward()
                rows.append(model(input_ids=ids, use_cache=False).logits[0, [-4, -2, -1]])
            return torch.stack(rows, 1).float()

        expected, allowed = theirs(), 1e-2
        if low_precision(model):
            with rounded_anew(model):
                allowed = 0.05 + 4 * float((theirs() - expected).abs().max() / expected.std())
        for one_by_one in (False, True) if self._cache.recurrent else (False,):
            self._one_by_one = one_by_one
            ours = torch.stack(self._cached(model, turns))
            if (ours - expected[..., : ours.shape[-1]]).abs().max() <= allowed * expected.std():
                return
        raise UserError(
            f"{type(model).__name__}: the logits of CachedEngine differ from those of the model; {OTHER_ENGINE}"
        )

    def _cached(self, model: Any, turns: list[list[list[int]]]) -> list[Tensor]:
        """Return the logits [rows, vocab] after each turn of new conversations; leave an empty cache."""
        self._table, logits = list[_Row | None](_Row() for _ in turns[0]), []
        try:
            for feeds in turns:
                logits.append(self._forward(list(range(len(feeds))), feeds).float())
                for row, ids in zip(self._table, feeds, strict=True):
                    row.length += len(ids)  # pyright: ignore[reportOptionalMemberAccess]
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise UserError(f"{type(model).__name__} cannot use CachedEngine ({what}); {OTHER_ENGINE}") from error
        self._cache = self._new_cache(model)
        return logits

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
            if len(done) >= enough or len(done) == len(open_rows) or self.interrupted():
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
        if not self._cache.recurrent:
            return self._feed(rows, feeds)
        # a recurrent state must not include padding: rows with equally many ids share a forward
        groups: dict[tuple[int, bool], list[int]] = {}
        for place, (i, ids) in enumerate(zip(rows, feeds, strict=True)):
            groups.setdefault((len(ids), self._length(i) == 0), []).append(place)
        parts = []
        for (_, new), group in groups.items():
            mine, ids = [rows[p] for p in group], [feeds[p] for p in group]
            if new or not self._one_by_one:
                parts.append(self._feed(mine, ids))
            else:
                steps = enumerate(zip(*ids, strict=True))
                parts.append([self._feed(mine, [[i] for i in step], done) for done, step in steps][-1])
        order = torch.tensor([p for group in groups.values() for p in group], device=self._device)
        return torch.cat(parts)[order.argsort()]

    def _length(self, index: int) -> int:
        row = self._table[index]
        return 0 if row is None else row.length

    def _feed(self, rows: list[int], feeds: list[list[int]], further: int = 0) -> Tensor:
        """As `_forward`, in one forward of the model, ``further`` tokens behind what the rows' lengths say. In a
        recurrent model each row gets equally many ids, and all conversations are new or none is."""
        lengths = [self._length(i) + further for i in rows]
        queries = max(map(len, feeds))
        self._cache.resize(len(self._table), _round_up(max(lengths) + queries))
        start = torch.tensor(lengths, device=self._device)
        columns = start[:, None] + torch.arange(queries, device=self._device)
        ids = torch.tensor([f + [0] * (queries - len(f)) for f in feeds], device=self._device)
        everything = len(rows) == self._cache.height and rows == list(range(len(rows)))
        chosen = None if everything else torch.tensor(rows, device=self._device)
        self._cache.start(chosen, columns, max(lengths) + queries, new=max(lengths) == 0)
        last = torch.tensor([len(f) - 1 for f in feeds], device=self._device)
        # padding gets the position of its row's last id: larger positions could exceed the context, and rotary
        # frequencies that depend on the length use the largest position of all rows
        mask = self._cache.masks(columns, self._model.get_input_embeddings().weight.dtype)
        offered = {
            "attention_mask": mask,
            "position_ids": torch.minimum(columns, start[:, None] + last[:, None]),
            **dict.fromkeys(CACHES, self._cache),
        }
        taken = {name: value for name, value in offered.items() if name in self._takes and value is not None}
        self.before_forward()
        logits = next_logits(self._model, last, ids, **taken, use_cache=True)
        self._cache.finish()
        return logits

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
        # next real token overwrites. A recurrent state would not be restored
        fed, live = rows if self._cache.recurrent else list(range(len(self._table))), set(rows)
        logits = self._forward(fed, [[self._table[i].turn.ids[-1]] if i in live else [0] for i in fed])  # pyright: ignore
        for i in rows:
            self._table[i].length += 1  # pyright: ignore[reportOptionalMemberAccess]
        self._take(rows, logits if len(rows) == len(fed) else logits[rows])

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
