"""What becomes of the rewards of a group before its advantages are taken."""

from __future__ import annotations

import math
from collections.abc import Sequence


def shape(
    rewards: Sequence[float],
    lengths: Sequence[int],
    max_tokens: int,
    *,
    scale: float = 1.0,
    clip_low: float | None = None,
    clip_high: float | None = None,
    length_penalty: float = 0.0,
    overlong_zone: float = 0.0,
    overlong_penalty: float = 0.0,
) -> tuple[float, ...]:
    """`scale` x reward, held within [clip_low, clip_high], less what the length of the answer costs.

    `lengths` are in tokens, of at most `max_tokens`. An answer costs `length_penalty` x length / max_tokens. In the
    last `overlong_zone` tokens before the limit it also costs from 0 to `overlong_penalty`, linearly, so that long
    answers learn to end before they are cut off. (Soft overlong punishment: DAPO, arXiv:2503.14476, equation 13.)
    """
    low = -math.inf if clip_low is None else clip_low
    high = math.inf if clip_high is None else clip_high
    shaped = []
    for reward, length in zip(rewards, lengths, strict=True):
        value = min(max(scale * reward, low), high) - length_penalty * length / max_tokens
        if overlong_zone:
            into_zone = min(max(length - (max_tokens - overlong_zone), 0), overlong_zone)
            value -= overlong_penalty * into_zone / overlong_zone
        shaped.append(value)
    return tuple(shaped)
