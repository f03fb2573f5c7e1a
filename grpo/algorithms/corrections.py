"""Off-policy correction: importance weights for samples of older weights, or of an engine that rounds differently.

With a correction the loss takes its ratio to the proximal policy, which is the policy at the start of the train step.
The advantages are multiplied by the proximal policy's likelihood of the sample relative to the behavior policy's:

    loss(policy, proximal, advantages x weights, mask)

All losses are linear in the size of the advantage, so this weights the policy gradient and leaves the KL term alone.
configs/correction/ has the presets of the literature. (Decoupled objective: Hilton et al., arXiv:2110.00641;
AReaL, arXiv:2505.24298, section 5.2.)
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_LOG_RATIO = 20.0  # the exp of more would overflow and turn gradients to NaN; no meaningful ratio comes near it


@torch.no_grad()
def importance_weights(
    proximal_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    mode: str,
    level: str,
    min_ratio: float = 0.0,
    max_ratio: float | None = None,
) -> Tensor:
    """Bound the `importance_ratio` to [min_ratio, max_ratio]: [B, T], without gradient, 0 in masked positions.

    With `mode` "truncate" a ratio outside is moved to the bound. With "mask" its weight is 0: the token, or the
    sequence, is not trained on.
    """
    ratio_BT = importance_ratio(proximal_logprobs_BT, behavior_logprobs_BT, mask_BT, level)
    weights_BT = ratio_BT.clamp(min_ratio, max_ratio)
    if mode == "mask":
        weights_BT = ratio_BT.masked_fill(weights_BT != ratio_BT, 0.0)
    elif mode != "truncate":
        raise ValueError(f"correction mode {mode!r} must be truncate or mask")
    return weights_BT.masked_fill(~mask_BT.bool(), 0.0)


@torch.no_grad()
def importance_ratio(proximal_logprobs_BT: Tensor, behavior_logprobs_BT: Tensor, mask_BT: Tensor, level: str) -> Tensor:
    """Compute proximal / behavior likelihood of the sampled tokens: [B, T], without gradient.

    token      of each token: biased, since the tokens before it are left out; low variance
    sequence   the product over a sequence, for all of its tokens: unbiased, its variance grows with T
    geometric  the T-th root of that product: measures how far off a sequence is at any length; as a weight it is biased
    """
    mask_BT = mask_BT.bool()
    log_ratio_BT = log_ratio(proximal_logprobs_BT, behavior_logprobs_BT, mask_BT)
    total_B1 = log_ratio_BT.sum(dim=1, keepdim=True)
    match level:
        case "token":
            pass
        case "sequence":
            log_ratio_BT = total_B1.expand(mask_BT.shape)
        case "geometric":
            log_ratio_BT = (total_B1 / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)).expand(mask_BT.shape)
        case _:
            raise ValueError(f"correction level {level!r} must be one of token, sequence, geometric")
    return clamp_for_exp(log_ratio_BT).exp()


def log_ratio(policy_logprobs_BT: Tensor, other_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log(policy / other) of every token; 0 where the boolean mask is False, even where the inputs are NaN there."""
    return (policy_logprobs_BT - other_logprobs_BT).masked_fill(~mask_BT, 0.0)


def clamp_for_exp(log_ratio_BT: Tensor) -> Tensor:
    """Clamp log-ratios so that their exp, its square and its gradient are finite."""
    return log_ratio_BT.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
