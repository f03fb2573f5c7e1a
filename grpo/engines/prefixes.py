"""Prefixes read in one go: the keys and values of many tokens, from which decoding starts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache

if TYPE_CHECKING:  # the module behind it takes a second to import
    from transformers import PreTrainedModel

_PREFILL_TOKENS = 8192  # computed in one forward pass: bounds its memory


@dataclass(frozen=True)
class Prefix:
    """The last `length` columns of sequence `source` in a cache, and the logits [V] of the token that comes next."""

    cache: DynamicCache
    source: int
    length: int
    logits_V: Tensor
    version: int


def read_prefixes(model: PreTrainedModel, sequences: Sequence[Tensor], version: int) -> Iterator[Prefix]:
    """A prefix for each sequence of token ids, in order; some at a time, so take what you need of each at once."""
    chunk = max(1, _PREFILL_TOKENS // max(map(len, sequences), default=1))
    for i in range(0, len(sequences), chunk):
        part = sequences[i : i + chunk]
        tokens_BT = pad_sequence(list(part), batch_first=True, padding_side="left")
        lengths_B = torch.tensor([len(sequence) for sequence in part], device=tokens_BT.device)
        width = tokens_BT.shape[1]
        positions_BT = torch.arange(width, device=tokens_BT.device) - (width - lengths_B)[:, None]
        cache = DynamicCache()
        logits_BV = model(
            input_ids=tokens_BT,
            attention_mask=(positions_BT >= 0).long(),
            position_ids=positions_BT.clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(model): cache},
        ).logits[:, -1]
        for source, sequence in enumerate(part):
            yield Prefix(cache, source, len(sequence), logits_BV[source], version)


def cache_argument(model: nn.Module) -> str:
    """The name under which the model takes its keys and values: `cache` from transformers 5.24 on."""
    return _cache_argument(type(model).forward)


@functools.cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
