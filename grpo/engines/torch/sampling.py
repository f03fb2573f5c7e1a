"""Sampling of one token per row from logits, each row with its own parameters and its own random numbers.

Shape suffixes: B rows   V vocabulary   N chunks of the vocabulary   C tokens of one chunk
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from grpo.types import SamplingParams
from grpo.utils.torch_utils import fused

_CHUNK = 128  # tokens of the vocabulary


def uniforms(seed: int, sample: int, count: int, first: int = 0) -> Tensor:
    """Return the random numbers in [0, 1) that decide the tokens of one completion, float32 [count].

    They depend only on the seed of the group and the number of the sample within it, never on the rest of the batch.
    The turns of an episode share one stream of numbers: `first` were used before.
    """
    generator = np.random.default_rng([seed, sample])
    return torch.from_numpy(generator.random(first + count, dtype=np.float32)[first:])


class RowSampler:
    """Sampling parameters of B rows as tensors, so that one decode step draws for all of them at once."""

    def __init__(self, params: list[SamplingParams], device: torch.device) -> None:
        self._filtered = any(p.top_p < 1 or p.top_k > 0 for p in params)
        params_B3 = np.array([(p.temperature, p.top_p, p.top_k) for p in params], dtype=np.float32).reshape(-1, 3)
        temperature_B1, self._top_p_B1, self._top_k_B1 = torch.from_numpy(params_B3).to(device).split(1, dim=1)
        self._greedy_B1 = temperature_B1 == 0
        self._temperature_B1 = temperature_B1.masked_fill(self._greedy_B1, 1.0)

    def draw(self, logits_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens [B] and their log-probabilities [B] under the distribution that they were drawn from.

        Sampling inverts the cumulative distribution at the row's uniform number. Greedy rows get the token with the
        largest logit and its log-probability at temperature 1.
        """
        temperature_B1 = self._temperature_B1
        if self._filtered:
            logits_BV = self._filter(logits_BV.float() / temperature_B1)
            temperature_B1 = torch.ones_like(temperature_B1)
        draw = _draw_at_once if logits_BV.shape[1] <= _CHUNK else _draw_by_chunks
        tokens_B1, logprobs_B1 = draw(logits_BV, temperature_B1, uniforms_B[:, None], self._greedy_B1)
        return tokens_B1[:, 0], logprobs_B1[:, 0]

    def _filter(self, logits_BV: Tensor) -> Tensor:
        """Keep the top-k tokens, and among these the smallest set whose probability reaches top-p."""
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        rank_V = torch.arange(logits_BV.shape[-1], device=logits_BV.device)
        removed_BV = (self._top_k_B1 > 0) & (rank_V >= self._top_k_B1)
        probabilities_BV = torch.softmax(sorted_BV.masked_fill(removed_BV, -torch.inf), dim=-1)
        before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
        removed_BV |= (self._top_p_B1 < 1) & (before_BV >= self._top_p_B1)
        removed_BV[:, 0] = False
        return logits_BV.masked_fill(removed_BV.scatter(1, order_BV, removed_BV), -torch.inf)


def _draw_at_once(
    logits_BV: Tensor, temperature_B1: Tensor, uniforms_B1: Tensor, greedy_B1: Tensor
) -> tuple[Tensor, Tensor]:
    logprobs_BV = torch.log_softmax(logits_BV.float() / temperature_B1, dim=1)
    drawn_B1, *_ = _inverse_cdf(logprobs_BV.exp(), uniforms_B1)
    use_best_B1 = greedy_B1 | (logprobs_BV.gather(1, drawn_B1) == -torch.inf)
    tokens_B1 = torch.where(use_best_B1, logits_BV.argmax(dim=1, keepdim=True), drawn_B1)
    return tokens_B1, logprobs_BV.gather(1, tokens_B1)


def _draw_by_chunks(
    logits_BV: Tensor, temperature_B1: Tensor, uniforms_B1: Tensor, greedy_B1: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw a chunk of C tokens, then one of its tokens: this needs no memory for the probabilities of all V."""
    normalizer_B1, mass_BN, best_B1 = _chunk_masses(logits_BV, temperature_B1)
    chunk_B1, target_B1, cumulative_BN = _inverse_cdf(mass_BN, uniforms_B1)
    # Probability mass that is left to pass within the chunk.
    rest_B1 = target_B1 - cumulative_BN.gather(1, chunk_B1) + mass_BN.gather(1, chunk_B1)

    # The last chunk may reach beyond the vocabulary.
    candidates_BC = chunk_B1 * _CHUNK + torch.arange(_CHUNK, device=logits_BV.device)
    in_vocab_BC = candidates_BC < logits_BV.shape[1]
    scaled_BC = logits_BV.gather(1, candidates_BC.where(in_vocab_BC, 0)).float() / temperature_B1
    logprobs_BC = (scaled_BC - normalizer_B1).where(in_vocab_BC, -torch.inf)
    p_BC = logprobs_BC.exp()
    offset_B1, *_ = _inverse_cdf(p_BC, rest_B1 / p_BC.sum(dim=1, keepdim=True))

    use_best_B1 = greedy_B1 | (logprobs_BC.gather(1, offset_B1) == -torch.inf)
    tokens_B1 = torch.where(use_best_B1, best_B1, chunk_B1 * _CHUNK + offset_B1)
    return tokens_B1, logits_BV.gather(1, tokens_B1).float() / temperature_B1 - normalizer_B1


@fused
def _chunk_masses(logits_BV: Tensor, temperature_B1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's log sum exp [B, 1], the probability of each of its chunks [B, N], and its likeliest token."""
    scaled_BV = logits_BV.float() / temperature_B1
    normalizer_B1 = scaled_BV.logsumexp(dim=1, keepdim=True)
    p_BV = functional.pad((scaled_BV - normalizer_B1).exp(), (0, -logits_BV.shape[1] % _CHUNK))
    mass_BN = p_BV.view(len(p_BV), -1, _CHUNK).sum(dim=2)
    return normalizer_B1, mass_BN, logits_BV.argmax(dim=1, keepdim=True)


def _inverse_cdf(p_BN: Tensor, uniforms_B1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the index [B, 1] at which the running sum of a distribution exceeds a fraction of its total.

    Returns the index, the sum to exceed [B, 1], and the running sum [B, N]. An index of probability zero is only
    returned after a rounding error of a parallel sum.
    """
    cumulative_BN = p_BN.cumsum(dim=1)
    # The total can miss 1 by rounding, and the product with it can round up to it.
    total_B1 = cumulative_BN[:, -1:]
    target_B1 = torch.minimum(uniforms_B1 * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulative_BN, target_B1, right=True), target_B1, cumulative_BN
