"""Policy losses: pure functions of log-probabilities. Add one: write the function, put it into LOSSES.

All tensors are [B, T] over B sequences of T padded tokens: `policy_logprobs_BT` carries the gradient,
`behavior_logprobs_BT` was recorded when the token was sampled, `advantages_BT` repeats the completion's advantage,
`mask_BT` is 1 where a token is trained on. What stands in masked places has no influence, NaN included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossOutput:
    """`loss` is a scalar to call backward on. `metrics` are sums over unmasked tokens, so that micro-batches add up."""

    loss: Tensor
    metrics: dict[str, Tensor]


def grpo(
    policy_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    reference_logprobs_BT: Tensor | None = None,
    denominator: float | Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
) -> LossOutput:
    """Clipped policy gradient on the token ratio r = exp(policy - behavior), with an optional KL to the reference.

        loss = sum over tokens of -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta k3, divided by `denominator`

    `denominator` is the number of unmasked tokens of the whole batch; left out, it is that of the tensors at hand.
    k3 = exp(reference - policy) - (reference - policy) - 1 is never negative. An empty mask gives exactly 0.
    (DeepSeekMath, arXiv:2402.03300, equations 3 and 4; token mean after DAPO, arXiv:2503.14476, section 3.3.)
    """
    mask_BT = mask_BT.bool()
    log_ratio_BT = (policy_logprobs_BT - behavior_logprobs_BT).masked_fill(~mask_BT, 0.0)
    advantages_BT = advantages_BT.masked_fill(~mask_BT, 0.0)
    ratio_BT = log_ratio_BT.exp()
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    token_loss_BT = -torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    metrics = {
        "ratio": _sum(ratio_BT, mask_BT),
        "clip_fraction": _sum((clipped_BT * advantages_BT < ratio_BT * advantages_BT).float(), mask_BT),
        "behavior_k3": _sum(ratio_BT - 1 - log_ratio_BT, mask_BT),
        "behavior_abs": _sum(log_ratio_BT.abs(), mask_BT),
    }
    if reference_logprobs_BT is not None:
        k3_BT = k3((policy_logprobs_BT - reference_logprobs_BT).masked_fill(~mask_BT, 0.0))
        token_loss_BT = token_loss_BT + beta * k3_BT
        metrics["reference_k3"] = _sum(k3_BT, mask_BT)
    if denominator is None:
        denominator = mask_BT.sum().clamp(min=1)
    return LossOutput((token_loss_BT * mask_BT).sum() / denominator, metrics)


def k3(log_ratio_BT: Tensor) -> Tensor:
    """Schulman's low-variance estimate of KL(policy || reference) per token, from log(policy / reference)."""
    return torch.exp(-log_ratio_BT) - 1 + log_ratio_BT


def _sum(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return (values_BT.detach() * mask_BT).sum()


LOSSES: dict[str, Callable[..., LossOutput]] = {"grpo": grpo}
