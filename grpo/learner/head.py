"""Log-probabilities and entropy straight from hidden states: the logits, N tokens by V words, never exist as a whole.

Blocks of W words are computed one after another, with a running normalizer (Milakov and Gimelshein, "Online normalizer
calculation for softmax", 2018), and once more in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_BLOCK = {"cpu": 1 << 20}  # logits of a block: 4 MB stay in the cache between two operations ...
_LARGE_BLOCK = 1 << 26  # ... and 256 MB keep a GPU busy
_WORDS = 256  # of a block, at least: fewer make a poor matrix product


def linear_logprobs(hidden_ND: Tensor, head: nn.Linear, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """float32 [N]: log-probabilities of the targets, and the entropy in nats, without gradient, of each distribution.

    The distributions are the softmax of `head(hidden_ND) / temperature`. Products are computed in the autocast dtype,
    the rest in float32. A frozen head gets no gradient.
    """
    found: tuple[Tensor, Tensor] = _LinearLogprobs.apply(hidden_ND, head.weight, head.bias, targets_N, temperature)
    return found


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        words = _Words(hidden_ND.to(dtype), weight_VD, bias_V, targets_N, temperature)
        top_N = hidden_ND.new_full(targets_N.shape, -torch.inf, dtype=torch.float32)
        total_N, weighted_N, target_N = (torch.zeros_like(top_N) for _ in range(3))
        for block, logits_NW in words:
            target_N += words.at_target(block, logits_NW)
            before_N, top_N = top_N, torch.maximum(top_N, logits_NW.amax(dim=1))
            shrink_N = (before_N - top_N).exp()
            p_NW = (logits_NW - top_N[:, None]).exp_()
            total_N = total_N * shrink_N + p_NW.sum(dim=1)
            weighted_N = weighted_N * shrink_N + p_NW.mul_(logits_NW).sum(dim=1)
        normalizer_N = top_N + total_N.log()
        entropy_N = normalizer_N - weighted_N / total_N
        ctx.words_of, ctx.input_dtype = (dtype, temperature), hidden_ND.dtype
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, normalizer_N)
        ctx.mark_non_differentiable(entropy_N)
        return target_N - normalizer_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of a logit is that of the log-probability times (1 if it is the target's) minus p."""
        hidden_ND, weight_VD, bias_V, targets_N, normalizer_N = ctx.saved_tensors
        dtype, temperature = ctx.words_of
        words = _Words(hidden_ND.to(dtype), weight_VD, bias_V, targets_N, temperature)
        for_hidden, for_weight, for_bias, *_ = ctx.needs_input_grad
        hidden_grad_ND = torch.zeros_like(hidden_ND, dtype=torch.float32) if for_hidden else None
        weight_grad_VD = torch.empty_like(weight_VD) if for_weight else None
        bias_grad_V = torch.empty_like(bias_V) if for_bias else None
        scaled_N = grad_N / temperature
        for block, logits_NW in words:
            grad_NW = logits_NW.sub_(normalizer_N[:, None]).exp_().mul_(-scaled_N[:, None])
            words.add_at_target(block, grad_NW, scaled_N)
            if bias_grad_V is not None:
                bias_grad_V[block] = grad_NW.sum(dim=0)
            grad_NW = grad_NW.to(dtype)
            if hidden_grad_ND is not None:
                hidden_grad_ND += grad_NW @ weight_VD[block].to(dtype)
            if weight_grad_VD is not None:
                weight_grad_VD[block] = grad_NW.T @ words.hidden_ND
        hidden_grad = None if hidden_grad_ND is None else hidden_grad_ND.to(hidden_ND.dtype)
        return hidden_grad, weight_grad_VD, bias_grad_V, None, None


class _Words:
    """Iterates over the vocabulary: (slice of words, float32 [N, W] their logits over the temperature)."""

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, temperature: float
    ) -> None:
        self.hidden_ND = hidden_ND
        self._weight_VD, self._bias_V, self._targets_N = weight_VD, bias_V, targets_N
        self._temperature = temperature

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        dtype = self.hidden_ND.dtype
        logits = _BLOCK.get(self.hidden_ND.device.type, _LARGE_BLOCK)
        size = max(_WORDS, logits // max(1, len(self.hidden_ND)))
        for begin in range(0, len(self._weight_VD), size):
            block = slice(begin, begin + size)
            bias_W = None if self._bias_V is None else self._bias_V[block].to(dtype)
            logits_NW = functional.linear(self.hidden_ND, self._weight_VD[block].to(dtype), bias_W)
            yield block, logits_NW.float().div_(self._temperature)

    def at_target(self, block: slice, values_NW: Tensor) -> Tensor:
        """[N]: the value of each target, 0 for those of other blocks."""
        column_N1, inside_N = self._columns(block, values_NW)
        return values_NW.gather(1, column_N1)[:, 0].where(inside_N, 0.0)

    def add_at_target(self, block: slice, values_NW: Tensor, added_N: Tensor) -> None:
        column_N1, inside_N = self._columns(block, values_NW)
        values_NW.scatter_add_(1, column_N1, added_N.where(inside_N, 0.0)[:, None])

    def _columns(self, block: slice, values_NW: Tensor) -> tuple[Tensor, Tensor]:
        column_N, last = self._targets_N - block.start, values_NW.shape[1] - 1
        return column_N.clamp(0, last)[:, None], (column_N >= 0) & (column_N <= last)
