from __future__ import annotations

import math

import pytest
import torch

from grpo.algorithms.advantages import ADVANTAGES, group_norm, mean_only


def slow_mean_only(rewards):
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def slow_group_norm(rewards):
    centered = slow_mean_only(rewards)
    std = math.sqrt(math.fsum(x * x for x in centered) / (len(rewards) - 1))
    return [x / (std + 1e-4) for x in centered]


def random_rewards(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2 + seed, generator=generator, dtype=dtype) * 10.0 ** (seed - 2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("fast", "slow"), [(group_norm, slow_group_norm), (mean_only, slow_mean_only)])
def test_agree_with_a_slow_reference(fast, slow, seed):
    rewards_G = random_rewards(seed)
    expected_G = torch.tensor(slow(rewards_G.tolist()), dtype=torch.float64)
    torch.testing.assert_close(fast(rewards_G), expected_G, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("seed", range(5))
def test_float32_is_enough_and_advantages_sum_to_zero(name, seed):
    rewards_G = random_rewards(seed, torch.float32)
    advantages_G = ADVANTAGES[name](rewards_G)
    torch.testing.assert_close(advantages_G, ADVANTAGES[name](rewards_G.double()).float(), rtol=1e-4, atol=1e-5)
    assert abs(float(advantages_G.double().mean())) <= 1e-6 * float(advantages_G.abs().max())


def test_two_answers_one_right():
    expected_G = torch.tensor([0.5, -0.5]) / (math.sqrt(0.5) + 1e-4)
    torch.testing.assert_close(group_norm(torch.tensor([1.0, 0.0])), expected_G)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7, 1 / 3, -2.7, 1e6 + 0.1, 1e-30])
def test_equal_rewards_give_exactly_zero(name, reward):
    for size in range(1, 20):
        advantages_G = ADVANTAGES[name](torch.full((size,), reward))
        assert advantages_G.tolist() == [0.0] * size


def test_the_mean_of_equal_rewards_does_round():
    """Otherwise the test above would pass without the special case in the code."""
    rounded = [torch.full((size,), 0.1).mean() != torch.tensor(0.1) for size in range(1, 20)]
    assert any(rounded)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_group_of_one_is_finite(name):
    assert ADVANTAGES[name](torch.tensor([3.0])).tolist() == [0.0]


def test_group_norm_does_not_see_the_unit_of_the_reward():
    rewards_G = torch.tensor([0.0, 1.0, 1.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(group_norm(100 * rewards_G + 7), group_norm(rewards_G), rtol=1e-4, atol=0)
    assert float(group_norm(rewards_G).std()) == pytest.approx(1, abs=1e-4)


def test_group_norm_does_not_blow_up_a_tiny_difference():
    advantages_G = group_norm(torch.tensor([1.0, 1.0, 1.0 + 1e-6]))
    assert float(advantages_G.abs().max()) < 0.02


def test_mean_only_keeps_the_unit_of_the_reward():
    rewards_G = torch.tensor([0.0, 1.0, 1.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(mean_only(100 * rewards_G + 7), 100 * mean_only(rewards_G))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_rewards_are_left_as_they_are(name):
    rewards_G = torch.tensor([0.0, 1.0, 0.5])
    ADVANTAGES[name](rewards_G)
    assert rewards_G.tolist() == [0.0, 1.0, 0.5]
