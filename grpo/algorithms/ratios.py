"""How much likelier one policy makes a token than another, as a log-ratio [B, T] whose exp can be worked with."""

from __future__ import annotations

from torch import Tensor

_LARGEST = 20.0  # exp of more would overflow, and make NaN of a gradient; no ratio that means anything comes near it


def log_ratio(policy_logprobs_BT: Tensor, other_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log(policy / other) of every token, 0 where the boolean mask is False, whatever stands there."""
    return (policy_logprobs_BT - other_logprobs_BT).masked_fill(~mask_BT, 0.0)


def bounded(log_ratio_BT: Tensor) -> Tensor:
    """The same, as far from 0 as exp can be taken of it."""
    return log_ratio_BT.clamp(-_LARGEST, _LARGEST)
