"""A transformers cache for conversations of different lengths, and the attention masks that go with it.

Row r of every layer holds conversation r. An attention layer keeps the keys and values of all tokens, also if its
window is shorter: the mask hides what is outside, so one layout serves full, sliding and chunked attention. A recurrent
layer keeps its newest state, which transformers' own `LinearAttentionLayer` computes.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from ..errors import UserError

CHUNKED = "chunked_attention"


class _Forward:
    """What the layers must know about one forward.

    Attributes:
        rows: rows that take part [rows]; None for all of them.
        rows_written: rows to which keys and values are written [rows].
        columns: columns to which they are written [rows, queries].
        view: number of columns that attention sees.
        new: whether the rows are new conversations, which have no state yet. Read only by recurrent layers.
    """

    rows: Tensor | None = None
    rows_written: Tensor
    columns: Tensor
    view: int
    new: bool

    def __init__(self) -> None:
        self._places: dict[tuple[int, int], Tensor] = {}

    def start(self, rows: Tensor | None, columns: Tensor, view: int, new: bool) -> None:
        """Prepare for a forward: see `RowCache.start`."""
        self.rows, self.columns, self.view, self.new = rows, columns, view, new
        self.rows_written = torch.arange(len(columns), device=columns.device) if rows is None else rows
        self._places.clear()

    def places(self, heads: int, width: int) -> Tensor:
        """Return the flat indices (row, head, column) to which keys and values are written [rows x heads x queries].

        Args:
            heads: number of heads.
            width: number of columns of the store.
        """
        if (heads, width) not in self._places:
            head = torch.arange(heads, device=self.columns.device)[:, None]
            first = (self.rows_written[:, None, None] * heads + head) * width
            self._places[heads, width] = (first + self.columns[:, None]).flatten()
        return self._places[heads, width]


class _Layer:
    """Tensors of one layer whose first dimension is the row; the ``wide`` ones are [rows, heads, columns, ...]."""

    wide: tuple[str, ...] = ()

    def __init__(self, forward: _Forward):
        self.forward = forward
        self.height = self.width = 0
        self.kept: dict[str, Tensor] = {}

    def resize(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        for name, old in self.kept.items():
            wide = name in self.wide
            size = [height, old.shape[1], width, *old.shape[3:]] if wide else [height, *old.shape[1:]]
            new = old.new_zeros(size)
            new[tuple(slice(n) for n in old.shape[: 3 if wide else 1])] = old
            self.kept[name] = new

    def copy_rows(self, source: Tensor, target: Tensor, width: int) -> None:
        for name, store in self.kept.items():
            part = store[:, :, :width] if name in self.wide else store
            part[target] = part[source]

    def keep(self, rows: Tensor) -> None:
        self.height = len(rows)
        for name, store in self.kept.items():  # one tensor at a time, so that memory never holds two whole caches
            self.kept[name] = store[rows]

    def start(self) -> None:
        """Prepare for a forward."""

    def finish(self) -> None:
        """Store what a forward has computed."""


class _Attention(_Layer, DynamicLayer):
    """Keys and values, stored as [rows, heads, columns, dim]: attention reads the columns of one head after another.
    Columns beyond a row's length hold stale values that the mask hides."""

    wide = ("keys", "values")

    def __init__(self, forward: _Forward):
        DynamicLayer.__init__(self)
        _Layer.__init__(self, forward)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        out, forward = [], self.forward
        for name, new in zip(self.wide, (key_states, value_states), strict=True):
            if name not in self.kept:
                self.kept[name] = new.new_zeros((self.height, new.shape[1], self.width, new.shape[3]))
            store = self.kept[name]
            store.flatten(0, 2).index_copy_(0, forward.places(new.shape[1], self.width), new.flatten(0, 2))
            seen = store[:, :, : forward.view]
            out.append(seen if forward.rows is None else seen[forward.rows])
        return out[0], out[1]


class _Recurrent(_Layer, LinearAttentionLayer):
    """States of a recurrent, convolution or linear attention layer. Only the rows that take part in a forward are in
    transformers' layer while it runs."""

    def __init__(self, forward: _Forward, number_of_states: int):
        LinearAttentionLayer.__init__(self, number_of_states)
        _Layer.__init__(self, forward)

    def _states(self) -> list[tuple[str, int, dict[int, Any], dict[int, bool]]]:
        kinds: list[tuple[str, dict[int, Any], dict[int, bool]]] = [
            ("conv", self.conv_states, self.is_conv_states_initialized),
            ("recurrent", self.recurrent_states, self.is_recurrent_states_initialized),
        ]
        return [(f"{kind} {i}", i, states, ready) for kind, states, ready in kinds for i in states]

    def start(self) -> None:
        rows = self.forward.rows
        for name, i, states, ready in self._states():
            old = not self.forward.new and name in self.kept
            states[i] = None if not old else self.kept[name] if rows is None else self.kept[name][rows]
            ready[i] = old
        for i in range(self.number_of_states):
            self.has_previous_state[i] = not self.forward.new

    def finish(self) -> None:
        rows = self.forward.rows
        for name, i, states, _ in self._states():
            state = states[i]
            if state is None:
                continue
            if name not in self.kept:
                self.kept[name] = state.new_zeros((self.height, *state.shape[1:]))
            if state is not self.kept[name]:
                self.kept[name][slice(None) if rows is None else rows] = state
            states[i] = None


class _Both(_Recurrent, _Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A layer with attention and a recurrent state side by side."""

    def __init__(self, forward: _Forward, number_of_states: int):
        DynamicLayer.__init__(self)
        _Recurrent.__init__(self, forward, number_of_states)


class RowCache(Cache):
    """Cache of all layers of a model.

    Args:
        config: of the model; its layer types decide what each layer keeps.

    Raises:
        UserError: a layer keeps something else, or the model's attention cannot use the masks.
    """

    def __init__(self, config: Any):
        text = config.get_text_config(decoder=True)
        named = getattr(text, "layer_types", None) or []
        self._now = _Forward()
        self._spans: dict[str, tuple[str, int] | None] = {}  # by layer type; None: attention sees everything before
        self._kinds = set(named)
        layers: list[Any] = []
        for i, kind in enumerate(DynamicCache(config=text).layers):
            name, number = named[i] if i < len(named) else "", getattr(kind, "number_of_states", 1)
            if type(kind) is DummyLayer:
                layers.append(kind)
            elif type(kind) is LinearAttentionLayer:
                layers.append(_Recurrent(self._now, number))
            elif type(kind) in (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer):
                layers.append(_Both(self._now, number))
            elif type(kind) in (DynamicLayer, DynamicSlidingWindowLayer):
                layers.append(_Attention(self._now))
            else:
                raise UserError(f"its layers of type {name or type(kind).__name__} keep more than keys and values")
            width = getattr(kind, "sliding_window", None)
            if isinstance(kind, DynamicLayer):
                span = None if width is None else ("chunk" if name == CHUNKED else "window", int(width))
                self._spans[name or str(span)] = span
        super().__init__(layers=layers)
        self.recurrent = any(isinstance(layer, _Recurrent) for layer in layers)
        implementation = getattr(text, "_attn_implementation", None) or "eager"
        if self._spans and implementation not in ("sdpa", "eager"):
            raise UserError(f"{implementation} takes no mask: set model.policy.attn_implementation to sdpa")
        self._eager = implementation == "eager"
        self.height = self.width = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # rows have different lengths; the engine passes positions

    def resize(self, height: int, width: int) -> None:
        """Grow the cache to at least ``height`` rows and ``width`` columns, keeping its contents."""
        if height <= self.height and width <= self.width:
            return
        self.height, self.width = max(height, self.height), max(width, self.width)
        for layer in self._own():
            layer.resize(self.height, self.width)

    def copy_rows(self, source: Tensor, target: Tensor, width: int) -> None:
        """Copy rows, with their first ``width`` columns."""
        for layer in self._own():
            layer.copy_rows(source, target, width)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.height = len(rows)
        for layer in self._own():
            layer.keep(rows)

    def _own(self) -> list[_Layer]:
        return [layer for layer in self.layers if isinstance(layer, _Layer)]

    def start(self, rows: Tensor | None, columns: Tensor, view: int, new: bool) -> None:
        """Prepare for a forward that writes to ``columns`` [rows, queries] and attends to the first ``view`` columns.

        Args:
            rows: rows that take part; None for all of them.
            columns: of the new tokens.
            view: number of columns that attention sees.
            new: whether these are new conversations; needed only if the cache is ``recurrent``.
        """
        self._now.start(rows, columns, view, new)
        for layer in self._own():
            layer.start()

    def finish(self) -> None:
        """Store what the forward has computed."""
        for layer in self._own():
            layer.finish()

    def masks(self, columns: Tensor, dtype: torch.dtype) -> Any:
        """Return the attention mask [rows, 1, queries, view] of a forward: one for all layers, or a dict with one for
        each type of layer; None if no layer has attention.

        Args:
            columns: of the queries [rows, queries].
            dtype: of masks that are added to attention scores.
        """
        query, key = columns[:, None, :, None], torch.arange(self._now.view, device=columns.device)

        def mask(span: tuple[str, int] | None) -> Tensor:
            seen = key <= query
            if span is not None:
                kind, size = span
                seen = seen & ((key // size == query // size) if kind == "chunk" else (key > query - size))
            if not self._eager:
                return seen
            return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)

        made = {span: mask(span) for span in dict.fromkeys(self._spans.values())}
        if len(made) <= 1:
            return next(iter(made.values()), None)
        return {**dict.fromkeys(self._kinds), **{name: made[span] for name, span in self._spans.items()}}
