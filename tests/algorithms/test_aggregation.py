from __future__ import annotations

import math

import pytest
import torch

from grpo.algorithms.aggregation import aggregate, batch_denominator
from tests.algorithms.loss_inputs import AGGREGATIONS, random_inputs
from tests.algorithms.slow_losses import slow_weights


def value_and_gradient(values_BT, mask_BT, *args, **kwargs):
    values_BT = values_BT.clone().requires_grad_()
    total = aggregate(values_BT, mask_BT, *args, **kwargs)
    total.backward()
    return total.detach(), values_BT.grad


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("scale", [{}, {"denominator": 12.5}, {"horizon": 20}, {"denominator": 12.5, "horizon": 20}])
def test_value_and_gradient_agree_with_a_slow_loop(seed, aggregation, scale):
    inputs = random_inputs(seed)
    total, gradient_BT = value_and_gradient(inputs.behavior_BT, inputs.mask_BT, aggregation, **scale)
    weights = slow_weights(inputs.mask_BT.tolist(), aggregation, **scale)
    products = [
        weight * value
        for weights_T, values_T in zip(weights, inputs.behavior_BT.tolist(), strict=True)
        for weight, value in zip(weights_T, values_T, strict=True)
    ]
    assert float(total) == pytest.approx(math.fsum(products), rel=1e-12)
    torch.testing.assert_close(gradient_BT, torch.tensor(weights, dtype=torch.float64), rtol=1e-12, atol=0)


def test_long_and_short_rows_weigh_as_the_name_says():
    values_BT = torch.tensor([[1.0, 1.0, 1.0, 1.0], [6.0, 0.0, 0.0, 0.0]])
    mask_BT = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    assert float(aggregate(values_BT, mask_BT)) == 2.0
    assert float(aggregate(values_BT, mask_BT, "token_mean")) == 2.0
    assert float(aggregate(values_BT, mask_BT, "sequence_mean")) == 3.5
    assert float(aggregate(values_BT, mask_BT, "fixed_horizon")) == 1.25
    assert float(aggregate(values_BT, mask_BT, "fixed_horizon", horizon=10)) == 0.5


def test_only_a_fixed_horizon_counts_rows_without_tokens():
    values_BT = torch.ones(4, 2)
    mask_BT = torch.tensor([[1, 1], [0, 0], [1, 0], [0, 0]])
    assert float(aggregate(values_BT, mask_BT, "token_mean")) == 1.0
    assert float(aggregate(values_BT, mask_BT, "sequence_mean")) == 1.0
    assert float(aggregate(values_BT, mask_BT, "fixed_horizon")) == 3 / 8


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_stands_in_masked_places_has_no_influence(aggregation, garbage):
    inputs = random_inputs()
    spoilt_BT = inputs.behavior_BT.masked_fill(~inputs.mask_BT, garbage)
    total, gradient_BT = value_and_gradient(inputs.behavior_BT, inputs.mask_BT, aggregation)
    spoilt_total, spoilt_gradient_BT = value_and_gradient(spoilt_BT, inputs.mask_BT, aggregation)
    assert torch.equal(spoilt_total, total)
    assert torch.equal(spoilt_gradient_BT, gradient_BT)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (0, 3), (2, 0)])
def test_an_empty_mask_gives_exactly_zero(aggregation, shape):
    total, gradient_BT = value_and_gradient(torch.full(shape, math.nan), torch.zeros(shape), aggregation)
    assert float(total) == 0.0
    assert gradient_BT.tolist() == torch.zeros(shape).tolist()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_mask_of_numbers_is_as_good_as_one_of_booleans(aggregation):
    inputs = random_inputs()
    expected = aggregate(inputs.policy_BT, inputs.mask_BT, aggregation)
    assert torch.equal(aggregate(inputs.policy_BT, inputs.mask_BT.double(), aggregation), expected)


@pytest.mark.parametrize(
    ("aggregation", "horizon", "expected"),
    [
        ("token_mean", None, 8.0),
        ("token_mean", 10, 8.0),
        ("sequence_mean", None, 3.0),
        ("sequence_mean", 10, 3.0),
        ("fixed_horizon", None, 20.0),
        ("fixed_horizon", 10, 40.0),
    ],
)
def test_the_denominator_of_a_batch(aggregation, horizon, expected):
    denominator = batch_denominator([5, 0, 1, 2], aggregation, horizon)
    assert isinstance(denominator, float)
    assert denominator == expected


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_the_denominator_of_a_batch_without_tokens_is_one(aggregation, lengths):
    assert batch_denominator(lengths, aggregation) == 1.0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_denominator_of_a_batch_is_that_of_its_tensors_together(aggregation):
    inputs = random_inputs(1)
    for horizon in (7, 30):
        denominator = batch_denominator(inputs.lengths, aggregation, horizon)
        together = aggregate(inputs.policy_BT, inputs.mask_BT, aggregation, horizon=horizon)
        parts = [
            aggregate(inputs.policy_BT[rows], inputs.mask_BT[rows], aggregation, denominator=denominator)
            for rows in ([0, 1], [2], [3, 4, 5])
        ]
        torch.testing.assert_close(sum(parts), together, rtol=1e-12, atol=0)
