from __future__ import annotations

import itertools

import pytest

from grpo.algorithms.advantages import shape

MAX_TOKENS = 20
REWARDS = [-3.0, -0.5, -0.0, 0.1, 1 / 3, 0.7, 1.0, 2.5]
LENGTHS = [1, 7, 12, 13, 14, 17, 19, 20]


def shaped(rewards, lengths, **settings):
    return list(shape(rewards, lengths, MAX_TOKENS, **settings))


def slow_shape(rewards, lengths, scale, clip_low, clip_high, length_penalty, overlong_buffer, overlong_penalty):
    """One completion at a time; the soft overlong punishment by the three cases of the paper's equation 13."""
    shaped = []
    for reward, length in zip(rewards, lengths, strict=True):
        value = scale * reward
        if clip_low is not None and value < clip_low:
            value = clip_low
        if clip_high is not None and value > clip_high:
            value = clip_high
        value -= length_penalty * length / MAX_TOKENS
        start = MAX_TOKENS - overlong_buffer
        if overlong_buffer == 0 or length <= start:
            overlong = 0.0
        elif length < MAX_TOKENS:
            overlong = (start - length) / overlong_buffer
        else:
            overlong = -1.0
        shaped.append(value + overlong_penalty * overlong)
    return shaped


GRID = {
    "scale": (1.0, 0.3),
    "clip_low": (None, -0.4),
    "clip_high": (None, 0.65),
    "length_penalty": (0.0, 0.1),
    "overlong_buffer": (0, 1, 7, MAX_TOKENS),
    "overlong_penalty": (0.0, 0.9),
}


def test_agrees_with_a_slow_reference_in_double_precision():
    for values in itertools.product(*GRID.values()):
        settings = dict(zip(GRID, values, strict=True))
        for lengths in (LENGTHS, LENGTHS[::-1]):
            found, expected = shaped(REWARDS, lengths, **settings), slow_shape(REWARDS, lengths, **settings)
            assert found == pytest.approx(expected, rel=1e-14, abs=1e-14), settings


def test_by_default_rewards_stay_exactly_as_they_are():
    rewards = [*REWARDS, 1e-30, 1e30]
    assert shaped(rewards, [*LENGTHS, 3, 4]) == rewards


def test_the_overlong_penalty_is_nothing_up_to_the_zone_and_all_of_it_at_the_limit():
    found = shaped([1.0] * 5, [1, 16, 17, 19, 20], overlong_buffer=4, overlong_penalty=0.5)
    assert found == [1.0, 1.0, 0.875, 0.625, 0.5]


def test_rewards_are_scaled_then_clipped_then_made_to_pay_for_their_length():
    """In any other order 1.0 would come out otherwise: unscaled it is within the bounds, and the costs lead out."""
    settings = {"scale": 10.0, "clip_low": 0.0, "clip_high": 4.0, "length_penalty": 1.0}
    found = shaped([1.0, -1.0], [10, 20], overlong_buffer=20, overlong_penalty=2.0, **settings)
    assert found == [4.0 - 0.5 - 1.0, 0.0 - 1.0 - 2.0]


def test_equal_rewards_of_equal_lengths_stay_equal():
    found = shaped(
        [0.1, 0.1, 0.1], [7, 7, 7], scale=1 / 3, length_penalty=0.7, overlong_buffer=19, overlong_penalty=0.3
    )
    assert len(set(found)) == 1
