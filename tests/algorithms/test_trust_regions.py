"""One token, or one row of them, near the edges of the trust region of each loss."""

from __future__ import annotations

import math

import pytest
import torch

from grpo.algorithms.losses import LOSSES


def one_token(name, ratio, advantage, behavior=0.0, **own):
    """The loss of a single token, its derivative by the policy's log-probability, and the clip fraction."""
    policy_BT = torch.tensor([[math.log(ratio) + behavior]], dtype=torch.float64, requires_grad=True)
    behavior_BT = torch.full((1, 1), behavior, dtype=torch.float64)
    advantages_BT = torch.full((1, 1), advantage, dtype=torch.float64)
    output = LOSSES[name](**own)(policy_BT, behavior_BT, advantages_BT, torch.ones(1, 1))
    output.loss.backward()
    return float(output.loss.detach()), float(policy_BT.grad), float(output.metrics["clip_fraction"].sum())


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"sapo", "cispo", "reinforce"}))
def test_one_token(name):
    assert one_token(name, 1.0, 2.0) == (-2.0, -2.0, 0.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [
        (1.29, 1.0, False),
        (1.31, 1.0, True),
        (0.79, 1.0, False),
        (1.31, -1.0, False),
        (0.81, -1.0, False),
        (0.79, -1.0, True),
    ],
)
@pytest.mark.parametrize("name", sorted({"grpo", "dr_grpo", "dapo", "gspo"} & set(LOSSES)))
def test_clipping_stops_the_gradient_only_where_the_policy_has_gone_far_enough(name, ratio, advantage, clipped):
    _, gradient, clip_fraction = one_token(name, ratio, advantage, clip_low=0.2, clip_high=0.3)
    assert gradient == (0.0 if clipped else pytest.approx(-ratio * advantage))
    assert clip_fraction == clipped


@pytest.mark.parametrize("name", ["grpo", "dapo"])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_the_dual_clip_bounds_how_much_a_bad_token_counts(name, dual_clip):
    loss, gradient, clip_fraction = one_token(name, 4.0, -2.0, dual_clip=dual_clip)
    assert loss == pytest.approx(6.0 if dual_clip else 8.0)
    assert gradient == (0.0 if dual_clip else pytest.approx(8.0))
    assert clip_fraction == bool(dual_clip)


def test_the_dual_clip_leaves_good_tokens_and_moderate_ratios_alone():
    assert one_token("grpo", 0.5, 1.0, dual_clip=3.0) == one_token("grpo", 0.5, 1.0)
    assert one_token("grpo", 5.0, 1.0, dual_clip=3.0) == one_token("grpo", 5.0, 1.0)
    assert one_token("grpo", 2.99, -1.0, dual_clip=3.0) == one_token("grpo", 2.99, -1.0)
    assert one_token("grpo", 0.5, -1.0, dual_clip=3.0) == one_token("grpo", 0.5, -1.0)
    assert one_token("grpo", 3.01, -1.0, dual_clip=3.0)[1] == 0.0


def test_dapo_lets_a_good_token_rise_further_than_a_bad_one_fall():
    assert one_token("dapo", 1.27, 1.0)[1] == pytest.approx(-1.27)
    assert one_token("dapo", 1.29, 1.0)[1] == 0.0
    assert one_token("dapo", 0.81, -1.0)[1] == pytest.approx(0.81)
    assert one_token("dapo", 0.79, -1.0)[1] == 0.0


@pytest.mark.parametrize(
    ("name", "ratio", "weight"),
    [
        ("cispo", 4.9, 4.9),
        ("cispo", 7.0, 5.0),
        ("cispo", 1e-3, 1e-3),
        ("reinforce", 1.9, 1.9),
        ("reinforce", 7.0, 2.0),
        ("reinforce", 1e-3, 1e-3),
    ],
)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_bounded_weight_never_stops_the_gradient(name, ratio, weight, advantage):
    loss, gradient, clip_fraction = one_token(name, ratio, advantage, behavior=-3.0)
    assert gradient == pytest.approx(-weight * advantage)
    assert loss == pytest.approx(-weight * advantage * (math.log(ratio) - 3))
    assert clip_fraction == (ratio == 7.0)


def test_cispo_can_bound_the_weight_from_below():
    assert one_token("cispo", 0.1, 1.0, clip_low=0.4)[1:] == (pytest.approx(-0.6), 1.0)


@pytest.mark.parametrize(
    ("policy", "behavior", "advantage", "cut"),
    [
        (0.71, 0.5, 1.0, True),
        (0.69, 0.5, 1.0, False),
        (0.2, 0.9, 1.0, False),
        (0.29, 0.5, -1.0, True),
        (0.31, 0.5, -1.0, False),
        (0.9, 0.2, -1.0, False),
        (0.15, 0.001, 1.0, False),  # 150 times as likely, and yet little has moved
    ],
)
def test_ppo_tv_stops_where_the_advantage_pushes_out_of_the_region(policy, behavior, advantage, cut):
    ratio = policy / behavior
    loss, gradient, clip_fraction = one_token("ppo_tv", ratio, advantage, behavior=math.log(behavior))
    assert (loss, gradient) == ((0.0, 0.0) if cut else (pytest.approx(-ratio * advantage),) * 2)
    assert clip_fraction == cut


def sapo_gate(ratio, advantage):
    """What is left of the gradient of the unclipped loss, -r A."""
    return one_token("sapo", ratio, advantage)[1] / (-ratio * advantage)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_gate_of_sapo_is_open_at_one_and_closes_on_both_sides(advantage):
    assert sapo_gate(1.0, advantage) == pytest.approx(1.0)
    rising = [sapo_gate(ratio, advantage) for ratio in (1.0, 1.2, 2.0, 4.0, 8.0)]
    falling = [sapo_gate(ratio, advantage) for ratio in (1.0, 0.8, 0.5, 0.2, 0.01)]
    assert rising == sorted(rising, reverse=True)
    assert falling == sorted(falling, reverse=True)
    assert rising[-1] < 0.01


@pytest.mark.parametrize("ratio", [0.1, 0.7, 1.5, 4.0])
def test_the_gate_of_sapo_closes_faster_for_bad_tokens(ratio):
    assert sapo_gate(ratio, -1.0) < sapo_gate(ratio, 1.0) < 1


def test_sapo_clips_nothing():
    assert one_token("sapo", 100.0, 1.0)[2] == 0.0


def one_row(log_ratios, advantage, **own):
    policy_BT = torch.tensor([log_ratios], dtype=torch.float64, requires_grad=True)
    zero_BT = torch.zeros_like(policy_BT)
    output = LOSSES["gspo"](**own)(policy_BT, zero_BT, zero_BT + advantage, zero_BT == 0)
    output.loss.backward()
    return float(output.loss.detach()), policy_BT.grad[0].tolist(), float(output.metrics["clip_fraction"].sum())


def test_gspo_sees_only_the_mean_log_ratio_of_the_row():
    loss, gradient, clip_fraction = one_row([1.0, -1.0, 0.5, -0.5], 2.0)
    assert loss == pytest.approx(-2.0)
    assert gradient == pytest.approx([-0.5] * 4)
    assert clip_fraction == 0


def test_gspo_cuts_off_all_tokens_of_a_row_or_none():
    assert one_row([4e-3, 0.0, -2e-3, 0.0], 1.0)[1:] == ([0.0] * 4, 4.0)
    _, gradient, clip_fraction = one_row([4e-3, 0.0, -2e-3, 0.0], -1.0)
    assert gradient == pytest.approx([math.exp(5e-4) / 4] * 4)
    assert clip_fraction == 0.0


def test_gspo_leaves_the_gradient_of_a_token_without_advantage_to_the_others():
    """As GSPO-token: a weight of zero leaves the token out, not a share of all of them."""
    policy_BT = torch.tensor([[0.1, -0.1, 0.0]], dtype=torch.float64, requires_grad=True)
    zero_BT = torch.zeros_like(policy_BT)
    advantages_BT = torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64)
    LOSSES["gspo"]()(policy_BT, zero_BT, advantages_BT, zero_BT == 0).loss.backward()
    assert policy_BT.grad[0].tolist() == pytest.approx([-1 / 3, 0.0, -2 / 3])
