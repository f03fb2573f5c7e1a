from dataclasses import replace

import pytest
import torch

from grpo.algorithms.corrections import importance_weights
from grpo.algorithms.losses import LOSSES, LossOutput, grpo
from grpo.config.algorithm import CorrectionConfig, LossConfig
from grpo.errors import ConfigError
from grpo.learner.batch import collate, samples_of
from grpo.learner.objective import Objective

DECOUPLED = CorrectionConfig(mode="mask", level="token", max_ratio=5.0)


@pytest.fixture
def micro(make_group):
    group = make_group(4, [6, 1, 3], [1.2, -0.7, -0.5], seed=1)
    return collate(samples_of(group), torch.device("cpu"))


@pytest.fixture
def logprobs_BK(micro):
    generator = torch.Generator().manual_seed(0)
    return (micro.behavior_logprobs_BK + 0.3 * torch.randn(micro.mask_BK.shape, generator=generator)).requires_grad_()


def gradient(output, logprobs_BK):
    (found_BK,) = torch.autograd.grad(output.loss, logprobs_BK)
    return found_BK


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_correction_the_ratio_is_to_the_policy_that_sampled(name, micro, logprobs_BK):
    found = Objective(LossConfig(name), CorrectionConfig())(logprobs_BK, micro, denominator=3.0)
    expected = LOSSES[name](
        logprobs_BK, micro.behavior_logprobs_BK, micro.advantages_BK, micro.mask_BK, denominator=3.0
    )
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(gradient(found, logprobs_BK), gradient(expected, logprobs_BK))


@pytest.mark.parametrize("name", LOSSES)
def test_with_one_the_ratio_is_to_the_proximal_policy_and_the_advantages_are_weighted(name, micro, logprobs_BK):
    proximal_BK = micro.behavior_logprobs_BK + 0.2
    found = Objective(LossConfig(name), DECOUPLED)(
        logprobs_BK, replace(micro, proximal_logprobs_BK=proximal_BK), denominator=3.0
    )
    weights_BK = importance_weights(
        proximal_BK, micro.behavior_logprobs_BK, micro.mask_BK, mode="mask", level="token", max_ratio=5.0
    )
    weighted_BK = micro.advantages_BK * weights_BK
    expected = LOSSES[name](logprobs_BK, proximal_BK, weighted_BK, micro.mask_BK, denominator=3.0)
    assert torch.equal(gradient(found, logprobs_BK), gradient(expected, logprobs_BK))


def test_before_the_first_update_the_policy_is_the_proximal_one(micro, logprobs_BK):
    found = Objective(LossConfig(), DECOUPLED)(logprobs_BK, micro, denominator=1.0)
    ratio_BK = (logprobs_BK.detach() - micro.behavior_logprobs_BK).exp()
    expected_BK = -ratio_BK * micro.advantages_BK * micro.mask_BK  # the policy gradient, importance-weighted
    torch.testing.assert_close(gradient(found, logprobs_BK), expected_BK)
    assert not found.metrics["clip_fraction"].any()


def test_the_kl_term_is_not_weighted(micro, logprobs_BK):
    reference_BK = micro.behavior_logprobs_BK - 0.4
    micro = replace(micro, reference_logprobs_BK=reference_BK, advantages_BK=torch.zeros(micro.mask_BK.shape))
    results = [
        Objective(LossConfig(beta=0.1), correction)(logprobs_BK, micro, 1.0)
        for correction in (CorrectionConfig(), DECOUPLED)
    ]
    plain, corrected = (gradient(result, logprobs_BK) for result in results)
    assert plain.any()
    assert torch.equal(plain, corrected)


def test_the_parameters_of_the_config_reach_the_loss(micro, logprobs_BK):
    loss = LossConfig(clip_low=0.01, clip_high=0.02, dual_clip=1.5, aggregation="fixed_horizon", horizon=7)
    objective = Objective(loss, CorrectionConfig())
    expected = grpo(
        logprobs_BK, micro.behavior_logprobs_BK, micro.advantages_BK, micro.mask_BK,
        clip_low=0.01, clip_high=0.02, dual_clip=1.5, aggregation="fixed_horizon", denominator=2.0,
    )  # fmt: skip
    assert torch.equal(objective(logprobs_BK, micro, 2.0).loss, expected.loss)
    assert objective.denominator([3, 4, 0]) == 21


@pytest.mark.parametrize(
    ("name", "expected"), [("grpo", 7), ("gspo", 2), ("sapo", 2), ("dr_grpo", 3 * 4), ("cispo", 7)]
)
def test_a_loss_has_an_aggregation_of_its_own(name, expected):
    assert Objective(LossConfig(name), CorrectionConfig()).denominator([3, 4, 0]) == expected


def test_advantages_in_units_of_the_batch_are_scaled_when_it_is_there():
    plain, scaled = (
        Objective(LossConfig(advantages=name), CorrectionConfig()) for name in ("group_norm", "global_norm")
    )
    advantages_N = [0.5, -0.5, 0.25, -0.25]
    unflatten = float(torch.tensor(advantages_N, dtype=torch.float64).std())
    assert plain.advantage_scale(advantages_N) == 1
    assert scaled.advantage_scale(advantages_N) == pytest.approx(1 / (unflatten + 1e-4), rel=1e-6)


def test_a_reference_is_what_makes_zero_advantages_worth_training_on():
    assert [Objective(LossConfig(beta=beta), CorrectionConfig()).trains_zero_advantage for beta in (0, 0.1)] == [
        False,
        True,
    ]


def test_it_says_what_the_correction_does(micro, logprobs_BK):
    assert "correction_weight" not in Objective(LossConfig(), CorrectionConfig())(logprobs_BK, micro, 1.0).metrics
    ratio_BK = (logprobs_BK.detach() - micro.behavior_logprobs_BK).exp()
    outside_BK = (ratio_BK > 1.1) & micro.mask_BK
    assert 0 < outside_BK.sum() < micro.mask_BK.sum()
    for weights, moved_to in (("truncate", 1.1), ("mask", 0.0)):
        correction = CorrectionConfig(weights, max_ratio=1.1)
        said = Objective(LossConfig(), correction)(logprobs_BK, micro, 1.0).metrics
        assert torch.equal(said["is_clip_fraction"][micro.mask_BK], outside_BK[micro.mask_BK])
        expected_BK = ratio_BK.masked_fill(outside_BK, moved_to)
        torch.testing.assert_close(said["correction_weight"][micro.mask_BK], expected_BK[micro.mask_BK])


def short(policy_logprobs_BT, behavior_logprobs_BT, advantages_BT, mask_BT, *, denominator):
    """Lacks what every loss is given."""


def bold(policy_logprobs_BT, behavior_logprobs_BT, advantages_BT, mask_BT, *, boldness=1.0, **common):
    return LossOutput(-boldness * (policy_logprobs_BT * mask_BT).sum() / common["denominator"], {})


def test_a_loss_of_ones_own_is_named_by_its_module(micro, logprobs_BK):
    loss = LossConfig("tests.learner.test_objective:bold", args={"boldness": 3.0})
    found = Objective(loss, CorrectionConfig())(logprobs_BK, micro, denominator=2.0)
    torch.testing.assert_close(gradient(found, logprobs_BK), -1.5 * micro.mask_BK.float())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (LossConfig("grop"), r"loss.name: 'grop' is not one of grpo, .*, nor of the form module:function"),
        (LossConfig("nowhere:loss"), r"loss.name: can't import 'nowhere:loss'"),
        (LossConfig(tau_positive=1.0), r"loss.tau_positive: the loss grpo takes no such parameter, but clip_low, "),
        (LossConfig("sapo", clip_low=0.1), r"loss.clip_low: the loss sapo takes .*but tau_positive, tau_negative"),
        (
            LossConfig("tests.learner.test_objective:short"),
            r"loss.name: .*short' can't be called as .*losses.py says: ",
        ),
        (LossConfig(args={"clip_low": 0.1}), r"loss.args.clip_low: is a key of its own: loss.clip_low"),
        (LossConfig(args={"boldness": 2}), r"loss.args.boldness: the loss grpo takes no such parameter"),
    ],
)
def test_what_a_loss_does_not_take_is_refused(loss, message):
    with pytest.raises(ConfigError, match=message):
        Objective(loss, CorrectionConfig())
