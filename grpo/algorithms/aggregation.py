"""Aggregation of per-token losses to one number. B sequences, T padded tokens, N completions of a whole batch.

The divisor belongs to the batch, not to the current micro-batch. `batch_denominator` computes it once, so that the
gradient does not depend on how the batch is split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "fixed_horizon"]


def aggregate(
    values_BT: Tensor,
    mask_BT: Tensor,
    aggregation: str = "token_mean",
    *,
    denominator: float | Tensor | None = None,
    horizon: int | None = None,
) -> Tensor:
    """Reduce per-token values to a scalar; an empty mask gives exactly 0.

        token_mean      the sum over unmasked tokens / their number: long answers weigh more (DAPO, arXiv:2503.14476)
        sequence_mean   the mean over each sequence's tokens, summed / the number of sequences: every answer weighs the
                        same, and a token of a long one less (DeepSeekMath, arXiv:2402.03300, equation 3)
        fixed_horizon   the sum over unmasked tokens / (B x `horizon`): a token weighs the same in every answer and
                        every batch (Dr. GRPO, arXiv:2503.20783); `horizon` defaults to T, which differs by batch

    `denominator` replaces what stands behind the slash. A sequence must not be split over two calls.
    """
    mask_BT = mask_BT.bool()
    if denominator is None:
        denominator = batch_denominator(mask_BT.sum(dim=1).tolist(), aggregation, horizon or mask_BT.shape[1])
    values_BT = values_BT.masked_fill(~mask_BT, 0.0)
    if aggregation == "sequence_mean":
        values_BT = values_BT / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return values_BT.sum() / denominator


def batch_denominator(lengths_N: Sequence[float], aggregation: str, horizon: int | None = None) -> float:
    """Return the divisor of a batch's loss, at least 1, from the number of trained tokens of each completion."""
    match aggregation:
        case "token_mean":
            denominator = sum(lengths_N)
        case "sequence_mean":
            denominator = sum(length > 0 for length in lengths_N)
        case "fixed_horizon":
            denominator = len(lengths_N) * (horizon or max(lengths_N, default=0))
        case _:
            raise ValueError(f"aggregation {aggregation!r} must be one of {', '.join(get_args(Aggregation))}")
    return max(1.0, float(denominator))
