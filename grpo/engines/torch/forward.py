"""The forward pass of a decode step: the newest token of every row, over the keys and values of those before it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from grpo.engines.torch.kv_cache import KVGrid, cache_argument, prefill
from grpo.models.probing import full_attention_blocker, logits_mismatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class Decoding(Protocol):
    """Made once for a model and its grid; writes the grid's next column, `kv.end`, and leaves counting it to others."""

    def __call__(self, tokens_B1: Tensor, start_B: Tensor) -> Tensor:
        """The logits [B, V] of the token that comes after `tokens_B1`, in rows that begin at columns `start_B`."""
        ...


class PlainDecoding:
    """Any Hugging Face causal LM, on any device, over the columns in use and no others."""

    def __init__(self, model: PreTrainedModel, kv: KVGrid) -> None:
        self._model, self._kv = model, kv
        self._cache_argument = cache_argument(model)

    def __call__(self, tokens_B1: Tensor, start_B: Tensor) -> Tensor:
        first, end = self._kv.first, self._kv.end
        start_B1 = start_B[:, None]
        columns_C = torch.arange(first, end + 1, device=start_B.device)
        output = self._model(
            input_ids=tokens_B1,
            attention_mask=(columns_C >= start_B1).long(),
            position_ids=end - start_B1,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: self._kv.cache()},
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV


def decoding_for(model: PreTrainedModel, kv: KVGrid, *, cuda_graphs: bool) -> Decoding:
    """CUDA graphs on a GPU, where they are wanted and come out the same. May change the model's attention function."""
    if model.device.type != "cuda" or not cuda_graphs:
        return PlainDecoding(model, kv)
    if reason := full_attention_blocker(model) or _graphs_differ(model):
        log.warning("%s is decoded without CUDA graphs: %s", type(model).__name__, reason)
        return PlainDecoding(model, kv)
    return _graphed(model, kv)


def _graphed(model: PreTrainedModel, kv: KVGrid) -> Decoding:
    from grpo.engines.torch.cuda_graphs import GraphedDecoding  # needs Triton, which comes with torch for GPUs only

    return GraphedDecoding(model, kv)


@torch.inference_mode()
def _graphs_differ(model: PreTrainedModel) -> str | None:
    """Whether two rows of different lengths get other logits from a graph. It leaves the model as it was if they do."""
    vocab, usual = model.config.get_text_config().vocab_size, model.config._attn_implementation
    kv = KVGrid(max_rows=2, max_columns=8)
    tokens = [torch.arange(length, device=model.device) % vocab for length in (5, 3)]
    kv.rows, kv.first, kv.end = 2, 0, 5
    for row, prefix in enumerate(prefill(model, tokens, version=0)):
        kv.store(prefix, slice(row, row + 1))
    newest_B1, start_B = (torch.tensor(values, device=model.device) for values in ([[1], [2]], [0, 2]))
    plain_BV = PlainDecoding(model, kv)(newest_B1, start_B)
    try:
        graphed_BV = _graphed(model, kv)(newest_B1, start_B)
    except Exception as error:  # whatever a kernel's compiler may raise; plain decoding goes on without it
        model.set_attn_implementation(usual)
        return f"recording one fails: {type(error).__name__}: {error}".partition("\n")[0]
    if reason := logits_mismatch(graphed_BV, plain_BV):
        model.set_attn_implementation(usual)
        return f"logits are {reason}"
    return None
