"""Log-probabilities and entropy straight from hidden states: the logits, N tokens by V words, never exist as a whole.

Blocks of W words are computed one after another, with a running normalizer (Milakov and Gimelshein, "Online normalizer
calculation for softmax", 2018), and once more in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
        top_N = torch.full_like(targets_N, -torch.inf, dtype=torch.float32)
        total_N, weighted_N, target_N = (torch.zeros_like(top_N) for _ in range(3))
        for block, logits_NW in words.blocks():
            column_N1, inside_N = words.targets_in(block)
            target_N += logits_NW.gather(1, column_N1)[:, 0].where(inside_N, 0.0)
            before_N, top_N = top_N, torch.maximum(top_N, logits_NW.amax(dim=1))
            shrink_N = (before_N - top_N).exp()
            p_NW = (logits_NW - top_N[:, None]).exp_()
            total_N = total_N * shrink_N + p_NW.sum(dim=1)
            weighted_N = weighted_N * shrink_N + p_NW.mul_(logits_NW).sum(dim=1)
        normalizer_N = top_N + total_N.log()
        entropy_N = normalizer_N - weighted_N / total_N
        ctx.dtype, ctx.temperature = dtype, temperature
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, normalizer_N)
        ctx.mark_non_differentiable(entropy_N)
        return target_N - normalizer_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of a logit is that of the log-probability times (1 if it is the target's) minus p."""
        hidden_ND, weight_VD, bias_V, targets_N, normalizer_N = ctx.saved_tensors
        words = _Words(hidden_ND.to(ctx.dtype), weight_VD, bias_V, targets_N, ctx.temperature)
        of_hidden, of_weight, of_bias, *_ = ctx.needs_input_grad
        hidden_grad_ND = torch.zeros_like(hidden_ND, dtype=torch.float32) if of_hidden else None
        weight_grad_VD = torch.empty_like(weight_VD) if of_weight else None
        bias_grad_V = torch.empty_like(bias_V) if of_bias else None
        scaled_N = grad_N / ctx.temperature
        for block, logits_NW in words.blocks():
            column_N1, inside_N = words.targets_in(block)
            grad_NW = logits_NW.sub_(normalizer_N[:, None]).exp_().mul_(-scaled_N[:, None])
            grad_NW.scatter_add_(1, column_N1, scaled_N.where(inside_N, 0.0)[:, None])
            if bias_grad_V is not None:
                bias_grad_V[block] = grad_NW.sum(dim=0)
            grad_NW = grad_NW.to(ctx.dtype)
            if hidden_grad_ND is not None:
                hidden_grad_ND += grad_NW @ weight_VD[block].to(ctx.dtype)
            if weight_grad_VD is not None:
                weight_grad_VD[block] = grad_NW.T @ words.hidden_ND
        hidden_grad = None if hidden_grad_ND is None else hidden_grad_ND.to(hidden_ND.dtype)
        return hidden_grad, weight_grad_VD, bias_grad_V, None, None


@dataclass(frozen=True)
class _Words:
    """The vocabulary, a block of W words after another."""

    hidden_ND: Tensor  # in the dtype of products
    weight_VD: Tensor
    bias_V: Tensor | None
    targets_N: Tensor
    temperature: float

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Which words, and float32 [N, W]: their logits over the temperature."""
        dtype, count = self.hidden_ND.dtype, len(self.weight_VD)
        logits = _BLOCK.get(self.hidden_ND.device.type, _LARGE_BLOCK)
        size = max(_WORDS, logits // len(self.hidden_ND))
        for begin in range(0, count, size):
            block = slice(begin, min(begin + size, count))
            bias_W = None if self.bias_V is None else self.bias_V[block].to(dtype)
            logits_NW = functional.linear(self.hidden_ND, self.weight_VD[block].to(dtype), bias_W)
            yield block, logits_NW.float().div_(self.temperature)

    def targets_in(self, block: slice) -> tuple[Tensor, Tensor]:
        """The target's column in the block, [N, 1], any one where it is in another, and [N] whether it is in this."""
        column_N, last = self.targets_N - block.start, block.stop - block.start - 1
        return column_N.clamp(0, last)[:, None], (column_N >= 0) & (column_N <= last)
