"""How much likelier one policy makes a token than another, as a log-ratio [B, T] whose exp can be worked with."""

# MERGED: Off-policy correction: importance weights for samples of older weights, or of an engine that rounds
# differently.
#
# With a correction the loss takes its ratio to the proximal policy, that at the start of the train step, and the
# advantages are multiplied by how much likelier it makes the sample than the behavior policy that drew it:
#
#     loss(policy, proximal, advantages x weights, mask)
#
# All losses are linear in the size of the advantage, so this weights the policy gradient, and leaves the KL
# term alone.
# configs/correction/ has the presets of the literature. (Decoupled objective: Hilton et al., arXiv:2110.00641;
# AReaL, arXiv:2505.24298, section 5.2.)
#

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 20.0  # exp of more would overflow, and make NaN of a gradient; no ratio that means anything comes near it


def log_ratio(policy_logprobs_BT: Tensor, other_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log(policy / other) of every token, 0 where the boolean mask is False, whatever stands there."""
    return (policy_logprobs_BT - other_logprobs_BT).masked_fill(~mask_BT, 0.0)


def bounded(log_ratio_BT: Tensor) -> Tensor:
    """The same, as far from 0 as exp can be taken of it."""
    return log_ratio_BT.clamp(-_LARGEST, _LARGEST)


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
    """The `importance_ratio` held within [min_ratio, max_ratio]: [B, T], without gradient, 0 in masked places.

    What lies outside is moved to the bound with `mode` "truncate"; with "mask" it gets weight 0: the token, or the
    sequence, is not trained on.
    """
    ratio_BT = importance_ratio(proximal_logprobs_BT, behavior_logprobs_BT, mask_BT, level)
    held_BT = ratio_BT.clamp(min_ratio, max_ratio)
    if mode == "mask":
        held_BT = ratio_BT.masked_fill(held_BT != ratio_BT, 0.0)
    elif mode != "truncate":
        raise ValueError(f"{mode!r} is not one of truncate, mask")
    return held_BT.masked_fill(~mask_BT.bool(), 0.0)


@torch.no_grad()
def importance_ratio(proximal_logprobs_BT: Tensor, behavior_logprobs_BT: Tensor, mask_BT: Tensor, level: str) -> Tensor:
    """How much likelier the proximal policy makes what the behavior policy drew: [B, T], without gradient.

    token      of each token: biased, since what came before it is left out; low variance
    sequence   the product over a sequence, for all of its tokens: unbiased, its variance grows with T
    geometric  the T-th root of that product: how far a sequence is off whatever its length; as a weight it is biased
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
            raise ValueError(f"{level!r} is not one of token, sequence, geometric")
    return bounded(log_ratio_BT).exp()
