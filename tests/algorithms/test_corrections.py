from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from grpo.algorithms.corrections import clamp_for_exp, importance_weights, log_ratio
from grpo.algorithms.losses import LOSSES
from tests.algorithms.loss_inputs import TIGHT, random_inputs, value_and_gradient

LEVELS = ["token", "sequence", "geometric"]
MODES = ["truncate", "mask"]


def slow_importance_weights(proximal, behavior, mask, *, mode, level, min_ratio=0.0, max_ratio=None):
    result = [[0.0 for _ in row] for row in mask]
    max_ratio = math.inf if max_ratio is None else max_ratio
    for b, row in enumerate(mask):
        places = [t for t, on in enumerate(row) if on]
        total = sum(proximal[b][t] - behavior[b][t] for t in places)
        for t in places:
            own = proximal[b][t] - behavior[b][t]
            log_ratio = {"token": own, "sequence": total, "geometric": total / len(places)}[level]
            weight = math.exp(min(max(log_ratio, -20.0), 20.0))
            if mode == "truncate":
                result[b][t] = min(max(weight, min_ratio), max_ratio)
            elif min_ratio <= weight <= max_ratio:
                result[b][t] = weight
    return result


def weights_of(inputs, **kwargs):
    return importance_weights(inputs.policy_BT, inputs.behavior_BT, inputs.mask_BT, **kwargs)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bounds", [{}, {"max_ratio": 1.2}, {"min_ratio": 0.8}, {"min_ratio": 0.9, "max_ratio": 1.1}])
@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_agree_with_a_slow_loop(seed, mode, level, bounds, spread):
    inputs = random_inputs(seed)
    inputs = replace(inputs, behavior_BT=inputs.policy_BT + spread * (inputs.behavior_BT - inputs.policy_BT))
    policy, behavior, _, mask, _ = inputs.lists()
    expected = slow_importance_weights(policy, behavior, mask, mode=mode, level=level, **bounds)
    weights_BT = weights_of(inputs, mode=mode, level=level, **bounds)
    torch.testing.assert_close(weights_BT, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-14)


def row_weights(log_ratios, **kwargs):
    log_ratio_BT = torch.tensor([log_ratios])
    zero_BT = torch.zeros_like(log_ratio_BT)
    return importance_weights(log_ratio_BT, zero_BT, zero_BT == 0, **kwargs)[0].tolist()


@pytest.mark.parametrize(
    ("mode", "expected"), [("truncate", [0.5, 0.5, 1.0, 2.0, 2.0]), ("mask", [0.0, 0.5, 1.0, 2.0, 0.0])]
)
def test_bounds_truncate_or_mask(mode, expected):
    log_ratios = [math.log(0.4), math.log(0.5) + 1e-6, 0.0, math.log(2) - 1e-6, math.log(2.1)]
    assert row_weights(log_ratios, mode=mode, level="token", min_ratio=0.5, max_ratio=2.0) == pytest.approx(
        expected, 1e-5
    )


@pytest.mark.parametrize("level", LEVELS)
def test_weights_of_a_policy_that_has_not_moved_are_one(level):
    for mode in MODES:
        assert row_weights([0.0, 0.0, 0.0], mode=mode, level=level, min_ratio=1.0, max_ratio=1.0) == [1.0] * 3


@pytest.mark.parametrize("mode", MODES)
def test_levels_see_the_token_or_the_row(mode):
    log_ratios = [0.3, 0.0, -0.1]
    token, sequence, geometric = (row_weights(log_ratios, mode=mode, level=level) for level in LEVELS)
    assert token == pytest.approx([math.exp(x) for x in log_ratios])
    assert sequence == pytest.approx([math.exp(0.2)] * 3)
    assert geometric == pytest.approx([math.exp(0.2 / 3)] * 3)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("log_ratio", [100.0, -100.0, 1e4, -1e4])
def test_huge_ratios_are_finite_in_float32(level, mode, log_ratio):
    for weight in row_weights([log_ratio] * 5, mode=mode, level=level):
        assert weight == pytest.approx(math.exp(math.copysign(20, log_ratio)))


def test_the_sum_over_a_row_is_bounded_and_not_its_tokens():
    assert row_weights([50.0, -47.0], mode="truncate", level="sequence") == pytest.approx([math.exp(3)] * 2)
    assert row_weights([50.0, -47.0], mode="truncate", level="geometric") == pytest.approx([math.exp(1.5)] * 2)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_places_have_no_influence_and_weight_zero(level, mode, garbage):
    inputs = random_inputs()
    spoilt = inputs.map(lambda value_BT: value_BT.masked_fill(~inputs.mask_BT, garbage))
    kwargs = {"mode": mode, "level": level, "min_ratio": 0.5, "max_ratio": 2.0}
    for mask_BT in (inputs.mask_BT, inputs.mask_BT.double()):
        weights_BT = weights_of(replace(spoilt, mask_BT=mask_BT), **kwargs)
        assert torch.equal(weights_BT, weights_of(inputs, **kwargs))
        assert not weights_BT[~inputs.mask_BT].any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
def test_weights_hold_no_graph(level, mode):
    inputs = random_inputs()
    moving = replace(inputs, policy_BT=inputs.policy_BT.clone().requires_grad_())
    weights_BT = weights_of(moving, mode=mode, level=level)
    assert not weights_BT.requires_grad
    assert weights_BT.any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("own", ["defaults", "tight"])
def test_weighted_advantages_weight_the_policy_gradient(name, own):
    kwargs = TIGHT[name] if own == "tight" else {}
    inputs = random_inputs(2)
    weights_BT = weights_of(inputs, mode="mask", level="token", min_ratio=0.7, max_ratio=2)
    assert (weights_BT[inputs.mask_BT] == 0).any()
    weighted = replace(inputs, advantages_BT=inputs.advantages_BT * weights_BT)
    _, gradient_BT, _ = value_and_gradient(name, inputs, **kwargs)
    _, weighted_gradient_BT, _ = value_and_gradient(name, weighted, **kwargs)
    torch.testing.assert_close(weighted_gradient_BT, weights_BT * gradient_BT, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weight", [0.0, 0.3, 7.0])
def test_the_loss_scales_with_the_advantages_and_the_kl_does_not(name, weight):
    inputs = random_inputs(1)
    weighted = replace(inputs, advantages_BT=weight * inputs.advantages_BT)
    loss = inputs.loss(name, **TIGHT[name]).loss
    weighted_loss = weighted.loss(name, **TIGHT[name]).loss
    torch.testing.assert_close(weighted_loss, weight * loss, rtol=1e-12, atol=1e-15)
    kl = inputs.loss(name, beta=0.2, **TIGHT[name]).loss - loss
    weighted_kl = weighted.loss(name, beta=0.2, **TIGHT[name]).loss - weighted_loss
    torch.testing.assert_close(weighted_kl, kl, rtol=1e-10, atol=1e-14)


def test_masked_places_have_no_log_ratio():
    policy_BT, other_BT = torch.tensor([[-1.0, math.nan, -math.inf]]), torch.tensor([[-3.0, -1.0, -math.inf]])
    found_BT = log_ratio(policy_BT, other_BT, torch.tensor([[True, False, False]]))
    assert found_BT.tolist() == [[2.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ratio_however_far_off_has_an_exp_with_a_finite_square_and_gradient(dtype):
    values_T = torch.tensor([-math.inf, -1e4, 0.5, 1e4, math.inf], dtype=dtype, requires_grad=True)
    ratio_T = clamp_for_exp(values_T).exp()
    (ratio_T**2).sum().backward()
    assert ratio_T.isfinite().all()
    assert values_T.grad.isfinite().all()
    assert ratio_T[2].item() == pytest.approx(math.exp(0.5), rel=1e-2)
