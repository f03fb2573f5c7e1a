from __future__ import annotations

import itertools
import math

import pytest
import torch

from grpo.algorithms.advantages import (
    ADVANTAGES,
    BATCH_SCALED,
    batch_scale,
    global_norm,
    group_norm,
    leave_one_out,
    max_rl,
    mean_only,
    shape,
)
from grpo.errors import DataError


def slow_mean_only(rewards):
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def slow_std(values):
    centered = slow_mean_only(values)
    return math.sqrt(math.fsum(x * x for x in centered) / (len(values) - 1))


def slow_group_norm(rewards):
    std = slow_std(rewards)
    return [x / (std + 1e-4) for x in slow_mean_only(rewards)]


def slow_leave_one_out(rewards):
    advantages = []
    for i, reward in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        advantages.append(reward - math.fsum(others) / len(others))
    return advantages


def slow_max_rl(rewards):
    mean = math.fsum(rewards) / len(rewards)
    return [(reward - mean) / mean for reward in rewards]


SLOW = {
    "group_norm": slow_group_norm,
    "mean_only": slow_mean_only,
    "leave_one_out": slow_leave_one_out,
    "max_rl": slow_max_rl,
    "global_norm": slow_mean_only,
}


def random_rewards(seed, dtype=torch.float64):
    """None is negative: one of the functions refuses those."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2 + seed, generator=generator, dtype=dtype) * 10.0 ** (seed - 2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ADVANTAGES)
def test_agree_with_a_slow_reference(name, seed):
    rewards_G = random_rewards(seed)
    expected_G = torch.tensor(SLOW[name](rewards_G.tolist()), dtype=torch.float64)
    torch.testing.assert_close(ADVANTAGES[name](rewards_G), expected_G, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", sorted(set(ADVANTAGES) - {"max_rl"}))
def test_negative_rewards_agree_with_a_slow_reference(name, seed):
    rewards_G = random_rewards(seed) - 10.0 ** (seed - 2) / 2
    expected_G = torch.tensor(SLOW[name](rewards_G.tolist()), dtype=torch.float64)
    torch.testing.assert_close(ADVANTAGES[name](rewards_G), expected_G, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("seed", range(5))
def test_float32_is_enough_and_advantages_sum_to_zero(name, seed):
    rewards_G = random_rewards(seed, torch.float32)
    advantages_G = ADVANTAGES[name](rewards_G)
    assert advantages_G.dtype == torch.float32
    torch.testing.assert_close(advantages_G, ADVANTAGES[name](rewards_G.double()).float(), rtol=1e-4, atol=1e-5)
    assert abs(float(advantages_G.double().mean())) <= 1e-6 * float(advantages_G.abs().max())


@pytest.mark.parametrize("name", ADVANTAGES)
def test_better_answers_have_greater_advantages(name):
    advantages = ADVANTAGES[name](torch.tensor([0.0, 0.1, 0.5, 0.5, 2.0])).tolist()
    assert advantages == sorted(advantages)
    assert advantages[0] < 0 < advantages[-1]
    assert advantages[2] == advantages[3]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_the_order_of_the_answers_does_not_matter(name):
    rewards_G = random_rewards(4)
    expected_G = ADVANTAGES[name](rewards_G).flip(0)
    torch.testing.assert_close(ADVANTAGES[name](rewards_G.flip(0)), expected_G, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("group_norm", [1.5 / (1 + 2e-4), *[-0.5 / (1 + 2e-4)] * 3]),
        ("mean_only", [0.75, -0.25, -0.25, -0.25]),
        ("leave_one_out", [1.0, -1 / 3, -1 / 3, -1 / 3]),
        ("max_rl", [3.0, -1.0, -1.0, -1.0]),
        ("global_norm", [0.75, -0.25, -0.25, -0.25]),
    ],
)
def test_four_answers_one_right(name, expected):
    assert ADVANTAGES[name](torch.tensor([1.0, 0.0, 0.0, 0.0])).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7, 1 / 3, -2.7, 1e6 + 0.1, 1e-30])
def test_equal_rewards_give_exactly_zero(name, reward):
    if name == "max_rl":
        reward = abs(reward)
    for size in range(1, 20):
        advantages_G = ADVANTAGES[name](torch.full((size,), reward))
        assert advantages_G.tolist() == [0.0] * size


def test_the_mean_of_equal_rewards_does_round():
    """Otherwise the test above would pass without the special case in the code."""
    rounded = [torch.full((size,), 0.1).mean() != torch.tensor(0.1) for size in range(1, 20)]
    assert any(rounded)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_group_of_one_is_zero(name):
    assert ADVANTAGES[name](torch.tensor([3.0])).tolist() == [0.0]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_rewards_are_left_as_they_are(name):
    rewards_G = torch.tensor([0.0, 1.0, 0.5])
    ADVANTAGES[name](rewards_G)
    assert rewards_G.tolist() == [0.0, 1.0, 0.5]


REWARDS_G = torch.tensor([0.0, 1.0, 1.0, 5.0], dtype=torch.float64)


def test_group_norm_does_not_see_the_unit_of_the_reward():
    torch.testing.assert_close(group_norm(100 * REWARDS_G + 7), group_norm(REWARDS_G), rtol=1e-4, atol=0)
    assert float(group_norm(REWARDS_G).std()) == pytest.approx(1, abs=1e-4)


def test_group_norm_does_not_blow_up_a_tiny_difference():
    advantages_G = group_norm(torch.tensor([1.0, 1.0, 1.0 + 1e-6]))
    assert float(advantages_G.abs().max()) < 0.02


def test_the_epsilon_of_group_norm_is_added_to_the_spread():
    expected_G = mean_only(REWARDS_G) / (REWARDS_G.std() + 2.0)
    torch.testing.assert_close(group_norm(REWARDS_G, epsilon=2.0), expected_G)


@pytest.mark.parametrize("advantages", [mean_only, leave_one_out, global_norm])
def test_advantages_without_a_norm_keep_the_unit_of_the_reward_and_not_its_zero(advantages):
    torch.testing.assert_close(advantages(100 * REWARDS_G + 7), 100 * advantages(REWARDS_G))


def test_max_rl_does_not_see_the_unit_of_the_reward_but_its_zero():
    torch.testing.assert_close(max_rl(100 * REWARDS_G), max_rl(REWARDS_G))
    assert float(max_rl(REWARDS_G + 7).max()) < 0.5 * float(max_rl(REWARDS_G).max())


@pytest.mark.parametrize("rewards", [[-1.0, 3.0, 3.0], [-1.0, 1.0], [-1.0, -2.0]])
def test_max_rl_refuses_negative_rewards(rewards):
    with pytest.raises(DataError):
        max_rl(torch.tensor(rewards))


@pytest.mark.parametrize("size", [2, 3, 50])
def test_the_scale_of_a_batch_agrees_with_a_slow_reference(size):
    advantages_N = torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    scale = batch_scale(advantages_N)
    assert isinstance(scale, float)
    assert scale == pytest.approx(1 / (slow_std(advantages_N.tolist()) + 1e-4), rel=1e-12)


@pytest.mark.parametrize("advantages", [[], [2.0]])
def test_the_scale_of_a_batch_too_small_for_a_spread_is_zero(advantages):
    assert batch_scale(torch.tensor(advantages)) == 0.0


def test_the_scale_of_a_batch_of_equal_answers_is_finite():
    assert math.isfinite(batch_scale(torch.zeros(8)))


def test_global_norm_takes_its_unit_from_the_batch_and_keeps_hard_and_easy_groups_apart():
    assert "global_norm" in BATCH_SCALED
    assert set(ADVANTAGES) >= BATCH_SCALED

    def scaled(factor):
        groups = [global_norm(factor * torch.tensor(rewards)) for rewards in ([0.0, 1.0], [0.0, 0.1], [1.0, 1.0])]
        advantages_N = torch.cat(groups)
        return advantages_N * batch_scale(advantages_N)

    torch.testing.assert_close(scaled(100.0), scaled(1.0), rtol=1e-3, atol=0)
    assert float(scaled(1.0).std()) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(scaled(1.0)[0], 10 * scaled(1.0)[2])
    assert scaled(1.0)[4:].tolist() == [0.0, 0.0]


def test_every_function_has_a_slow_reference():
    assert set(ADVANTAGES) == set(SLOW)


# --- shaping ---

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
