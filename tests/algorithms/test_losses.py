from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from grpo.algorithms.aggregation import batch_denominator
from grpo.algorithms.losses import LOSSES
from tests.algorithms.loss_inputs import AGGREGATIONS, TIGHT, Inputs, random_inputs, value_and_gradient
from tests.algorithms.slow_losses import AGGREGATION, slow_loss

WEIGHT_IS_CONSTANT = {"cispo", "reinforce"}  # the ratio is a constant factor: there is no gradient through it


def assert_agrees_with_the_slow_loop(name, inputs, **kwargs):
    loss, gradient_BT, metrics = value_and_gradient(name, inputs, **kwargs)
    slow_value, slow_gradient, slow_metrics = slow_loss(name, *inputs.lists(), **kwargs)
    assert float(loss) == pytest.approx(slow_value, rel=1e-11)
    expected_BT = torch.tensor(slow_gradient, dtype=torch.float64)
    torch.testing.assert_close(gradient_BT, expected_BT, rtol=1e-11, atol=1e-14)
    for key, value in slow_metrics.items():
        assert float(metrics[key]) == pytest.approx(value, rel=1e-11), key


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_defaults_agree_with_a_slow_loop(name, seed, beta):
    assert_agrees_with_the_slow_loop(name, random_inputs(seed), beta=beta)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("scale", [{}, {"denominator": 50}, {"horizon": 11}])
def test_tight_bounds_agree_with_a_slow_loop(name, kl, aggregation, scale):
    kwargs = {"beta": 0.1, "kl_estimator": kl, "aggregation": aggregation, **scale, **TIGHT[name]}
    for seed in range(4):
        assert_agrees_with_the_slow_loop(name, random_inputs(seed), **kwargs)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"sapo"}))
def test_tight_bounds_are_felt_by_many_tokens_and_not_by_all(name):
    fractions = []
    for seed in range(4):
        inputs = random_inputs(seed)
        metrics = inputs.loss(name, **TIGHT[name]).metrics
        fractions.append(float(metrics["clip_fraction"].sum()) / sum(inputs.lengths))
    assert 0.25 < sum(fractions) / len(fractions) < 0.75


@pytest.mark.parametrize("own", [{"dual_clip": 1.05}, {"clip_low": 0.1, "clip_high": 0.4, "dual_clip": 2.0}])
def test_grpo_with_a_dual_clip_agrees_with_a_slow_loop(own):
    for seed in range(4):
        assert_agrees_with_the_slow_loop("grpo", random_inputs(seed), **own)


def kinks(name, inputs):
    """Distances of the unmasked tokens from the places where the loss has no derivative."""
    log_ratio_BT = (inputs.policy_BT - inputs.behavior_BT).masked_fill(~inputs.mask_BT, 0.0)
    own = TIGHT[name]
    if name == "ppo_tv":
        return (inputs.policy_BT.exp() - inputs.behavior_BT.exp())[inputs.mask_BT].abs() - own["max_tv"]
    if name == "gspo":
        log_ratio_BT = (log_ratio_BT.sum(1) / inputs.mask_BT.sum(1).clamp(min=1))[:, None].expand(log_ratio_BT.shape)
    edges = [1 - own["clip_low"], 1 + own["clip_high"]] if "clip_low" in own else []
    edges += [own["dual_clip"]] if "dual_clip" in own else []
    ratio_N = log_ratio_BT.exp()[inputs.mask_BT]
    return torch.stack([ratio_N - edge for edge in edges]) if edges else torch.ones(1)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_gradcheck(name, kl):
    """The behavior follows the policy where the loss takes the ratio for a constant: the ratio stays what it was.

    With one advantage for all tokens of a row, GSPO-token has the gradient of GSPO, through the ratio of the row.
    """
    inputs = random_inputs(4 if name == "gspo" else 5)
    if name not in WEIGHT_IS_CONSTANT:
        assert float(kinks(name, inputs).abs().min()) > 1e-4, "there is no derivative at a kink: take another seed"

    def loss(policy_BT):
        moved_BT = (policy_BT - inputs.policy_BT).detach() if name in WEIGHT_IS_CONSTANT else 0.0
        moved = replace(inputs, policy_BT=policy_BT, behavior_BT=inputs.behavior_BT + moved_BT)
        return moved.loss(name, beta=0.1, kl_estimator=kl, **TIGHT[name]).loss

    assert torch.autograd.gradcheck(loss, inputs.policy_BT.clone().requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30, 0.0])
def test_what_stands_in_masked_places_has_no_influence(name, garbage):
    inputs = random_inputs()
    spoilt = inputs.map(lambda value_BT: value_BT.masked_fill(~inputs.mask_BT, garbage))
    spoilt = replace(spoilt, mask_BT=inputs.mask_BT)
    loss, gradient_BT, metrics = value_and_gradient(name, inputs, beta=0.1)
    spoilt_loss, spoilt_gradient_BT, spoilt_metrics = value_and_gradient(name, spoilt, beta=0.1)
    assert torch.equal(spoilt_loss, loss)
    assert torch.equal(spoilt_gradient_BT, gradient_BT)
    assert spoilt_metrics == metrics
    assert not spoilt_gradient_BT[~inputs.mask_BT].any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_mask_of_numbers_is_as_good_as_one_of_booleans(name, aggregation):
    inputs = random_inputs()
    for mask_BT in (inputs.mask_BT.double(), inputs.mask_BT.long()):
        output = replace(inputs, mask_BT=mask_BT).loss(name, aggregation=aggregation)
        assert torch.equal(output.loss, inputs.loss(name, aggregation=aggregation).loss)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4, 5]], [[0], [1, 2], [3, 4, 5]], [[5, 0], [4, 3], [2], [1]]])
def test_micro_batches_add_up(name, aggregation, split):
    inputs = random_inputs()
    kwargs = {"aggregation": aggregation, "denominator": batch_denominator(inputs.lengths, aggregation), "beta": 0.1}
    loss, gradient_BT, metrics = value_and_gradient(name, inputs, **kwargs)
    parts = [value_and_gradient(name, inputs.map(lambda value, rows=rows: value[rows]), **kwargs) for rows in split]
    torch.testing.assert_close(sum(part[0] for part in parts), loss, rtol=1e-12, atol=1e-12)
    for rows, (_, part_gradient, _) in zip(split, parts, strict=True):
        torch.testing.assert_close(part_gradient, gradient_BT[rows], rtol=1e-12, atol=1e-15)
    for key, value in metrics.items():
        torch.testing.assert_close(sum(part[2][key] for part in parts), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_denominator_left_out_is_that_of_the_tensors_at_hand(name, aggregation):
    inputs = random_inputs()
    denominator = batch_denominator(inputs.lengths, aggregation, horizon=inputs.mask_BT.shape[1])
    left_out = inputs.loss(name, beta=0.1, aggregation=aggregation).loss
    for given in (denominator, torch.tensor(denominator)):
        output = inputs.loss(name, beta=0.1, aggregation=aggregation, denominator=given)
        torch.testing.assert_close(output.loss, left_out, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("padding", [(0, 3, 0, 0), (2, 0, 0, 0), (0, 0, 0, 2)])
def test_padding_changes_nothing(name, aggregation, padding):
    inputs = random_inputs()
    kwargs = {"beta": 0.1, "aggregation": aggregation, "horizon": 9}
    if padding[-1] and aggregation == "fixed_horizon":  # by itself it counts every row
        kwargs["denominator"] = batch_denominator(inputs.lengths, aggregation, horizon=9)
    padded = inputs.map(lambda value: torch.nn.functional.pad(value, padding))
    loss, gradient_BT, metrics = value_and_gradient(name, inputs, **kwargs)
    padded_loss, padded_gradient_BT, padded_metrics = value_and_gradient(name, padded, **kwargs)
    torch.testing.assert_close(padded_loss, loss, rtol=1e-12, atol=0)
    expected_BT = torch.nn.functional.pad(gradient_BT, padding)
    torch.testing.assert_close(padded_gradient_BT, expected_BT, rtol=1e-12, atol=1e-15)
    for key, value in metrics.items():
        torch.testing.assert_close(padded_metrics[key], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("denominator", [None, 10])
def test_an_empty_mask_gives_exactly_zero(name, aggregation, denominator):
    inputs = random_inputs()
    empty = replace(inputs, mask_BT=torch.zeros_like(inputs.mask_BT))
    kwargs = {"beta": 0.1, "aggregation": aggregation, "denominator": denominator}
    loss, gradient_BT, metrics = value_and_gradient(name, empty, **kwargs)
    assert float(loss) == 0.0
    assert not gradient_BT.any()
    assert all(float(value) == 0.0 for value in metrics.values())


@pytest.mark.parametrize("name", LOSSES)
def test_where_the_policy_is_still_the_behavior_all_have_the_plain_policy_gradient(name):
    inputs = random_inputs()
    inputs = replace(inputs, behavior_BT=inputs.policy_BT)
    _, gradient_BT, metrics = value_and_gradient(name, inputs, aggregation="token_mean")
    expected_BT = -inputs.advantages_BT.masked_fill(~inputs.mask_BT, 0.0) / inputs.mask_BT.sum()
    torch.testing.assert_close(gradient_BT, expected_BT, rtol=1e-12, atol=0)
    assert float(metrics["clip_fraction"]) == 0.0
    assert float(metrics["ratio"]) == pytest.approx(sum(inputs.lengths))


@pytest.mark.parametrize("name", LOSSES)
def test_a_likelier_token_of_a_good_answer_lowers_the_loss_and_of_a_bad_one_raises_it(name):
    for aggregation in AGGREGATIONS:
        inputs = random_inputs()
        inputs = replace(inputs, behavior_BT=inputs.policy_BT)
        _, gradient_BT, _ = value_and_gradient(name, inputs, aggregation=aggregation)
        assert torch.equal(gradient_BT.sign(), -inputs.advantages_BT.sign() * inputs.mask_BT)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_models_far_apart_give_a_finite_loss_and_gradient_in_float32(name, kl, advantage):
    policy_BT = torch.tensor([[-0.1, -100.1, -0.1], [-100.1, -100.1, -100.1], [-0.1, -0.1, -0.1]])
    other_BT = torch.tensor([[-100.1, -0.1, -0.2], [-0.1, -0.1, -0.1], [-100.1, -100.1, -100.1]])
    on_BT = torch.ones(3, 3)
    inputs = Inputs(policy_BT, other_BT, advantage * on_BT, on_BT, other_BT)
    loss, gradient_BT, metrics = value_and_gradient(name, inputs, beta=0.1, kl_estimator=kl)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient_BT).all()
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_a_reference_that_agrees_changes_nothing(name, kl):
    inputs = random_inputs()
    same = replace(inputs, reference_BT=inputs.policy_BT)
    loss, _, metrics = value_and_gradient(name, same, beta=0.3, kl_estimator=kl)
    assert torch.equal(loss, inputs.loss(name).loss)
    assert float(metrics["reference_kl"]) == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_reference_there_is_no_kl(name):
    inputs = random_inputs()
    loss, gradient_BT, metrics = value_and_gradient(name, replace(inputs, reference_BT=None))
    assert "reference_kl" not in metrics
    with_reference = value_and_gradient(name, inputs, beta=0.0)
    assert torch.equal(loss, with_reference[0])
    assert torch.equal(gradient_BT, with_reference[1])


@pytest.mark.parametrize("name", LOSSES)
def test_metrics_are_per_token_and_nothing_in_masked_places(name):
    inputs = random_inputs(0)
    for value_BT in inputs.loss(name, beta=0.1).metrics.values():
        assert value_BT.shape == inputs.mask_BT.shape
        assert not value_BT[~inputs.mask_BT].any()


@pytest.mark.parametrize("name", LOSSES)
def test_metrics_hold_no_graph(name):
    inputs = random_inputs()
    output = replace(inputs, policy_BT=inputs.policy_BT.clone().requires_grad_()).loss(name, beta=0.1)
    assert not any(value.requires_grad for value in output.metrics.values())


@pytest.mark.parametrize("name", LOSSES)
def test_arguments_are_left_as_they_are(name):
    inputs = random_inputs()
    copies = inputs.map(torch.clone)
    value_and_gradient(name, inputs, beta=0.1)
    assert inputs.lists() == copies.lists()


def test_every_loss_has_a_slow_loop():
    assert set(LOSSES) == set(AGGREGATION) == set(TIGHT)
