from __future__ import annotations

import os

import numpy as np
import pytest
from rank_processes import Died

from grpo.utils.ranks import Ranks


def talk(ranks):
    sums = ranks.all_reduce([ranks.rank + 0.5, 1e-9])
    return sums, ranks.all_gather({"rank": ranks.rank, "tokens": np.arange(ranks.rank)})


def test_alone_there_is_nobody_to_talk_to():
    sums, everybodys = talk(Ranks.alone())
    assert (sums, len(everybodys)) == ([0.5, 1e-9], 1)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_learns_the_same_of_all(rank_processes, size):
    for sums, everybodys in rank_processes.run(size, talk):
        assert sums == pytest.approx([sum(range(size)) + 0.5 * size, size * 1e-9], rel=1e-15)
        assert [(one["rank"], len(one["tokens"])) for one in everybodys] == [(rank, rank) for rank in range(size)]


def die(ranks):
    if ranks.rank == 1:
        os._exit(1)
    ranks.all_reduce([1.0])


def test_a_rank_that_dies_makes_the_others_raise(rank_processes):
    first, second, third = rank_processes.answers(3, die, timeout_s=30.0)
    assert isinstance(second, Died)
    assert isinstance(first, RuntimeError)
    assert isinstance(third, RuntimeError)


def fall_behind(ranks, fifo):
    if ranks.rank == 1:
        fifo.read_text()  # returns when the other is done
        return
    try:
        ranks.all_reduce([1.0])
    finally:
        fifo.write_text("")


def test_nobody_waits_longer_than_the_timeout(rank_processes, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    first, second = rank_processes.answers(2, fall_behind, tmp_path / "fifo", timeout_s=4.0)
    assert isinstance(first, RuntimeError)
    assert second is None
