"""Several optimizer steps over one batch."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from grpo.config.algorithm import CorrectionConfig, LossConfig
from grpo.errors import NonFiniteError
from grpo.learner.batch import samples_of
from grpo.learner.logprobs import TokenLogprobs
from grpo.types import Batch

DECOUPLED = CorrectionConfig(mode="mask", level="token", max_ratio=None)


@pytest.fixture
def groups(make_group):
    return [make_group(4, [6, 2, 3], [1.2, -0.7, -0.5], seed=seed) for seed in range(4)]


def weights(learner):
    return [parameter.detach().clone() for parameter in learner.model.parameters()]


@pytest.mark.parametrize("name", ["grpo", "gspo", "dr_grpo"])
def test_two_updates_over_a_batch_are_two_steps_over_its_halves(make_learner, model, groups, name):
    other, loss = copy.deepcopy(model), LossConfig(name)
    learner = make_learner(loss=loss, updates_per_batch=2)
    metrics = learner.train_step(Batch(groups))
    by_hand = make_learner(other, loss=loss, age_bound=1)
    halves = [by_hand.train_step(Batch(half)) for half in (groups[:2], groups[2:])]
    assert all(map(torch.equal, weights(learner), weights(by_hand)))
    assert (learner.version, by_hand.version) == (1, 2)
    for name in ("loss", "trainer/grad_norm", "trainer/clip_fraction"):
        assert metrics[name] == pytest.approx((halves[0][name] + halves[1][name]) / 2)


def test_groups_stay_whole_and_every_one_is_trained_on_once(make_learner, groups, steps_taken):
    metrics = make_learner(updates_per_batch=3).train_step(Batch(groups))
    assert len(steps_taken) == 3
    assert metrics["trainer/tokens"] == sum(len(c.token_ids) for group in groups for c in group.completions)


def test_after_the_first_update_the_clip_has_work_to_do(make_learner, groups):
    """Fresh samples: only what the updates before have changed can leave the clip range."""
    fresh = [with_logprobs(group, make_learner(updates_per_batch=1)) for group in groups]
    once = make_learner(lr=0.0, updates_per_batch=4).train_step(Batch(fresh))
    assert (once["trainer/clip_fraction"], once["trainer/ratio_mean"]) == (0, pytest.approx(1, abs=1e-5))
    moved = make_learner(lr=3e-3, updates_per_batch=4).train_step(Batch(fresh))
    assert moved["trainer/clip_fraction"] > 0.05


def with_logprobs(group, learner):
    """The same completions as the learner's present policy would have drawn them."""

    found = TokenLogprobs(learner.model, 1.0).of_samples(samples_of(group), 10_000)
    completions = [replace(c, logprobs=logprobs) for c, logprobs in zip(group.completions, found, strict=True)]
    return replace(group, completions=completions)


def test_a_correction_sees_the_policy_at_the_start_of_the_step_in_every_update(
    make_learner, model, groups, slow_logprobs, monkeypatch
):
    start, seen = copy.deepcopy(model), []
    learner = make_learner(lr=3e-3, correction=DECOUPLED, updates_per_batch=2)
    objective = learner._objective

    def watched(logprobs_BK, micro, denominator):
        seen.append(micro)
        return objective(logprobs_BK, micro, denominator)

    monkeypatch.setattr(learner, "_objective", Watched(objective, watched))
    learner.train_step(Batch(groups))
    first, second = seen
    assert first.proximal_logprobs_BK is None  # it is the policy itself
    found = sorted(second.proximal_logprobs_BK[second.mask_BK].tolist())
    with torch.no_grad():
        expected = [
            slow_logprobs(start, group.prompt.token_ids, c.token_ids).numpy()
            for group in groups[2:]
            for c in group.completions
        ]
    np.testing.assert_allclose(found, sorted(np.concatenate(expected).tolist()), atol=1e-4)


class Watched:
    def __init__(self, objective, call):
        self._objective, self._call = objective, call

    def __getattr__(self, name):
        return getattr(self._objective, name)

    def __call__(self, *args):
        return self._call(*args)


def test_the_mismatch_is_that_of_the_start_of_the_step_where_it_is_known(make_learner, groups):
    still = make_learner(lr=0.0, correction=DECOUPLED, updates_per_batch=2).train_step(Batch(groups))
    moved = make_learner(lr=3e-3, correction=DECOUPLED, updates_per_batch=2).train_step(Batch(groups))
    for name in ("mismatch/kl_k3", "mismatch/ess", "mismatch/logprob_abs_diff_same_version"):
        assert moved[name] == pytest.approx(still[name], rel=1e-4)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gspo", "sapo", "cispo"])
@pytest.mark.parametrize("correction", [CorrectionConfig(), DECOUPLED])
def test_the_split_into_micro_batches_does_not_matter(make_learner, model, groups, steps_taken, name, correction):
    initial, results = copy.deepcopy(model.state_dict()), []
    for micro_batch_tokens in (10_000, 24, 1):
        model.load_state_dict(initial)
        learner = make_learner(loss=LossConfig(name), correction=correction, micro_batch_tokens=micro_batch_tokens)
        results.append(learner.train_step(Batch(groups)))
    (whole, _), *others = steps_taken
    scale = max(float(gradient.abs().max()) for gradient in whole)
    for gradients, _ in others:
        for a, b in zip(gradients, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * scale)
    for metrics in results:
        assert metrics == pytest.approx(results[0], rel=1e-4)


def test_masked_completions_cost_no_forward_pass_and_do_not_count(
    make_learner, model, make_group, rows_seen, steps_taken
):

    group = make_group(4, [6, 2, 3], [1.2, -0.7, -0.5], seed=1)
    initial = copy.deepcopy(model.state_dict())
    metrics = make_learner().train_step(Batch([replace(group, masked=(0,))]))
    model.load_state_dict(initial)
    without = replace(group, completions=group.completions[1:], advantages=group.advantages[1:])
    expected = make_learner().train_step(Batch([without]))
    assert rows_seen == [2, 2]
    assert metrics["trainer/tokens"] == 5
    assert metrics["loss"] == pytest.approx(expected["loss"])
    (masked, _), (left_out, _) = steps_taken
    assert all(map(torch.equal, masked, left_out))


def test_a_batch_of_masked_completions_changes_nothing(make_learner, model, make_group):

    before = [parameter.detach().clone() for parameter in model.parameters()]
    group = replace(make_group(4, [6, 2], [1.0, -1.0]), masked=(0, 1))
    metrics = make_learner(weight_decay=0.1).train_step(Batch([group]))
    assert metrics["loss"] == metrics["trainer/tokens"] == 0
    assert all(map(torch.equal, model.parameters(), before))


def test_a_share_without_signal_in_the_middle_is_no_update(make_learner, model, make_group, steps_taken):
    first, idle, last = (
        make_group(4, [6, 2], advantages, seed=seed)
        for seed, advantages in enumerate([[1.0, -1.0], [0.0, 0.0], [0.7, -0.7]])
    )
    initial = copy.deepcopy(model.state_dict())
    with_idle = make_learner(updates_per_batch=3)
    metrics = with_idle.train_step(Batch([first, idle, last]))
    found = weights(with_idle)
    model.load_state_dict(initial)
    without = make_learner(updates_per_batch=2)
    expected = without.train_step(Batch([first, last]))
    assert len(steps_taken) == 4
    assert all(map(torch.equal, found, weights(without)))
    for name in ("loss", "trainer/grad_norm", "trainer/entropy"):
        assert metrics[name] == expected[name]


def test_an_update_of_nothing_does_not_hide_those_that_are_not_finite(make_learner, make_group):
    broken = make_group(4, [6, 2], [1.0, -1.0])
    idle = make_group(4, [6, 2], [0.0, 0.0], seed=1)
    learner = make_learner(updates_per_batch=2, max_nonfinite_steps=1, age_bound=1)
    broken = replace(broken, advantages=(float("nan"), 1.0))
    learner.train_step(Batch([broken, idle]))
    with pytest.raises(NonFiniteError, match="2 updates in a row"):
        learner.train_step(Batch([broken, idle]))


def test_in_bfloat16_every_update_has_the_gradient_of_every_parameter(make_learner, groups, steps_taken):
    """A forward pass without gradients comes before: what it has cast must not be used again."""
    learner = make_learner(lr=0.0, correction=DECOUPLED, updates_per_batch=2, dtype=torch.bfloat16)
    metrics = learner.train_step(Batch(groups))
    assert [len(gradients) for gradients, _ in steps_taken] == 2 * [len(list(learner.model.parameters()))]
    assert all(gradient.any() for gradients, _ in steps_taken for gradient in gradients)
    assert metrics["trainer/ratio_mean"] == pytest.approx(1, abs=1e-6)  # both passes compute alike
