"""Drawing one token per row from logits, each row with its own parameters and its own random numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from grpo.types import SamplingParams
from grpo.utils.torch_utils import fused

_CHUNK = 128  # words


def uniforms(seed: int, sample: int, count: int) -> Tensor:
    """The random numbers in [0, 1) that decide the tokens of one completion, float32 [count].

    They depend on the seed of the group and the number of the sample within it, never on who shared the batch.
    """
    generator = np.random.default_rng([seed, sample])
    return torch.from_numpy(generator.random(count, dtype=np.float32))


class RowSampler:
    """The sampling parameters of B rows as tensors, so that one decode step draws for all of them at once."""

    def __init__(self, params: list[SamplingParams], device: torch.device) -> None:
        self._filtered = any(p.top_p < 1 or p.top_k > 0 for p in params)
        each = np.array([(p.temperature, p.top_p, p.top_k) for p in params], dtype=np.float32).reshape(-1, 3)
        temperature_B1, self._top_p_B1, self._top_k_B1 = torch.from_numpy(each).to(device).split(1, dim=1)
        self._greedy_B1 = temperature_B1 == 0
        self._temperature_B1 = temperature_B1.masked_fill(self._greedy_B1, 1.0)

    def draw(self, logits_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens [B] and their log-probabilities [B] under the distribution that they were drawn from.

        Sampling inverts the cumulative distribution at the row's uniform number. Greedy rows take the largest logit
        and report its log-probability at temperature 1.
        """
        temperature_B1 = self._temperature_B1
        if self._filtered:
            logits_BV, temperature_B1 = (
                self._filter(logits_BV.float() / temperature_B1),
                torch.ones_like(temperature_B1),
            )
        draw = _draw_at_once if logits_BV.shape[1] <= _CHUNK else _draw_by_chunks
        tokens_B1, logprobs_B1 = draw(logits_BV, temperature_B1, uniforms_B[:, None], self._greedy_B1)
        return tokens_B1[:, 0], logprobs_B1[:, 0]

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


def _draw_at_once(
    logits_BV: Tensor, temperature_B1: Tensor, uniforms_B1: Tensor, greedy_B1: Tensor
) -> tuple[Tensor, Tensor]:
    logprobs_BV = torch.log_softmax(logits_BV.float() / temperature_B1, dim=1)
    drawn_B1, *_ = _invert(logprobs_BV.exp(), uniforms_B1)
    other_B1 = greedy_B1 | (logprobs_BV.gather(1, drawn_B1) == -torch.inf)
    tokens_B1 = torch.where(other_B1, logits_BV.argmax(dim=1, keepdim=True), drawn_B1)
    return tokens_B1, logprobs_BV.gather(1, tokens_B1)


def _draw_by_chunks(
    logits_BV: Tensor, temperature_B1: Tensor, uniforms_B1: Tensor, greedy_B1: Tensor
) -> tuple[Tensor, Tensor]:
    """First which chunk of C words, then which of them: the probabilities of a large vocabulary need no memory."""
    normalizer_B1, mass_BN, best_B1 = _chunk_masses(logits_BV, temperature_B1)
    chunk_B1, target_B1, cumulative_BN = _invert(mass_BN, uniforms_B1)
    rest_B1 = target_B1 - cumulative_BN.gather(1, chunk_B1) + mass_BN.gather(1, chunk_B1)
    words_BC = chunk_B1 * _CHUNK + torch.arange(_CHUNK, device=logits_BV.device)
    there_BC = words_BC < logits_BV.shape[1]
    scaled_BC = logits_BV.gather(1, words_BC.where(there_BC, 0)).float() / temperature_B1
    logprobs_BC = (scaled_BC - normalizer_B1).where(there_BC, -torch.inf)
    p_BC = logprobs_BC.exp()
    place_B1, *_ = _invert(p_BC, rest_B1 / p_BC.sum(dim=1, keepdim=True))
    other_B1 = greedy_B1 | (logprobs_BC.gather(1, place_B1) == -torch.inf)
    tokens_B1 = torch.where(other_B1, best_B1, chunk_B1 * _CHUNK + place_B1)
    return tokens_B1, logits_BV.gather(1, tokens_B1).float() / temperature_B1 - normalizer_B1


@fused
def _chunk_masses(logits_BV: Tensor, temperature_B1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log sum exp of each row [B, 1], the probability of every chunk of its words [B, N], and its likeliest word."""
    scaled_BV = logits_BV.float() / temperature_B1
    normalizer_B1 = scaled_BV.logsumexp(dim=1, keepdim=True)
    p_BV = functional.pad((scaled_BV - normalizer_B1).exp(), (0, -logits_BV.shape[1] % _CHUNK))
    mass_BN = p_BV.view(len(p_BV), -1, _CHUNK).sum(dim=2)
    return normalizer_B1, mass_BN, logits_BV.argmax(dim=1, keepdim=True)


def _invert(p_BN: Tensor, uniforms_B1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the running sum of a distribution passes a share of its total [B, 1], that share, and the sum [B, N].

    A place of probability zero is not reached, unless by the rounding of a sum in parallel.
    """
    cumulative_BN = p_BN.cumsum(dim=1)
    # The total can miss 1 by rounding, and the product with it can round up to it.
    total_B1 = cumulative_BN[:, -1:]
    target_B1 = torch.minimum(uniforms_B1 * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulative_BN, target_B1, right=True), target_B1, cumulative_BN
