from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from grpo.learner.batch import balance, collate, make_sample, samples_of
from grpo.types import Completion

CPU = torch.device("cpu")


def test_collate_lays_everything_out_by_completion(make_group):
    (a,), (b,) = samples_of(make_group(2, [3], [0.5])), samples_of(make_group(4, [1], [-1.0], seed=1))
    micro = collate([a, b], CPU)
    assert micro.mask_BK.tolist() == [[True, True, True], [True, False, False]]
    assert micro.advantages_BK.tolist() == [[0.5] * 3, [-1.0] * 3]
    torch.testing.assert_close(micro.behavior_logprobs_BK[0], torch.tensor(a.behavior_logprobs))
    assert micro.behavior_logprobs_BK[1].tolist() == [b.behavior_logprobs[0], 0, 0]
    assert micro.reference_logprobs_BK is None


def test_values_are_spread_over_the_completions_and_gradients_come_back(make_group):
    micro = collate(samples_of(make_group(2, [1, 3, 2], [1.0, 2.0, 3.0])), CPU)
    values_N = torch.arange(1.0, 7.0, requires_grad=True)
    spread_BK = micro.unflatten(values_N)
    assert spread_BK.tolist() == [[1, 0, 0], [2, 3, 4], [5, 6, 0]]
    (spread_BK * torch.tensor([[1.0], [10.0], [100.0]])).sum().backward()
    assert values_N.grad.tolist() == [1, 10, 10, 10, 100, 100]


def test_reference_logprobs_stand_where_the_behavior_ones_do(make_group):
    group = make_group(3, [5, 2], [1.0, -1.0], reference=True)
    micro = collate(samples_of(group), CPU)
    for expected, row_K, mask_K in zip(
        group.reference_logprobs, micro.reference_logprobs_BK, micro.mask_BK, strict=True
    ):
        assert row_K[mask_K].tolist() == expected.tolist()
        assert not row_K[~mask_K].any()


def test_versions_are_unrolled_per_token():
    completion = Completion(
        np.array([5, 6, 7, 1]), np.zeros(4, np.float32), versions=((3, 1), (5, 3)), finish_reason="stop"
    )
    micro = collate([make_sample(np.array([4, 4]), completion)], CPU)
    assert micro.versions_BK.tolist() == [[3, 5, 5, 5]]


def test_read_only_arrays_will_do(make_group):
    """Arrays that come out of the object store can't be written to."""
    group = make_group(3, [5, 2], [1.0, -1.0], reference=True)
    for completion, reference in zip(group.completions, group.reference_logprobs, strict=True):
        for array in (group.prompt.token_ids, completion.token_ids, completion.logprobs, reference):
            array.flags.writeable = False
    collate(samples_of(group), CPU)


def load(costs, parts):
    return max(sum(costs[i] for i in part) for part in parts)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_everything_is_given_to_one_part_and_none_has_much_more_than_need_be(seed, parts):
    costs = np.random.default_rng(seed).integers(1, 100, size=7).tolist()
    found = balance(costs, parts)
    assert sorted(itertools.chain(*found)) == list(range(7))
    assert all(part == sorted(part) for part in found)
    best = min(
        load(costs, [[i for i in range(7) if owners[i] == part] for part in range(parts)])
        for owners in itertools.product(range(parts), repeat=7)
    )
    assert load(costs, found) <= best * 4 / 3


def test_with_too_few_some_have_none():
    assert balance([5], 3) == [[0], [], []]
    assert balance([], 2) == [[], []]
