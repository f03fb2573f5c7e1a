"""A row for every sample, padded on the right: what any causal LM understands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from grpo.learner.collate import Sample
from grpo.learner.layout import Inputs, Layout


def _plan(samples: Sequence[Sample], max_tokens: int) -> list[list[int]]:
    """Like lengths together. A micro-batch costs its padded tokens."""
    parts: list[list[int]] = []
    for i in sorted(range(len(samples)), key=lambda i: -len(samples[i])):
        if parts and len(samples[parts[-1][0]]) * (len(parts[-1]) + 1) <= max_tokens:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def _lay_out(samples: Sequence[Sample], device: torch.device) -> Inputs:
    """Masks come from lengths, never from token ids: the pad token may be the eos token that is trained on."""
    rows = [torch.from_numpy(np.concatenate([sample.prompt_ids, sample.token_ids])) for sample in samples]
    tokens_BT = pad_sequence(rows, batch_first=True)
    lengths_B1 = torch.tensor([[len(sample)] for sample in samples])
    prompt_lengths_B1 = torch.tensor([[len(sample.prompt_ids)] for sample in samples])
    positions_T = torch.arange(tokens_BT.shape[1])
    columns_K = positions_T[int(prompt_lengths_B1.min()) - 1 : -1]
    predicts_BK = (columns_K >= prompt_lengths_B1 - 1) & (columns_K < lengths_B1 - 1)
    return Inputs(
        arguments={
            "input_ids": tokens_BT.to(device),
            "attention_mask": (positions_T < lengths_B1).long().to(device),
        },
        columns_K=columns_K.to(device),
        places_N=predicts_BK.flatten().nonzero()[:, 0].to(device),
        targets_N=tokens_BT[:, columns_K + 1][predicts_BK].to(device),
    )


PADDED = Layout(_plan, _lay_out)
