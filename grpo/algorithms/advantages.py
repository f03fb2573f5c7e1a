"""From the rewards of a group to advantages. Add one: write the function, put it into ADVANTAGES."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

_EPSILON = 1e-4


def group_norm(rewards_G: Tensor) -> Tensor:
    """Rewards relative to the group, in units of its spread: (r - mean) / (std + 1e-4), std unbiased.

    Exactly zero for a group whose rewards are all equal, and for a group of one. (DeepSeekMath, arXiv:2402.03300,
    section 4.1.2: outcome supervision.)
    """
    centered_G = mean_only(rewards_G)
    if not centered_G.any():
        return centered_G
    return centered_G / (rewards_G.std(unbiased=True) + _EPSILON)


def mean_only(rewards_G: Tensor) -> Tensor:
    """Rewards relative to the mean of the group, r - mean, in units of the reward.

    Without the division hard and easy prompts weigh alike. (Dr. GRPO, arXiv:2503.20783, section 3.1.)
    """
    if (rewards_G == rewards_G[0]).all():
        return rewards_G.new_zeros(rewards_G.shape)  # exactly, where rounding of the mean would leave a trace
    return rewards_G - rewards_G.mean()


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {"group_norm": group_norm, "mean_only": mean_only}
