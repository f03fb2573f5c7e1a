import copy
from dataclasses import dataclass, replace
from typing import Annotated

import pytest
import torch
from annotated_types import Gt

from grpo.algorithms.aggregation import Aggregation
from grpo.algorithms.corrections import importance_weights
from grpo.algorithms.losses import DAPO, GRPO, LOSSES, LossInputs, PerTokenLoss, PolicyLoss
from grpo.config.algorithm import CorrectionConfig, LossConfig
from grpo.config.fields import Hint
from grpo.errors import ConfigError
from grpo.learner.batch import collate, samples_of
from grpo.learner.logprobs import TokenLogprobs
from grpo.learner.objective import Objective, make_loss
from grpo.types import Batch

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
    expected = LOSSES[name]()(
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
    expected = LOSSES[name]()(logprobs_BK, proximal_BK, weighted_BK, micro.mask_BK, denominator=3.0)
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
    own = {"clip_low": 0.01, "clip_high": 0.02, "dual_clip": 1.5}
    objective = Objective(LossConfig(aggregation="fixed_horizon", horizon=7, args=own), CorrectionConfig())
    expected = GRPO(aggregation="fixed_horizon", **own)(
        logprobs_BK, micro.behavior_logprobs_BK, micro.advantages_BK, micro.mask_BK, denominator=2.0
    )
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


@dataclass(frozen=True)
class Bold(PolicyLoss):
    """A loss of one's own: the policy gradient, so many times."""

    aggregation: Aggregation = "sequence_mean"
    boldness: Annotated[float, Gt(0), Hint("0 learns nothing")] = 1.0

    def per_token(self, x: LossInputs) -> PerTokenLoss:
        loss_BT = -self.boldness * x.advantages_BT * x.policy_logprobs_BT
        return PerTokenLoss(loss_BT, x.ratio_BT, torch.zeros_like(x.mask_BT))


class Bolder(Bold):
    """Not decorated, for it has no parameters of its own."""


@dataclass
class NoLoss:
    boldness: float = 1.0


BOLD = "tests.learner.test_objective:Bold"


def test_a_loss_of_ones_own_is_named_by_its_module(micro, logprobs_BK):
    objective = Objective(LossConfig(BOLD, aggregation="token_mean", args={"boldness": 3}), CorrectionConfig())
    found = gradient(objective(logprobs_BK, micro, denominator=2.0), logprobs_BK)
    torch.testing.assert_close(found, -1.5 * micro.advantages_BK * micro.mask_BK)


def test_a_loss_of_ones_own_has_an_aggregation_of_its_own(micro, logprobs_BK):
    for name in (BOLD, BOLD + "er"):
        objective = Objective(LossConfig(name), CorrectionConfig())
        assert objective.denominator([3, 4, 0]) == 2
        lengths_B1 = micro.mask_BK.sum(dim=1, keepdim=True)
        found = gradient(objective(logprobs_BK, micro, denominator=2.0), logprobs_BK)
        torch.testing.assert_close(found, -0.5 * micro.advantages_BK * micro.mask_BK / lengths_B1)


def test_a_step_is_trained_with_a_loss_of_ones_own(make_learner, model, make_group, steps_taken):
    """On samples of the present policy all losses have the same gradient: the policy gradient, here doubled."""
    group, initial = make_group(4, [6, 2, 3], [1.2, -0.7, -0.5], seed=1), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        sampled = TokenLogprobs(model, 1.0).of_samples(samples_of(group), 1000)
    completions = [replace(c, logprobs=found) for c, found in zip(group.completions, sampled, strict=True)]
    batch = Batch([replace(group, completions=completions)])
    for loss in (LossConfig(aggregation="sequence_mean"), LossConfig(BOLD, args={"boldness": 2.0})):
        model.load_state_dict(initial)
        metrics = make_learner(loss=loss).train_step(batch)
    (one, _), (doubled, _) = steps_taken
    for grpo, bold in zip(one, doubled, strict=True):
        torch.testing.assert_close(bold, 2 * grpo, rtol=1e-4, atol=1e-6)
    assert metrics["trainer/clip_fraction"] == 0.0
    assert any(not torch.equal(parameter, initial[name]) for name, parameter in model.state_dict().items())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (LossConfig("grop"), r"loss.name: 'grop' is not one of grpo, .*, nor of the form module:function"),
        (LossConfig("nowhere:loss"), r"loss.name: can't import 'nowhere:loss'"),
        (LossConfig(BOLD + "est"), r"loss.name: can't import 'tests.learner.test_objective:Boldest'"),
        *(
            (LossConfig(f"tests.learner.test_objective:{name}"), rf"loss.name: .*:{name}' is no loss; name a subclass")
            for name in ("NoLoss", "PolicyLoss", "gradient")
        ),
        (LossConfig(args={"tau": 1.0}), r"loss.tau: no such key; it takes .*, clip_low, clip_high, dual_clip$"),
        (
            LossConfig("sapo", args={"clip_low": 1}),
            r"loss.clip_low: no such key; it takes .*, tau_negative",
        ),
        (LossConfig(args={"clip_hihg": 1.0}), r"loss.clip_hihg: no such key; did you mean loss.clip_high\?$"),
        (LossConfig(BOLD, args={"speed": 1}), r"loss.speed: no such key; it takes .*boldness$"),
        (LossConfig(BOLD, args={"boldness": 0}), r"loss.boldness: is 0, must be greater than 0: 0 learns nothing$"),
        (LossConfig(args={"clip_low": "far"}), r"loss.clip_low: is 'far', must be a number"),
        (LossConfig(args={"clip_low": -1}), r"loss.clip_low: is -1, must be at least 0"),
        (LossConfig(args={"dual_clip": 0.5}), r"loss.dual_clip: is 0.5, must be at least 1"),
        (LossConfig("reinforce", args={"max_ratio": 0.0}), r"loss.max_ratio: is 0.0, must be greater than 0"),
        (LossConfig("sapo", args={"tau_negative": 0.0}), r"loss.tau_negative: is 0.0, must be greater than 0"),
        (LossConfig("ppo_tv", args={"max_tv": -0.1}), r"loss.max_tv: is -0.1, must be at least 0"),
        (LossConfig(kl_estimator="k4"), r"loss.kl_estimator: is 'k4', must be one of k1, k2, k3"),
        (LossConfig(aggregation="mean"), r"loss.aggregation: is 'mean', must be one of token_mean, "),
        (LossConfig(horizon=0), r"loss.horizon: is 0, must be at least 1"),
        (LossConfig(beta=-1), r"loss.beta: is -1, must be at least 0"),
        *(
            (LossConfig(args={name: 1.0}), rf"loss.args.{name}: is no parameter of a single loss; set loss.{name}$")
            for name in ("aggregation", "horizon", "beta", "kl_estimator")
        ),
        *(
            (LossConfig(args={name: 1.0}), rf"loss.{name}: no such key")
            for name in ("denominator", "reference_logprobs_BT")
        ),
    ],
)
def test_what_a_loss_does_not_take_is_refused_in_one_line(loss, message):
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        Objective(loss, CorrectionConfig())
    assert "\n" not in str(caught.value)


def test_a_parameter_of_null_is_a_value():
    assert make_loss(LossConfig("dapo", args={"dual_clip": None})) == DAPO()
