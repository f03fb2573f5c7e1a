"""What becomes of the rewards of a group before its advantages are taken."""

from __future__ import annotations

from torch import Tensor


def shape(
    rewards_G: Tensor,
    lengths_G: Tensor,
    max_tokens: int,
    *,
    scale: float = 1.0,
    clip_low: float | None = None,
    clip_high: float | None = None,
    length_penalty: float = 0.0,
    overlong_zone: float = 0.0,
    overlong_penalty: float = 0.0,
) -> Tensor:
    """`scale` x reward, held within [clip_low, clip_high], less what the length of the answer costs.

    `lengths_G` are in tokens, of at most `max_tokens`. An answer costs `length_penalty` x length / max_tokens. In the
    last `overlong_zone` tokens before the limit it also costs from 0 to `overlong_penalty`, linearly, so that long
    answers learn to end before they are cut off. (Soft overlong punishment: DAPO, arXiv:2503.14476, equation 13.)
    """
    lengths_G = lengths_G.to(rewards_G.dtype)  # integers would be divided in single precision
    shaped_G = scale * rewards_G
    if clip_low is not None or clip_high is not None:
        shaped_G = shaped_G.clamp(clip_low, clip_high)
    shaped_G = shaped_G - length_penalty * lengths_G / max_tokens
    if overlong_zone:
        into_zone_G = (lengths_G - (max_tokens - overlong_zone)).clamp(0, overlong_zone)
        shaped_G = shaped_G - overlong_penalty * into_zone_G / overlong_zone
    return shaped_G
