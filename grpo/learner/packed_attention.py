"""Attention within the sequences of a packed row, for models that use transformers' AttentionInterface.

Queries, keys and values of every sequence, its prompt included, are copied into padded rows. Attention there is plain
causal attention without a mask, for which SDPA has its fastest kernels. Sequences of similar lengths share a call, so
that there is little padding. Gradients of a shared prompt add up over its copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grpo.types import Ints

PACKED_ATTENTION = "packed_sdpa"
"""Name of the attention implementation."""
ROWS = "packed_rows"
"""Name of the model's argument that passes AttentionRows on to it."""
_MIN_FILL = 0.75  # shortest sequence of a call over the longest


@dataclass(frozen=True)
class AttentionRows:
    """Index from the N tokens of a packed row to the M places of padded rows, in blocks of similar lengths, and back.

    `shapes` has the rows and columns of each block. `tokens_M` is the token at each place (arbitrary in padding);
    `places_N` is one of the places of each token.
    """

    shapes: Sequence[tuple[int, int]]
    tokens_M: Tensor
    places_N: Tensor


def attention_rows(sequences: Sequence[Ints], device: torch.device) -> AttentionRows:
    """Build the index; `sequences` has the positions of each sequence's tokens in the packed row."""
    places = np.empty(1 + max(int(sequence[-1]) for sequence in sequences), np.int64)
    blocks: list[list[Ints]] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        if blocks and len(sequence) >= _MIN_FILL * len(blocks[-1][0]):
            blocks[-1].append(sequence)
        else:
            blocks.append([sequence])
    shapes = [(len(block), len(block[0])) for block in blocks]
    tokens = np.zeros(sum(rows * columns for rows, columns in shapes), np.int64)

    # Each sequence fills the beginning of its row; the rest of the row keeps token 0.
    begin = 0
    for block, (_, columns) in zip(blocks, shapes, strict=True):
        for sequence in block:
            tokens[begin : begin + len(sequence)] = sequence
            places[sequence] = np.arange(begin, begin + len(sequence))
            begin += columns
    return AttentionRows(shapes, torch.from_numpy(tokens).to(device), torch.from_numpy(places).to(device))


def gather_rows(values_ND: Tensor, index_M: Tensor) -> Tensor:
    """[M, D]: the rows at `index_M`. Expanding the index selects a kernel whose backward is fast on a CPU, too."""
    return values_ND.gather(0, index_M[:, None].expand(-1, values_ND.shape[1]))


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """[1, N, heads, D] from query, key and value of shape [1, heads, N, D]; plain SDPA if the row is not packed."""
    rows: AttentionRows | None = kwargs.pop(ROWS, None)
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    blocks = [_split(tensor[0].transpose(0, 1), rows) for tensor in (query, key, value)]
    kwargs["is_causal"] = True
    outputs = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in zip(*blocks, strict=True)]
    heads, width = outputs[0].shape[2:]
    output_MD = torch.cat([output.reshape(-1, heads * width) for output in outputs])
    return gather_rows(output_MD, rows.places_N).view(1, -1, heads, width), None


def _split(values_NHD: Tensor, rows: AttentionRows) -> list[Tensor]:
    """Copy into padded rows: [rows, heads, columns, D] for each block."""
    heads, width = values_NHD.shape[1:]
    copies = gather_rows(values_NHD.flatten(1), rows.tokens_M).split([r * c for r, c in rows.shapes])
    return [copy.view(*shape, heads, width).transpose(1, 2) for copy, shape in zip(copies, rows.shapes, strict=True)]


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
