from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from grpo.algorithms.advantages import group_norm
from grpo.algorithms.losses import grpo, k3

CLIP = {"clip_low": 0.2, "clip_high": 0.3}


@dataclass(frozen=True)
class Inputs:
    """Arguments of the loss, float64 [B, T]."""

    policy_BT: Tensor
    behavior_BT: Tensor
    advantages_BT: Tensor
    mask_BT: Tensor
    reference_BT: Tensor

    def loss(self, *, beta=0.0, denominator=None):
        return grpo(
            self.policy_BT,
            self.behavior_BT,
            self.advantages_BT,
            self.mask_BT,
            reference_logprobs_BT=self.reference_BT,
            denominator=denominator,
            beta=beta,
            **CLIP,
        )

    def rows(self, rows):
        return Inputs(*(getattr(self, name)[rows] for name in vars(self)))


def random_inputs(seed=0, shape=(5, 7)):
    generator = torch.Generator().manual_seed(seed)

    def normal(scale):
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    policy_BT = normal(1.0) - 2
    return Inputs(
        policy_BT=policy_BT,
        behavior_BT=policy_BT + normal(0.4),  # so that about half of the ratios lie outside of the clip range
        advantages_BT=normal(1.0)[:, :1].expand(shape),
        mask_BT=torch.rand(shape, generator=generator) < 0.7,
        reference_BT=policy_BT + normal(0.5),
    )


def value_and_gradient(inputs, **kwargs):
    policy_BT = inputs.policy_BT.detach().clone().requires_grad_()
    output = replace(inputs, policy_BT=policy_BT).loss(**kwargs)
    output.loss.backward()
    return output.loss.detach(), policy_BT.grad, output.metrics


def slow_value_and_gradient(inputs, beta=0.0, denominator=None):
    """The formula of the docstring, token by token, with its derivative by the policy's log-probability."""
    loss, gradient_BT = 0.0, torch.zeros_like(inputs.policy_BT)
    count = denominator or max(1, int(inputs.mask_BT.sum()))
    for b in range(inputs.mask_BT.shape[0]):
        for t in range(inputs.mask_BT.shape[1]):
            if not inputs.mask_BT[b, t]:
                continue
            advantage = float(inputs.advantages_BT[b, t])
            ratio = math.exp(float(inputs.policy_BT[b, t]) - float(inputs.behavior_BT[b, t]))
            clipped = min(max(ratio, 1 - CLIP["clip_low"]), 1 + CLIP["clip_high"])
            difference = float(inputs.reference_BT[b, t]) - float(inputs.policy_BT[b, t])
            loss -= min(ratio * advantage, clipped * advantage)
            loss += beta * (math.exp(difference) - difference - 1)
            if ratio * advantage <= clipped * advantage:
                gradient_BT[b, t] -= ratio * advantage
            gradient_BT[b, t] += beta * (1 - math.exp(difference))
    return loss / count, gradient_BT / count


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("denominator", [None, 50])
def test_value_and_gradient_agree_with_a_slow_loop(seed, beta, denominator):
    inputs = random_inputs(seed)
    loss, gradient_BT, _ = value_and_gradient(inputs, beta=beta, denominator=denominator)
    slow_loss, slow_gradient_BT = slow_value_and_gradient(inputs, beta=beta, denominator=denominator)
    assert float(loss) == pytest.approx(slow_loss, rel=1e-12)
    torch.testing.assert_close(gradient_BT, slow_gradient_BT, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_gradcheck(beta):
    inputs = random_inputs(1)
    policy_BT = inputs.policy_BT.clone().requires_grad_()
    ratio_BT = (inputs.policy_BT - inputs.behavior_BT).exp()
    for edge in (1 - CLIP["clip_low"], 1 + CLIP["clip_high"]):
        assert float((ratio_BT - edge).abs().min()) > 1e-4, "there is no derivative at a kink: take another seed"
    assert torch.autograd.gradcheck(lambda policy: replace(inputs, policy_BT=policy).loss(beta=beta).loss, policy_BT)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30, 0.0])
def test_what_stands_in_masked_places_has_no_influence(garbage):
    inputs = random_inputs()
    spoilt = replace(
        inputs,
        **{
            name: value.masked_fill(~inputs.mask_BT, garbage)
            for name, value in vars(inputs).items()
            if name != "mask_BT"
        },
    )
    loss, gradient_BT, metrics = value_and_gradient(inputs, beta=0.1)
    spoilt_loss, spoilt_gradient_BT, spoilt_metrics = value_and_gradient(spoilt, beta=0.1)
    assert torch.equal(spoilt_loss, loss)
    assert torch.equal(spoilt_gradient_BT, gradient_BT)
    assert spoilt_metrics == metrics
    assert not spoilt_gradient_BT[~inputs.mask_BT].any()


def test_a_mask_of_numbers_is_as_good_as_one_of_booleans():
    inputs = random_inputs()
    assert torch.equal(replace(inputs, mask_BT=inputs.mask_BT.double()).loss().loss, inputs.loss().loss)


@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4]], [[0], [1, 2], [3, 4]], [[4, 0], [3], [2], [1]]])
def test_micro_batches_add_up(split):
    inputs = random_inputs()
    total = int(inputs.mask_BT.sum())
    loss, gradient_BT, metrics = value_and_gradient(inputs, beta=0.1, denominator=total)
    parts = [value_and_gradient(inputs.rows(rows), beta=0.1, denominator=total) for rows in split]
    torch.testing.assert_close(sum(part[0] for part in parts), loss, rtol=1e-12, atol=0)
    for rows, (_, part_gradient, _) in zip(split, parts, strict=True):
        torch.testing.assert_close(part_gradient, gradient_BT[rows], rtol=1e-12, atol=0)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(part[2][name] for part in parts), value, rtol=1e-12, atol=1e-12)


def test_without_a_denominator_the_loss_is_the_mean_over_unmasked_tokens():
    inputs = random_inputs()
    count = int(inputs.mask_BT.sum())
    assert torch.equal(inputs.loss(beta=0.1).loss, inputs.loss(beta=0.1, denominator=count).loss)
    assert torch.equal(inputs.loss(denominator=torch.tensor(count)).loss, inputs.loss(denominator=count).loss)


def one_token(ratio, advantage):
    """The loss of a single token, and its derivative by the policy's log-probability."""
    policy_BT = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    zero_BT = torch.zeros(1, 1, dtype=torch.float64)
    output = grpo(policy_BT, zero_BT, zero_BT + advantage, zero_BT == 0, **CLIP)
    output.loss.backward()
    return float(output.loss.detach()), float(policy_BT.grad), output.metrics


def test_one_token():
    assert one_token(1.0, 2.0)[:2] == (-2.0, -2.0)


@pytest.mark.parametrize(("advantage", "sign"), [(1.0, -1), (-1.0, 1)])
def test_a_likelier_token_of_a_good_answer_lowers_the_loss_and_of_a_bad_one_raises_it(advantage, sign):
    assert math.copysign(1, one_token(1.1, advantage)[0] - one_token(1.0, advantage)[0]) == sign


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
def test_clipping_stops_the_gradient_only_where_the_policy_has_gone_far_enough(ratio, advantage, clipped):
    _, gradient, metrics = one_token(ratio, advantage)
    assert gradient == (0.0 if clipped else pytest.approx(-ratio * advantage))
    assert float(metrics["clip_fraction"]) == clipped


def test_k3_is_never_negative_and_zero_only_where_the_models_agree():
    log_ratio_T = torch.linspace(-5, 5, 101, dtype=torch.float64)
    log_ratio_T[50] = 0
    values_T = k3(log_ratio_T)
    assert (values_T[log_ratio_T != 0] > 0).all()
    assert float(values_T[50]) == 0.0


def test_the_reference_adds_beta_times_the_mean_k3():
    inputs = random_inputs()
    expected = k3(inputs.policy_BT - inputs.reference_BT)[inputs.mask_BT].mean()
    torch.testing.assert_close(inputs.loss(beta=0.3).loss - inputs.loss(beta=0.0).loss, 0.3 * expected)
    same = replace(inputs, reference_BT=inputs.policy_BT)
    assert torch.equal(same.loss(beta=0.3).loss, inputs.loss(beta=0.0).loss)


def test_metrics_are_sums_over_unmasked_tokens():
    inputs = random_inputs()
    metrics = inputs.loss(beta=0.1).metrics
    log_ratio_N = (inputs.policy_BT - inputs.behavior_BT)[inputs.mask_BT]
    torch.testing.assert_close(metrics["ratio"], log_ratio_N.exp().sum())
    torch.testing.assert_close(metrics["behavior_abs"], log_ratio_N.abs().sum())
    torch.testing.assert_close(metrics["behavior_k3"], k3(-log_ratio_N).sum())
    torch.testing.assert_close(
        metrics["reference_k3"], k3(inputs.policy_BT - inputs.reference_BT)[inputs.mask_BT].sum()
    )


def test_metrics_hold_no_graph():
    inputs = random_inputs()
    output = replace(inputs, policy_BT=inputs.policy_BT.clone().requires_grad_()).loss(beta=0.1)
    assert not any(value.requires_grad for value in output.metrics.values())


@pytest.mark.parametrize("denominator", [None, 10])
def test_an_empty_mask_gives_exactly_zero(denominator):
    inputs = random_inputs()
    empty = replace(inputs, mask_BT=torch.zeros_like(inputs.mask_BT))
    loss, gradient_BT, metrics = value_and_gradient(empty, beta=0.1, denominator=denominator)
    assert float(loss) == 0.0
    assert not gradient_BT.any()
    assert all(float(value) == 0.0 for value in metrics.values())


def test_a_bandit_converges_to_its_best_arm():
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.tensor([2.0, 0.0, 0.0, -1.0], requires_grad=True)  # begins far from the best arm
    rewards_V = torch.tensor([0.2, 0.0, 1.0, 0.5])
    optimizer = torch.optim.SGD([logits_V], lr=0.3)
    for _ in range(150):
        logprobs_V = logits_V.log_softmax(dim=-1)
        arms_G = torch.multinomial(logprobs_V.detach().exp(), 16, replacement=True, generator=generator)
        advantages_G1 = group_norm(rewards_V[arms_G])[:, None]
        policy_G1 = logprobs_V[arms_G][:, None]
        optimizer.zero_grad()
        grpo(policy_G1, policy_G1.detach(), advantages_G1, torch.ones(16, 1)).loss.backward()
        optimizer.step()
    assert float(logits_V.detach().softmax(dim=-1)[2]) > 0.95
