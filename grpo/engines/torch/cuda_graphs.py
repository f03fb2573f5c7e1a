"""Decode steps on a GPU as CUDA graphs, and the Triton kernel for attention over the KV grid that they capture.

Launching a model's kernels one by one takes longer than running them. So a decode step is captured once per number of
rows, rounded up, when that number is first needed. A graph reads all that changes between steps from tensors of fixed
addresses: the tokens, the columns at which rows begin, and the column to write.

The rows of the grid begin at different columns and all end at the same one, so a dense kernel would read, and mask,
every column from the first beginning on. Here each program handles one row and one of its key-value heads, together
with all query heads that share it. It iterates over the columns [start, end] with a running softmax (Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018). If these programs are too few for the GPU, the columns
are split among several programs, whose results are then combined (as in Flash-Decoding, Dao et al. 2023). The kernel
reads its bounds from tensors on the GPU, so a captured launch serves every step.

Shape suffixes: R rows of the grid, the running ones first   B running rows   D head size   V vocabulary
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grpo.engines.torch.kv_cache import CapturedLayer, KVGrid, cache_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GRID_ATTENTION = "grid_attention"  # name of the attention function
BOUNDS = "grid_bounds"  # name of its argument (start_R, end_1)
_COLUMNS = 64  # per block


class GraphedDecoding:
    """Decoding by replaying CUDA graphs. The logits are valid until the next call."""

    def __init__(self, model: PreTrainedModel, kv: KVGrid) -> None:
        self._model, self._kv = model, kv
        device = model.device
        self._tokens_R1 = torch.zeros(kv.max_rows, 1, dtype=torch.long, device=device)
        self._start_R = torch.zeros(kv.max_rows, dtype=torch.long, device=device)
        self._end_1 = torch.zeros(1, dtype=torch.long, device=device)
        self._logits_RV: Tensor | None = None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        model.set_attn_implementation(GRID_ATTENTION)

    def __call__(self, tokens_B1: Tensor, start_B: Tensor) -> Tensor:
        count = len(tokens_B1)
        rows = min(_padded_rows(count), self._kv.max_rows)
        self._end_1.fill_(self._kv.end)
        self._start_R.fill_(self._kv.end)  # a row that is not running sees only the column that it writes
        self._start_R[:count] = start_B
        self._tokens_R1[:count] = tokens_B1
        if rows not in self._graphs:
            self._graphs[rows] = self._capture(rows)
        self._graphs[rows].replay()
        assert self._logits_RV is not None
        return self._logits_RV[:count]

    def _capture(self, rows: int) -> torch.cuda.CUDAGraph:
        # Warm up on a side stream, as torch requires: kernels are compiled and make their one-time allocations.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            logits_RV = self._run(rows)
            if self._logits_RV is None:
                self._logits_RV = logits_RV.new_empty(self._kv.max_rows, logits_RV.shape[1])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._logits_RV[:rows] = self._run(rows)
        self._pool = self._pool or graph.pool()  # graphs never run side by side, and only _logits_RV outlives a run
        return graph

    def _run(self, rows: int) -> Tensor:
        start_R = self._start_R[:rows]
        layers = [CapturedLayer(layer, rows, self._end_1) for layer in self._kv.layers]
        output = self._model(
            input_ids=self._tokens_R1[:rows],
            # Given, so that transformers makes none; the attention function ignores it.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=start_R.device),
            position_ids=(self._end_1 - start_R)[:, None],
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(self._model): Cache(layers=layers), BOUNDS: (start_R, self._end_1)},
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def _padded_rows(rows: int) -> int:
    """Round up to a multiple of an eighth of the next power of two: at most an eighth of the rows is padding."""
    step = max(1, (1 << (rows - 1).bit_length()) // 8) if rows > 1 else 1
    return -(-rows // step) * step


def _grid_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend from a query [R, heads, 1, D] to the grid; returns [R, 1, heads, D]. A prefill uses plain SDPA."""
    bounds: tuple[Tensor, Tensor] | None = kwargs.pop(BOUNDS, None)
    if bounds is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return decode_attention(query[:, :, 0], key, value, *bounds, scaling)[:, None], None


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, start_R: Tensor, end_1: Tensor, scale: float
) -> Tensor:
    """Attend from a query [R, heads, D] to the grid's keys and values [>= R, KV heads, columns, D].

    Row r sees the columns [start_R[r], end_1]; both bounds are int64. Returns [R, heads, D].
    """
    rows, heads, size = query.shape
    kv_heads = keys.shape[1]
    splits = _split_count(rows * kv_heads, keys.shape[2], query.device)
    partial = torch.empty(splits, rows, heads, size, dtype=torch.float32, device=query.device)
    normalizer = torch.empty(splits, rows, heads, dtype=torch.float32, device=query.device)
    group = heads // kv_heads
    _attend[rows, kv_heads, splits](
        query.contiguous(), keys, values, start_R, end_1, partial, normalizer, scale,
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        GROUP=group, GROUP_PADDED=max(16, triton.next_power_of_2(group)),
        D=size, D_PADDED=max(16, triton.next_power_of_2(size)), COLUMNS=_COLUMNS,
    )  # fmt: skip
    if splits == 1:
        return partial[0].to(query.dtype)
    # The normalizers are logarithms: each part weighs as much as its share of the whole softmax's denominator.
    weights = torch.softmax(normalizer, dim=0)
    return (weights[..., None] * partial).sum(dim=0).to(query.dtype)


def _split_count(programs: int, columns: int, device: torch.device) -> int:
    """Return a number that gives about two programs per multiprocessor, each with at least two blocks of columns."""
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count // programs
    return max(1, min(wanted, columns // (2 * _COLUMNS), 16))


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query, keys, values, start, end, partial, normalizer, scale, key_row, key_head, value_row, value_head,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows, heads, splits = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    # The columns of this split: whole blocks, so that only the last one is masked.
    first, last = tl.load(start + row), tl.load(end)
    per_split = tl.cdiv(tl.cdiv(last + 1 - first, splits), COLUMNS) * COLUMNS
    first += split * per_split
    last = tl.minimum(last, first + per_split - 1)

    # Query heads and head sizes are padded to powers of two, with masks.
    g, d, c = tl.arange(0, GROUP_PADDED), tl.arange(0, D_PADDED), tl.arange(0, COLUMNS)
    head_index = (row * heads + head) * GROUP + g
    real, wide = g < GROUP, d < D
    used = real[:, None] & wide[None, :]
    q = tl.load(query + head_index[:, None] * D + d[None, :], mask=used, other=0.0)
    key_base, value_base = keys + row * key_row + head * key_head, values + row * value_row + head * value_head
    top = tl.full([GROUP_PADDED], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    mixed = tl.zeros([GROUP_PADDED, D_PADDED], tl.float32)
    # Running softmax over blocks of columns: `top` is the largest score so far, `total` the denominator under it.
    for begin in range(first, last + 1, COLUMNS):
        column = begin + c
        inside = column <= last
        k = tl.load(key_base + column[:, None] * D + d[None, :], mask=inside[:, None] & wide[None, :], other=0.0)
        v = tl.load(value_base + column[:, None] * D + d[None, :], mask=inside[:, None] & wide[None, :], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(inside[None, :], score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        shrink = tl.exp(top - higher)
        p = tl.exp(score - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        mixed = mixed * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = higher
    # A split without columns has weight zero: exp(-inf).
    not_empty = first <= last
    mixed = mixed / tl.where(not_empty, total, 1.0)[:, None]
    out = split * rows * heads * GROUP + head_index
    tl.store(partial + out[:, None] * D + d[None, :], mixed, mask=used)
    tl.store(normalizer + out, tl.where(not_empty, top + tl.log(total), -float("inf")), mask=real)


AttentionInterface.register(GRID_ATTENTION, _grid_attention)
AttentionMaskInterface.register(GRID_ATTENTION, sdpa_mask)
