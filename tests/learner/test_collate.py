from __future__ import annotations

import numpy as np
import pytest
import torch

from grpo.learner.collate import collate, make_sample, plan, samples_of
from grpo.types import Completion

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(20))
def test_plan_keeps_every_sample_once_and_within_the_budget(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, size=rng.integers(1, 40)).tolist()
    budget = int(rng.integers(1, 200))
    parts = list(plan(lengths, budget))
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(lengths[i] for i in part) <= budget


def test_plan_gives_a_sample_over_the_budget_a_micro_batch_of_its_own():
    assert list(plan([3, 50, 2, 40], max_tokens=10)) == [[1], [3], [0, 2]]


def test_plan_puts_like_lengths_together():
    assert list(plan([10, 1, 10, 1], max_tokens=20)) == [[0, 2], [1, 3]]


def test_plan_of_nothing_is_nothing():
    assert list(plan([], max_tokens=10)) == []


def test_collate_lays_everything_out_by_position(make_group):
    long, short = make_group(2, [3], [0.5]), make_group(4, [1], [-1.0], seed=1)
    (a,), (b,) = samples_of(long), samples_of(short)
    micro = collate([a, b], CPU)
    assert micro.first == 1  # the first prediction is that of token 2, the first one after the shorter prompt
    assert micro.tokens_BT.tolist() == [a.token_ids.tolist(), b.token_ids.tolist()]
    assert micro.mask_BK.tolist() == [[True, True, True], [False, False, True]]
    assert micro.advantages_BK.tolist() == [[0.5] * 3, [-1.0] * 3]
    torch.testing.assert_close(micro.behavior_logprobs_BK[0], torch.tensor(a.behavior_logprobs))
    assert micro.behavior_logprobs_BK[1].tolist() == [0, 0, b.behavior_logprobs[0]]
    assert micro.reference_logprobs_BK is None


def test_collate_pads_on_the_right(make_group):
    samples = samples_of(make_group(2, [4, 1, 2], [1.0, 2.0, 3.0]))
    micro = collate(samples, CPU)
    assert micro.attention_BT.tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert micro.mask_BK.tolist() == [
        [True, True, True, True],
        [True, False, False, False],
        [True, True, False, False],
    ]


@pytest.mark.parametrize("eos", [1, 0])
def test_the_final_eos_is_trained_on_also_where_it_is_the_pad_token(make_group, eos):
    samples = samples_of(make_group(3, [5, 2, 1], [1.0, 1.0, 1.0], eos=eos))
    micro = collate(samples, CPU)
    targets_BK = micro.tokens_BT[:, micro.first + 1 :]
    for sample, targets_K, mask_K in zip(samples, targets_BK, micro.mask_BK, strict=True):
        assert targets_K[mask_K].tolist() == sample.token_ids[sample.prompt_length :].tolist()
        assert targets_K[mask_K][-1] == eos


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
