"""How the samples of a micro-batch are laid out for the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo.learner.collate import Sample


@dataclass(frozen=True)
class Inputs:
    """What the model is given, and where it predicts the N completion tokens of the samples, sample after sample.

    `arguments` are those of the forward pass, with `input_ids` of shape [R, T]. Of the rows' columns only `columns_K`
    predict anything; token n is predicted at `places_N`[n] of the flattened [R, K].
    """

    arguments: Mapping[str, Any]
    columns_K: Tensor
    places_N: Tensor
    targets_N: Tensor


@dataclass(frozen=True)
class Layout:
    """`plan` splits samples, by index, into micro-batches that cost at most so many tokens of the model's time.

    A sample that costs more makes a micro-batch of its own.
    """

    plan: Callable[[Sequence[Sample], int], list[list[int]]]
    lay_out: Callable[[Sequence[Sample], torch.device], Inputs]
