"""All samples of a micro-batch in one row: no padding, and a prompt that several share stands there once.

    prompt A | completion A1 | completion A2 | prompt B | completion B1 | ...

A completion's positions go on from the end of its prompt, and only attention (attention.py) has to know that it comes
right after it. The last token of a completion is left out: nothing is predicted from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from grpo.learner.attention import ROWS, attention_rows
from grpo.learner.collate import Sample
from grpo.learner.layout import Inputs, Layout
from grpo.types import Ints


def _plan(samples: Sequence[Sample], max_tokens: int) -> list[list[int]]:
    """In the order given, in which those of a prompt stand together. A micro-batch costs the tokens of its row."""
    parts: list[list[int]] = []
    prompts, tokens = set[bytes](), 0
    for i, sample in enumerate(samples):
        own, prompt = len(sample.token_ids) - 1, sample.prompt_ids.tobytes()
        added = own if prompt in prompts else own + len(sample.prompt_ids)
        if not parts or tokens + added > max_tokens:
            parts.append([])
            prompts, tokens, added = set(), 0, own + len(sample.prompt_ids)
        parts[-1].append(i)
        prompts.add(prompt)
        tokens += added
    return parts


def _lay_out(samples: Sequence[Sample], device: torch.device) -> Inputs:
    tokens: list[Ints] = []
    begins: dict[bytes, int] = {}  # of the prompts
    size, sequences = 0, []
    for sample in samples:
        prompt, own = sample.prompt_ids, sample.token_ids[:-1]
        if (key := prompt.tobytes()) not in begins:
            begins[key], size = size, size + len(prompt)
            tokens.append(prompt)
        sequences.append(np.r_[begins[key] : begins[key] + len(prompt), size : size + len(own)])
        tokens.append(own)
        size += len(own)
    positions = np.empty(size, np.int64)
    for sequence in sequences:
        positions[sequence] = np.arange(len(sequence))
    predicting = [sequence[len(sample.prompt_ids) - 1 :] for sample, sequence in zip(samples, sequences, strict=True)]

    def on_device(arrays: Sequence[Ints]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(device)

    columns_N = on_device(predicting)
    return Inputs(
        arguments={
            "input_ids": on_device(tokens)[None],
            "position_ids": on_device([positions])[None],
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),  # has none made for the row
            ROWS: attention_rows(sequences, device),
        },
        columns_K=columns_N,
        places_N=torch.arange(len(columns_N), device=device),
        targets_N=on_device([sample.token_ids for sample in samples]),
    )


PACKED = Layout(_plan, _lay_out)
