"""Drawing one token per row from logits, each row with its own parameters and its own random numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from grpo.fused import fused
from grpo.types import SamplingParams


def uniforms(seed: int, sample: int, count: int) -> Tensor:
    """The random numbers in [0, 1) that decide the tokens of one completion, float32 [count].

    They depend on the seed of the group and the number of the sample within it, never on who shared the batch.
    """
    generator = np.random.default_rng([seed, sample])
    return torch.from_numpy(generator.random(count, dtype=np.float32))


class RowSampler:
    """The sampling parameters of B rows as tensors, so that one decode step draws for all of them at once."""

    def __init__(self, params: list[SamplingParams], device: torch.device) -> None:
        temperature = torch.tensor([p.temperature for p in params])
        self._greedy_B1 = (temperature == 0)[:, None].to(device)
        self._temperature_B1 = torch.where(temperature == 0, 1.0, temperature)[:, None].to(device)
        self._filtered = any(p.top_p < 1 or p.top_k > 0 for p in params)
        self._top_p_B1 = torch.tensor([p.top_p for p in params], device=device)[:, None]
        self._top_k_B1 = torch.tensor([p.top_k for p in params], device=device)[:, None]

    def draw(self, logits_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens [B] and their log-probabilities [B] under the distribution that they were drawn from.

        Sampling inverts the cumulative distribution at the row's uniform number. Greedy rows take the largest logit
        and report its log-probability at temperature 1.
        """
        scaled_BV = logits_BV.float() / self._temperature_B1
        if self._filtered:
            scaled_BV = self._filter(scaled_BV)
        return _draw(scaled_BV, logits_BV, uniforms_B, self._greedy_B1)

    def _filter(self, logits_BV: Tensor) -> Tensor:
        """Keep the top-k tokens, and of those the smallest set whose probability reaches top-p."""
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        rank_V = torch.arange(logits_BV.shape[-1], device=logits_BV.device)
        outside_BV = (self._top_k_B1 > 0) & (rank_V >= self._top_k_B1)
        probabilities_BV = torch.softmax(sorted_BV.masked_fill(outside_BV, -torch.inf), dim=-1)
        before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
        outside_BV |= (self._top_p_B1 < 1) & (before_BV >= self._top_p_B1)
        outside_BV[:, 0] = False
        return logits_BV.masked_fill(outside_BV.scatter(1, order_BV, outside_BV), -torch.inf)


@fused
def _draw(scaled_BV: Tensor, logits_BV: Tensor, uniforms_B: Tensor, greedy_B1: Tensor) -> tuple[Tensor, Tensor]:
    logprobs_BV = torch.log_softmax(scaled_BV, dim=-1)
    cumulative_BV = logprobs_BV.exp().cumsum(dim=-1)
    # The total can miss 1 by rounding. Staying strictly below it keeps zero-probability tokens unreachable.
    total_B1 = cumulative_BV[:, -1:]
    targets_B1 = torch.minimum(uniforms_B[:, None] * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    drawn_B1 = torch.searchsorted(cumulative_BV, targets_B1, right=True)
    # A parallel sum on a GPU may rise by rounding at a token of probability zero: take the likeliest instead.
    best_B1 = logits_BV.argmax(dim=-1, keepdim=True)
    impossible_B1 = logprobs_BV.gather(1, drawn_B1) == -torch.inf
    tokens_B1 = torch.where(greedy_B1 | impossible_B1, best_B1, drawn_B1)
    return tokens_B1[:, 0], logprobs_BV.gather(1, tokens_B1)[:, 0]
