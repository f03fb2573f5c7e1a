"""Off-policy correction: importance weights for samples of older weights, or of an engine that rounds differently.

With a correction the loss takes its ratio to the proximal policy, that at the start of the train step, and the
advantages are multiplied by how much likelier it makes the sample than the behavior policy that drew it:

    loss(policy, proximal, advantages x weights, mask)

All losses are linear in the size of the advantage, so this weights the policy gradient, and leaves the KL term alone.
configs/correction/ has the presets of the literature. (Decoupled objective: Hilton et al., arXiv:2110.00641;
AReaL, arXiv:2505.24298, section 5.2.)
"""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHTS = ("none", "truncate", "mask")
LEVELS = ("token", "sequence", "geometric")
_LARGEST_LOG_RATIO = 20.0  # exp of more would overflow where it is multiplied


@torch.no_grad()
def importance_weights(
    proximal_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    weights: str,
    level: str,
    low: float = 0.0,
    high: float | None = None,
) -> Tensor:
    """The ratio w = proximal / behavior, held within [low, high]: [B, T], without gradient, 0 in masked places.

    level      token      of each token: biased, since what came before it is left out; low variance
               sequence   the product over a sequence, for all of its tokens: unbiased, its variance grows with T
               geometric  the T-th root of that product: a measure of how far the sequence is off, not a weight
    weights    truncate   what lies outside is moved to the bound
               mask       what lies outside gets weight 0: the tokens (or the sequence) are not trained on
    """
    mask_BT = mask_BT.bool()
    log_ratio_BT = (proximal_logprobs_BT - behavior_logprobs_BT).masked_fill(~mask_BT, 0.0)
    if level != "token":
        total_B1 = log_ratio_BT.sum(dim=1, keepdim=True)
        lengths_B1 = mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio_BT = (total_B1 if level == "sequence" else total_B1 / lengths_B1).expand(mask_BT.shape)
    ratio_BT = log_ratio_BT.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()
    held_BT = ratio_BT.clamp(low, high)
    if weights == "mask":
        held_BT = ratio_BT.masked_fill(held_BT != ratio_BT, 0.0)
    return held_BT.masked_fill(~mask_BT, 0.0)
