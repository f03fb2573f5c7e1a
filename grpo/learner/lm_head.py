"""Log-probabilities and entropy from hidden states, without materializing the [N, V] logits of N tokens.

The vocabulary is processed in blocks of W tokens with a running normalizer (Milakov and Gimelshein, "Online normalizer
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

from grpo.utils.torch_utils import fused

_CPU_BLOCK = 1 << 20  # logits per block: 4 MB stay in the cache between two operations
_GPU_BLOCK = 1 << 26  # 256 MB keep a GPU busy
_MIN_VOCAB_BLOCK = 256  # fewer columns make a slow matrix product
_ALIGNMENT = 128  # a GPU's matrix products take twice the time unless W is a multiple


def linear_logprobs(hidden_ND: Tensor, head: nn.Linear, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """float32 [N]: log-probabilities of the targets, and the entropy of each distribution in nats, without gradient.

    The distributions are the softmax of `head(hidden_ND) / temperature`. Matrix products run in the autocast dtype, the
    rest in float32. A frozen head gets no gradient.
    """
    result: tuple[Tensor, Tensor] = _LinearLogprobs.apply(hidden_ND, head.weight, head.bias, targets_N, temperature)
    return result


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        vocab = _VocabBlocks(hidden_ND.to(dtype), weight_VD, bias_V, targets_N)
        top_N = torch.full_like(targets_N, -torch.inf, dtype=torch.float32)
        sums = top_N, *(torch.zeros_like(top_N) for _ in range(3))
        for block, logits_NW in vocab.blocks():
            sums = _add_block(logits_NW, temperature, *vocab.targets_in(block), *sums)
        top_N, total_N, weighted_N, target_N = sums
        normalizer_N = top_N + total_N.log()
        entropy_N = normalizer_N - weighted_N / total_N
        ctx.dtype, ctx.temperature = dtype, temperature
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, normalizer_N)
        ctx.mark_non_differentiable(entropy_N)
        return target_N - normalizer_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of a logit is the log-probability's gradient times ((1 if it is the target) - p)."""
        hidden_ND, weight_VD, bias_V, targets_N, normalizer_N = ctx.saved_tensors
        vocab = _VocabBlocks(hidden_ND.to(ctx.dtype), weight_VD, bias_V, targets_N)
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        hidden_grad_ND = torch.zeros_like(hidden_ND, dtype=torch.float32) if needs_hidden else None
        weight_grad_VD = torch.empty_like(weight_VD) if needs_weight else None
        bias_grad_V = torch.empty_like(bias_V) if needs_bias else None
        scaled_N = grad_N / ctx.temperature
        for block, logits_NW in vocab.blocks():
            grad_NW = _block_gradient(logits_NW, ctx.temperature, *vocab.targets_in(block), normalizer_N, scaled_N)
            if bias_grad_V is not None:
                bias_grad_V[block] = grad_NW.sum(dim=0, dtype=torch.float32)
            if hidden_grad_ND is not None:
                hidden_grad_ND += grad_NW @ weight_VD[block].to(ctx.dtype)
            if weight_grad_VD is not None:
                weight_grad_VD[block] = grad_NW.T @ vocab.hidden_ND
        hidden_grad = None if hidden_grad_ND is None else hidden_grad_ND.to(hidden_ND.dtype)
        return hidden_grad, weight_grad_VD, bias_grad_V, None, None


@fused
def _add_block(
    logits_NW: Tensor,
    temperature: float,
    column_N1: Tensor,
    inside_N: Tensor,
    top_N: Tensor,
    total_N: Tensor,
    weighted_N: Tensor,
    target_N: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Update the running largest logit, sum of p = exp(logit - largest), sum of p x logit, and the target's logit."""
    scaled_NW = logits_NW.float().div_(temperature)
    target_N = target_N + scaled_NW.gather(1, column_N1)[:, 0].where(inside_N, 0.0)
    higher_N = torch.maximum(top_N, scaled_NW.amax(dim=1))
    shrink_N = (top_N - higher_N).exp()
    p_NW = (scaled_NW - higher_N[:, None]).exp_()
    total_N = total_N * shrink_N + p_NW.sum(dim=1)
    weighted_N = weighted_N * shrink_N + p_NW.mul_(scaled_NW).sum(dim=1)
    return higher_N, total_N, weighted_N, target_N


@fused
def _block_gradient(
    logits_NW: Tensor,
    temperature: float,
    column_N1: Tensor,
    inside_N: Tensor,
    normalizer_N: Tensor,
    scaled_N: Tensor,
) -> Tensor:
    """[N, W], in the dtype of the logits: ((1 if the column is the target) - p) times the gradient in `scaled_N`."""
    p_NW = logits_NW.float().div_(temperature).sub_(normalizer_N[:, None]).exp_()
    p_N1 = p_NW.gather(1, column_N1)
    at_column_N1 = scaled_N[:, None] * (inside_N[:, None].float() - p_N1)
    grad_NW = p_NW.mul_(-scaled_N[:, None]).to(logits_NW.dtype)
    return grad_NW.scatter_(1, column_N1, at_column_N1.to(logits_NW.dtype))


@dataclass(frozen=True)
class _VocabBlocks:
    """Iterate over the logits in blocks of W columns of the vocabulary."""

    hidden_ND: Tensor  # in the dtype of matrix products
    weight_VD: Tensor
    bias_V: Tensor | None
    targets_N: Tensor

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the columns of a block and their logits [N, W], in the dtype of matrix products."""
        dtype, count = self.hidden_ND.dtype, len(self.weight_VD)
        logits = _CPU_BLOCK if self.hidden_ND.device.type == "cpu" else _GPU_BLOCK
        size = max(_MIN_VOCAB_BLOCK, logits // len(self.hidden_ND) // _ALIGNMENT * _ALIGNMENT)
        for begin in range(0, count, size):
            block = slice(begin, min(begin + size, count))
            bias_W = None if self.bias_V is None else self.bias_V[block].to(dtype)
            yield block, functional.linear(self.hidden_ND, self.weight_VD[block].to(dtype), bias_W)

    def targets_in(self, block: slice) -> tuple[Tensor, Tensor]:
        """Return the target's column in the block, [N, 1], arbitrary if it is outside, and [N] whether it is inside."""
        column_N, last = self.targets_N - block.start, block.stop - block.start - 1
        return column_N.clamp(0, last)[:, None], (column_N >= 0) & (column_N <= last)
