"""From the rewards of a group to its advantages: shaping of the rewards first, then one of ADVANTAGES.

An advantage function maps the rewards of the G completions of one prompt to G advantages. A group whose rewards are all
equal, including a group of one, has zero variance and gets exactly zero. To add one, write the function and add it to
ADVANTAGES, or name it `my_module:my_function`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from grpo.errors import DataError

_EPSILON = 1e-4


def shape(
    rewards: Sequence[float],
    lengths: Sequence[int],
    max_tokens: int,
    *,
    scale: float = 1.0,
    clip_low: float | None = None,
    clip_high: float | None = None,
    length_penalty: float = 0.0,
    overlong_buffer: float = 0.0,
    overlong_penalty: float = 0.0,
) -> tuple[float, ...]:
    """Scale and clip rewards, and subtract the length penalties: clip(scale x reward, clip_low, clip_high) - penalties.

    `lengths` are in tokens, of at most `max_tokens`. An answer costs `length_penalty` x length / max_tokens. In the
    last `overlong_buffer` tokens before the limit it also costs 0 to `overlong_penalty`, linearly, so that the model
    learns to end long answers before they are cut off. (Soft overlong punishment: DAPO, arXiv:2503.14476, equation 13.)
    """
    low = -math.inf if clip_low is None else clip_low
    high = math.inf if clip_high is None else clip_high
    shaped = []
    for reward, length in zip(rewards, lengths, strict=True):
        value = min(max(scale * reward, low), high) - length_penalty * length / max_tokens
        if overlong_buffer:
            into_zone = min(max(length - (max_tokens - overlong_buffer), 0), overlong_buffer)
            value -= overlong_penalty * into_zone / overlong_buffer
        shaped.append(value)
    return tuple(shaped)


def group_norm(rewards_G: Tensor, *, epsilon: float = _EPSILON) -> Tensor:
    """Normalize rewards within the group: (r - mean) / (std + epsilon), with the unbiased std.

    (DeepSeekMath, arXiv:2402.03300, section 4.1.2: outcome supervision.)
    """
    centered_G = mean_only(rewards_G)
    if not centered_G.any():
        return centered_G
    return centered_G / (rewards_G.std(unbiased=True) + epsilon)


def mean_only(rewards_G: Tensor) -> Tensor:
    """Subtract the group's mean reward: r - mean, in units of the reward.

    Without the division by the std, hard and easy prompts weigh alike. (Dr. GRPO, arXiv:2503.20783, section 3.1.)
    """
    if (rewards_G == rewards_G[0]).all():
        return rewards_G.new_zeros(rewards_G.shape)  # exactly zero; the mean is rounded
    return rewards_G - rewards_G.mean()


def leave_one_out(rewards_G: Tensor) -> Tensor:
    """Subtract from each reward the mean of the other rewards: an unbiased baseline, independent of the answer itself.

    Equals G / (G - 1) times `mean_only`. (RLOO, arXiv:2402.14740.)
    """
    return mean_only(rewards_G) * len(rewards_G) / max(1, len(rewards_G) - 1)


def max_rl(rewards_G: Tensor) -> Tensor:
    """Divide by the group's mean reward: (r - mean) / mean. Needs rewards >= 0.

    With rewards of 0 and 1 it follows the log-likelihood of a right answer instead of its probability, up to pass@G:
    the rarer a prompt is solved, the more it weighs. Raises DataError for a negative reward. (MaxRL, arXiv:2602.02710.)
    """
    if (rewards_G < 0).any():
        raise DataError(
            f"loss.advantages=max_rl needs rewards >= 0, but a completion got {float(rewards_G.min()):g}; "
            "set another loss.advantages, or shaping.clip_low=0"
        )
    centered_G = mean_only(rewards_G)
    return centered_G / rewards_G.mean() if centered_G.any() else centered_G


def global_norm(rewards_G: Tensor) -> Tensor:
    """Subtract the group's mean reward, to be divided by the std over the whole batch.

    Returns r - mean; the learner multiplies by `batch_scale` once the batch is complete. Unlike `group_norm` it does
    not blow up the small differences of nearly solved prompts.
    (REINFORCE++ with the group's mean as baseline, arXiv:2501.03262.)
    """
    return mean_only(rewards_G)


def batch_scale(advantages_N: Tensor) -> float:
    """Return the factor for the advantages of `global_norm`: 1 / (std + 1e-4) over the N completions of a batch."""
    return 1 / (float(advantages_N.std(unbiased=True)) + _EPSILON) if len(advantages_N) > 1 else 0.0


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "group_norm": group_norm,
    "mean_only": mean_only,
    "leave_one_out": leave_one_out,
    "max_rl": max_rl,
    "global_norm": global_norm,
}
BATCH_SCALED = frozenset({"global_norm"})
"""Advantages that the learner multiplies by `batch_scale`."""
