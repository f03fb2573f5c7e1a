"""Padded and packed rows: plans within the budget, every target where it is predicted, prompts once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grpo.learner.batch import Sample, samples_of
from grpo.learner.layouts import PackedLayout, PaddedLayout
from grpo.learner.packed_attention import ROWS

CPU = torch.device("cpu")
PACKED, PADDED = PackedLayout(), PaddedLayout()
LAYOUTS = pytest.mark.parametrize("layout", [PADDED, PACKED], ids=["padded", "packed"])


def sample(prompt_length, length, prompt=0):
    zeros = np.zeros(length)
    return Sample(np.full(prompt_length, 100 + prompt), np.arange(length), zeros.astype(np.float32), zeros.astype(int))


def cost(layout, samples):
    return layout.lay_out(samples, CPU).arguments["input_ids"].numel()


@LAYOUTS
@pytest.mark.parametrize("seed", range(20))
def test_a_plan_keeps_every_sample_once_and_within_the_budget(layout, seed):
    rng = np.random.default_rng(seed)
    samples = [
        sample(prompt_length, int(length), prompt)
        for prompt, prompt_length in enumerate(rng.integers(1, 20, size=rng.integers(1, 10)))
        for length in rng.integers(1, 40, size=rng.integers(1, 6))
    ]
    budget = int(rng.integers(1, 200))
    parts = layout.plan(samples, budget)
    assert sorted(i for part in parts for i in part) == list(range(len(samples)))
    for part in parts:
        assert len(part) == 1 or cost(layout, [samples[i] for i in part]) <= budget


@LAYOUTS
def test_a_plan_of_nothing_is_nothing(layout):
    assert layout.plan([], 10) == []


def test_padded_plans_put_like_lengths_together():
    samples = [sample(1, length) for length in (9, 2, 9, 2)]
    assert PADDED.plan(samples, 20) == [[0, 2], [1, 3]]
    assert PADDED.plan(samples, 5) == [[0], [2], [1], [3]]


def test_packed_plans_count_a_prompt_once_for_each_micro_batch():
    samples = [sample(10, 4, 0), sample(10, 4, 0), sample(10, 4, 0), sample(10, 1, 1), sample(10, 1, 1)]
    assert PACKED.plan(samples, 16) == [[0, 1], [2], [3, 4]]  # 10 + 3 + 3; 10 + 3; 10 + 0 + 0
    assert PACKED.plan(samples, 28) == [[0, 1, 2], [3, 4]]
    assert PACKED.plan(samples, 29) == [[0, 1, 2, 3, 4]]


@LAYOUTS
@pytest.mark.parametrize("eos", [1, 0])  # 0 is the pad token
def test_every_target_is_predicted_from_the_token_before_it(layout, make_group, eos):
    groups = [make_group(3, [5, 2, 1], [1.0] * 3, eos=eos), make_group(1, [4], [1.0], seed=1, eos=eos)]
    samples = [sample for group in groups for sample in samples_of(group)]
    inputs = layout.lay_out(samples, CPU)
    assert inputs.targets_N.tolist() == np.concatenate([sample.token_ids for sample in samples]).tolist()
    before_N = inputs.arguments["input_ids"][:, inputs.columns_K].flatten()[inputs.places_N]
    expected = [np.concatenate([sample.prompt_ids[-1:], sample.token_ids[:-1]]) for sample in samples]
    assert before_N.tolist() == np.concatenate(expected).tolist()


def test_packed_rows_hold_a_prompt_once_and_positions_go_on_from_it(make_group):
    group, other = make_group(3, [3, 1, 2], [1.0] * 3), make_group(1, [3], [1.0], seed=1)
    samples = [sample for group in (group, other) for sample in samples_of(group)]
    arguments = PACKED.lay_out(samples, CPU).arguments
    a, _, c = (completion.token_ids for completion in group.completions)
    expected = [group.prompt.token_ids, a[:-1], c[:-1], other.prompt.token_ids, other.completions[0].token_ids[:-1]]
    assert arguments["input_ids"].tolist() == [np.concatenate(expected).tolist()]
    assert arguments["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]


def test_attention_finds_every_sequence_with_its_prompt(make_group):
    groups = [make_group(3, [30, 1, 20, 28], [1.0] * 4), make_group(1, [3], [1.0], seed=1)]
    samples = [sample for group in groups for sample in samples_of(group)]
    arguments = PACKED.lay_out(samples, CPU).arguments
    tokens_N, rows = arguments["input_ids"][0], arguments[ROWS]
    assert rows.shapes == [(2, 32), (1, 22), (2, 3)]  # 32 and 30 columns; 22; 3 and 3
    assert torch.equal(rows.tokens_M[rows.places_N], torch.arange(len(tokens_N)))
    found, begin = [], 0
    for count, length in rows.shapes:
        block = tokens_N[rows.tokens_M[begin : begin + count * length]].view(count, length)
        found += block.tolist()
        begin += count * length
    for sample in samples:
        sequence = [*sample.prompt_ids.tolist(), *sample.token_ids[:-1].tolist()]
        assert any(row[: len(sequence)] == sequence for row in found)


def test_padded_rows_are_padded_on_the_right(make_group):
    samples = samples_of(make_group(2, [4, 1, 2], [1.0, 2.0, 3.0]))
    inputs = PADDED.lay_out(samples, CPU)
    assert inputs.arguments["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert inputs.columns_K.tolist() == [1, 2, 3, 4]
    assert inputs.places_N.tolist() == [0, 1, 2, 3, 4, 8, 9]
