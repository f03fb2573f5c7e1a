from __future__ import annotations

import itertools

import pytest

from grpo.utils.ranks import Ranks, ShardRange


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
        ours, theirs = first.shared_with(second)
        shared = sorted({*rows[first.start : first.stop]} & {*rows[second.start : second.stop]})
        assert rows[first.start : first.stop][ours] == rows[second.start : second.stop][theirs] == shared
