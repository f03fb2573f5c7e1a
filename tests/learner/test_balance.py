from __future__ import annotations

import itertools

import numpy as np
import pytest

from grpo.learner.batch import balanced
from grpo.utils.ranks import Ranks, ShardRange


def load(costs, parts):
    return max(sum(costs[i] for i in part) for part in parts)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_everything_is_given_to_one_part_and_none_has_much_more_than_need_be(seed, parts):
    costs = np.random.default_rng(seed).integers(1, 100, size=7).tolist()
    found = balanced(costs, parts)
    assert sorted(itertools.chain(*found)) == list(range(7))
    assert all(part == sorted(part) for part in found)
    best = min(
        load(costs, [[i for i in range(7) if owners[i] == part] for part in range(parts)])
        for owners in itertools.product(range(parts), repeat=7)
    )
    assert load(costs, found) <= best * 4 / 3


def test_with_too_few_some_have_none():
    assert balanced([5], 3) == [[0], [], []]
    assert balanced([], 2) == [[], []]


@pytest.mark.parametrize(("total", "size"), [(0, 2), (1, 3), (2, 3), (5, 4), (6, 3), (61, 3)])
def test_rows_are_cut_as_torch_cuts_them(total, size):
    found = [ShardRange.of((total, 4), Ranks(rank, size)) for rank in range(size)]
    each = max(1, -(-total // size))
    assert [rows.count for rows in found] == [len(range(total)[r * each : (r + 1) * each]) for r in range(size)]
    assert [rows.start for rows in found] == [0, *(rows.stop for rows in found[:-1])]
    assert found[-1].stop == total


def test_what_two_parts_share():
    rows = list(range(10))
    for first, second in itertools.product(
        [ShardRange(0, 4, 10), ShardRange(3, 8, 10), ShardRange(8, 10, 10), ShardRange(10, 10, 10)], repeat=2
    ):
        ours, theirs = first.overlap(second)
        shared = sorted({*rows[first.start : first.stop]} & {*rows[second.start : second.stop]})
        assert rows[first.start : first.stop][ours] == rows[second.start : second.stop][theirs] == shared
