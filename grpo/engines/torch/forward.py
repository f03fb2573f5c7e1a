"""Forward pass of a decode step: the newest token of every row, over the keys and values of the tokens before it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo.engines.torch.kv_cache import KVGrid, cache_argument, prefill
from grpo.models.probing import full_attention_blocker, logits_mismatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


# Decode step: from tokens [B, 1] and the columns [B] at which rows begin to the logits [B, V] of the next tokens. It
# writes column `end` of the KV grid and leaves it to the caller to advance `end`.
Decoding = Callable[[Tensor, Tensor], Tensor]


def choose_decoding(model: PreTrainedModel, kv: KVGrid, *, cuda_graphs: bool) -> Decoding:
    """Return graphed decoding on a GPU if it is asked for and gives the same logits, else plain decoding.

    May change the attention implementation of the model.
    """
    if model.device.type != "cuda" or not cuda_graphs:
        return PlainDecoding(model, kv)
    if reason := full_attention_blocker(model) or _graphs_blocker(model):
        log.warning("%s is decoded without CUDA graphs: %s", type(model).__name__, reason)
        return PlainDecoding(model, kv)
    return _graphed_decoding(model, kv)


class PlainDecoding:
    """Decoding of any Hugging Face causal LM on any device, over the columns in use only."""

    def __init__(self, model: PreTrainedModel, kv: KVGrid) -> None:
        self._model, self._kv = model, kv

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
            **{cache_argument(self._model): self._kv.cache()},
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV


def _graphed_decoding(model: PreTrainedModel, kv: KVGrid) -> Decoding:
    from grpo.engines.torch.cuda_graphs import GraphedDecoding  # needs Triton, which only torch for GPUs brings along

    return GraphedDecoding(model, kv)


@torch.inference_mode()
def _graphs_blocker(model: PreTrainedModel) -> str | None:
    """Return why graphed decoding can't be used for this model, or None.

    Decodes two rows of different lengths both ways and compares the logits. Restores the attention implementation of
    the model if it returns a reason.
    """
    # Two prompts of 5 and 3 tokens, right-aligned at column 5.
    vocab, attention = model.config.get_text_config().vocab_size, model.config._attn_implementation
    kv = KVGrid(max_rows=2, max_columns=8)
    tokens = [torch.arange(length, device=model.device) % vocab for length in (5, 3)]
    kv.rows, kv.first, kv.end = 2, 0, 5
    for row, prefix in enumerate(prefill(model, tokens, version=0)):
        kv.store(prefix, slice(row, row + 1))
    newest_B1, start_B = (torch.tensor(values, device=model.device) for values in ([[1], [2]], [0, 2]))
    plain_BV = PlainDecoding(model, kv)(newest_B1, start_B)

    # The second decoding writes the same column again.
    try:
        graphed_BV = _graphed_decoding(model, kv)(newest_B1, start_B)
    except Exception as error:  # a kernel's compiler may raise anything; plain decoding still works
        model.set_attn_implementation(attention)
        return f"capturing one failed: {type(error).__name__}: {error}".partition("\n")[0]
    if reason := logits_mismatch(graphed_BV, plain_BV):
        model.set_attn_implementation(attention)
        return f"logits are {reason}"
    return None
