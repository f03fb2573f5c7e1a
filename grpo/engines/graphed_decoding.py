"""Decode steps on a GPU as recorded CUDA graphs: launching a model's kernels one by one takes longer than they run.

A graph is recorded for a number of rows, rounded up, when that is first needed. It reads what changes from step to
step, which tokens, where rows begin and which column is written, from tensors of fixed addresses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grpo.engines.kv_grid import KVGrid, RecordedLayer
from grpo.engines.prefixes import cache_argument

if TYPE_CHECKING:  # the module behind it takes a second to import
    from transformers import PreTrainedModel

GRID_ATTENTION, BOUNDS = "grid_attention", "grid_bounds"  # its name, and that of the argument with start_R and end_1


class GraphedDecoding:
    """Calls like PlainDecoding; the logits are good until the next call."""

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
        rows = min(_rounded_up(count), self._kv.max_rows)
        self._end_1.fill_(self._kv.end)
        self._start_R.fill_(self._kv.end)  # rows that are not running see what they write, and nothing else
        self._start_R[:count] = start_B
        self._tokens_R1[:count] = tokens_B1
        if rows not in self._graphs:
            self._graphs[rows] = self._record(rows)
        self._graphs[rows].replay()
        assert self._logits_RV is not None
        return self._logits_RV[:count]

    def _record(self, rows: int) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            logits_RV = self._run(rows)  # compiles and allocates what kernels need once
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
        layers = [RecordedLayer(layer, rows, self._end_1) for layer in self._kv.layers]
        output = self._model(
            input_ids=self._tokens_R1[:rows],
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=start_R.device),  # has none made
            position_ids=(self._end_1 - start_R)[:, None],
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(self._model): Cache(layers=layers), BOUNDS: (start_R, self._end_1)},
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def _rounded_up(rows: int) -> int:
    """To a multiple of an eighth of the next power of two: at most an eighth is computed for nothing."""
    step = max(1, (1 << (rows - 1).bit_length()) // 8) if rows > 1 else 1
    return -(-rows // step) * step


def _grid_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """[R, 1, heads, D] from a query [R, heads, 1, D] and the grid; plain SDPA where prompts are read."""
    bounds: tuple[Tensor, Tensor] | None = kwargs.pop(BOUNDS, None)
    if bounds is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    from grpo.engines.triton_attention import decode_attention  # Triton comes with torch for GPUs only

    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return decode_attention(query[:, :, 0], key, value, *bounds, scaling)[:, None], None


AttentionInterface.register(GRID_ATTENTION, _grid_attention)
AttentionMaskInterface.register(GRID_ATTENTION, sdpa_mask)
