"""KV cache of the torch engine: one row per sequence, one column per token, columns shared by all rows.

Every running sequence ends at the same column. The sequences begin at different columns, according to their lengths:

    column      0 1 2 3 4 5 6 7 8
    row 0           [ p p p c c c      p prompt, c completion; all rows decode into column 8 next
    row 1         [ p p p p p c c
    row 2             [ p p p p c

This is left padding. Any Hugging Face causal LM understands it through a two-dimensional attention mask, sliding
windows included. A prefill computes a prompt, or the rest of one whose first tokens were kept; its keys and values are
then copied into rows. A decode step writes one column. The last row moves into the slot of a finished one. When the
columns run out, the used ones move back to the left edge. They move right for a prompt that is longer than they reach.

Shape suffixes: B sequences of one prefill   T tokens   S new tokens   V vocabulary
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFILL_TOKENS = 8192  # in one forward pass: bounds its memory

States = Sequence[Tensor]
"""Keys and values of the first L tokens of a sequence: each layer's keys, then its values, [L, heads, head size]."""


class KVGrid:
    """Keys and values of every layer. Rows [0, rows) are running; their tokens fill columns [first, end)."""

    def __init__(self, max_rows: int, max_columns: int) -> None:
        self.max_rows, self.max_columns = max_rows, max_columns
        self.rows = self.first = self.end = 0
        self.layers: list[Layer] = []

    def cache(self) -> Cache:
        """Return the running rows as a Hugging Face cache that accepts exactly one more column."""
        return Cache(layers=self.layers)

    def store(self, prefix: Prefix, rows: slice) -> None:
        """Copy a freshly computed prefix into `rows`, so that it ends before column `end`."""
        if not self.layers:
            self.layers = [Layer(self, self._empty(x.keys), self._empty(x.values)) for x in prefix.cache.layers]
        columns = slice(self.end - prefix.length, self.end)
        for layer, computed in zip(self.layers, prefix.cache.layers, strict=True):
            layer.keys[rows, :, columns] = computed.keys[prefix.source, :, -prefix.length :]
            layer.values[rows, :, columns] = computed.values[prefix.source, :, -prefix.length :]

    def copy(self, row: int, start: int) -> States:
        """Return copies of the columns [start, end) of a row."""
        columns = [buffer[row, :, start : self.end].transpose(0, 1) for buffer in self._buffers()]
        return [states.clone(memory_format=torch.contiguous_format) for states in columns]

    @property
    def column_bytes(self) -> int:
        """Size of one column of one row, over all layers."""
        return sum(buffer[0, :, 0].numel() * buffer.element_size() for buffer in self._buffers())

    def move_rows(self, sources: Tensor, targets: Tensor) -> None:
        for buffer in self._buffers():
            used = buffer[:, :, self.first : self.end]
            # Takes half the time of used[targets] = used[sources].
            used.index_copy_(0, targets, used.index_select(0, sources))

    def shift_left(self, columns: int) -> None:
        """Move the used columns; a negative number moves them right."""
        for buffer in self._buffers():
            kept = buffer[: self.rows, :, self.first : self.end].clone()  # source and target overlap
            buffer[: self.rows, :, self.first - columns : self.end - columns] = kept
        self.end -= columns

    def _buffers(self) -> list[Tensor]:
        return [buffer for layer in self.layers for buffer in (layer.keys, layer.values)]

    def _empty(self, like: Tensor) -> Tensor:
        _, heads, _, size = like.shape
        # Zeros, because a masked column still enters the attention as 0 * value, and 0 * NaN is NaN.
        return torch.zeros(self.max_rows, heads, self.max_columns, size, dtype=like.dtype, device=like.device)


class Layer(CacheLayerMixin):
    """Keys and values of one attention layer, [rows, heads, columns, head size]."""

    is_sliding = False

    def __init__(self, grid: KVGrid, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._grid = grid
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("the grid allocates its layers itself")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows, first, end = self._grid.rows, self._grid.first, self._grid.end
        self.keys[:rows, :, end : end + 1] = key_states
        self.values[:rows, :, end : end + 1] = value_states
        return self.keys[:rows, :, first : end + 1], self.values[:rows, :, first : end + 1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._grid.end - self._grid.first

    def get_max_length(self) -> int:
        return -1


class CapturedLayer(Layer):
    """First `rows` of a layer, for a decode step captured in a CUDA graph.

    The column to write is read from the tensor `end_1`, so that one graph serves every step. `update` returns all
    columns: the attention function has to know the bounds of each row.
    """

    def __init__(self, layer: Layer, rows: int, end_1: Tensor) -> None:
        super().__init__(layer._grid, layer.keys[:rows], layer.values[:rows])
        self._end_1 = end_1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self._end_1, key_states)
        self.values.index_copy_(2, self._end_1, value_states)
        return self.keys, self.values


@dataclass(frozen=True)
class Prefix:
    """Computed prompt: the last `length` columns of sequence `source` in a cache, and the logits [V] after them."""

    cache: DynamicCache
    source: int
    length: int
    logits_V: Tensor
    version: int


def prefill(
    model: PreTrainedModel, sequences: Sequence[Tensor], version: int, kept: Sequence[States] = ()
) -> Iterator[Prefix]:
    """Yield a prefix for each sequence of token ids, in order; `kept` are states of the first tokens of each sequence.

    Sequences are computed in chunks, each with a separate cache. Copy a prefix before you ask for the next one, so that
    only one chunk is in memory.
    """
    chunk_size = max(1, _PREFILL_TOKENS // max(map(len, sequences), default=1))
    for i in range(0, len(sequences), chunk_size):
        chunk = slice(i, i + chunk_size)
        cache, logits_BV = _compute(model, sequences[chunk], kept[chunk])
        for source, sequence in enumerate(sequences[chunk]):
            yield Prefix(cache, source, len(sequence), logits_BV[source], version)


def _compute(
    model: PreTrainedModel, sequences: Sequence[Tensor], kept: Sequence[States]
) -> tuple[DynamicCache, Tensor]:
    """Compute sequences together, over kept states of their first tokens if there are any.

    Returns a cache in which the sequences are padded on the left, and the logits [B, V] after their last tokens.
    """
    # All have the same number S of new tokens, so that there are no holes between old and new ones: a sequence with
    # fewer has the last ones of its kept tokens computed again, after an update by the new weights.
    known = [len(states[0]) for states in kept] or [0] * len(sequences)
    new = max(len(sequence) - count for sequence, count in zip(sequences, known, strict=True))
    cache = DynamicCache()
    if kept:
        _fill(cache, kept, [max(0, len(sequence) - new) for sequence in sequences])
    tokens_BS = pad_sequence([sequence[-new:] for sequence in sequences], batch_first=True, padding_side="left")
    lengths_B = torch.tensor([len(sequence) for sequence in sequences], device=tokens_BS.device)
    width = cache.get_seq_length() + new
    positions_BT = torch.arange(width, device=tokens_BS.device) - (width - lengths_B)[:, None]
    output = model(
        input_ids=tokens_BS,
        attention_mask=(positions_BT >= 0).long(),
        position_ids=positions_BT[:, -new:].clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
        **{cache_argument(model): cache},
    )
    return cache, output.logits[:, -1]


def _fill(cache: DynamicCache, kept: Sequence[States], counts: Sequence[int]) -> None:
    """Put the first `counts` tokens of kept states into an empty cache, padded on the left to the largest count."""
    if not any(counts):
        return
    padded = [
        pad_sequence(
            [states[:count] for states, count in zip(buffer, counts, strict=True)],
            batch_first=True,
            padding_side="left",
        ).transpose(1, 2)
        for buffer in zip(*kept, strict=True)
    ]
    for layer, (keys, values) in enumerate(zip(padded[::2], padded[1::2], strict=True)):
        cache.update(keys, values, layer)


def cache_argument(model: nn.Module) -> str:
    """Return the name of the argument that takes the keys and values: `cache` from transformers 5.24 on."""
    return _cache_argument(type(model).forward)


@functools.cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
