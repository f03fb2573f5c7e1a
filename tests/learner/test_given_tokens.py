"""Episodes of several turns: tokens that an environment gave are read by the model and otherwise have no part in it."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from learner_parts import EPISODES, episode_group

from grpo.config.algorithm import CorrectionConfig, LossConfig
from grpo.learner.batch import collate, samples_of
from grpo.learner.logprobs import TokenLogprobs
from grpo.types import Batch, Turn

PACKINGS = pytest.mark.parametrize("packing", ["auto", "never"])


def sampled_by_hand(completion):
    """Indices of the sampled tokens, counted one by one."""
    places, at = [], 0
    for turn in completion.turns:
        places += range(at, at + turn.sampled)
        at += turn.sampled + turn.given
    return places


@PACKINGS
@pytest.mark.parametrize("eos", [1, 0])  # 0 is the pad token
def test_log_probabilities_are_those_of_the_sampled_tokens_in_the_whole_conversation(
    model, slow_logprobs, packing, eos
):
    group = episode_group(eos=eos)
    samples = samples_of(group)
    logprobs = TokenLogprobs(copy.deepcopy(model), 0.7, packing)
    found = logprobs.of_samples(samples, max_tokens=1000)
    for sample, completion, found_N in zip(samples, group.completions, found, strict=True):
        every_T = slow_logprobs(model, sample.prompt_ids, sample.token_ids, 0.7).detach().numpy()
        np.testing.assert_allclose(found_N, every_T[sampled_by_hand(completion)], atol=1e-5)


@PACKINGS
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_the_gradient_is_that_of_a_loss_over_sampled_tokens_alone(
    model, make_learner, slow_logprobs, steps_taken, packing, aggregation
):
    group = episode_group()
    slow = copy.deepcopy(model).double()
    terms = []
    for completion, advantage in zip(group.completions, group.advantages, strict=True):
        every_T = slow_logprobs(slow, group.prompt.token_ids, completion.token_ids)
        new_N = every_T[sampled_by_hand(completion)]
        ratio_N = (new_N - torch.tensor(completion.logprobs).double()).exp()
        clipped_N = ratio_N.clamp(0.8, 1.2)
        terms.append(-torch.minimum(ratio_N * advantage, clipped_N * advantage))
    by_sequence = torch.stack([term_N.mean() for term_N in terms]).mean()
    loss = torch.cat(terms).mean() if aggregation == "token_mean" else by_sequence
    loss.backward()

    loss_config = LossConfig("grpo", aggregation=aggregation, args={"clip_low": 0.2, "clip_high": 0.2})
    learner = make_learner(loss=loss_config, packing=packing, micro_batch_tokens=20)
    metrics = learner.train_step(Batch([group]))
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    [(gradients, _)] = steps_taken
    for gradient, parameter in zip(gradients, slow.parameters(), strict=True):
        torch.testing.assert_close(gradient.double(), parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["grpo", "gspo", "dapo", "cispo", "reinforce"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_given_token_acts_through_attention_only(model, make_learner, steps_taken, name, level):
    """Without attention a token is only conditioned on by its neighbour: all other given tokens change nothing."""
    for layer in model.model.layers:
        layer.self_attn.forward = lambda hidden_states, **options: (torch.zeros_like(hidden_states), None)
    correction = CorrectionConfig("truncate", level=level, max_ratio=2.0)
    seen = []
    for shift in (0, 5):
        group = episode_group(reference=True)
        completions = []
        for completion in group.completions:
            tokens, sampled = completion.token_ids.copy(), set(sampled_by_hand(completion))
            for place in set(range(len(tokens))) - sampled:
                if place + 1 not in sampled:  # nothing is sampled after it
                    tokens[place] = 3 + (tokens[place] + shift) % 50
            completions.append(replace(completion, token_ids=tokens))
        learner = make_learner(copy.deepcopy(model), loss=LossConfig(name, beta=0.1), correction=correction)
        metrics = learner.train_step(Batch([replace(group, completions=completions)]))
        seen.append((metrics, steps_taken.pop()[0]))
    (first, first_gradients), (second, second_gradients) = seen
    assert first == second
    for one, other in zip(first_gradients, second_gradients, strict=True):
        assert torch.equal(one, other)


def test_everything_is_counted_in_sampled_tokens(model, make_learner):
    group = episode_group()
    samples = samples_of(group)
    counts = [sum(sampled for sampled, _ in runs) for runs in EPISODES]
    assert [sample.trained_length for sample in samples] == counts
    assert [len(sample) for sample in samples] == [4 + len(c.token_ids) for c in group.completions]
    micro = collate(samples, torch.device("cpu"))
    assert micro.mask_BK.sum(dim=1).tolist() == counts
    assert make_learner().train_step(Batch([group]))["trainer/tokens"] == sum(counts)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_two_updates_over_episodes_are_two_steps_over_the_halves(model, make_learner, name):
    groups = [episode_group(seed=seed, reference=True) for seed in range(4)]
    other, settings = copy.deepcopy(model), {"loss": LossConfig(name, beta=0.1), "lr": 3e-3}
    metrics = make_learner(updates_per_batch=2, **settings).train_step(Batch(groups))
    by_hand = make_learner(other, age_bound=1, **settings)
    halves = [by_hand.train_step(Batch(half)) for half in (groups[:2], groups[2:])]
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert np.isfinite(list(metrics.values())).all()
    assert metrics["trainer/tokens"] == sum(c.sampled_count for group in groups for c in group.completions)
    for figure in ("loss", "trainer/grad_norm", "trainer/clip_fraction", "trainer/reference_kl"):
        assert metrics[figure] == pytest.approx((halves[0][figure] + halves[1][figure]) / 2)


def test_one_turn_is_an_ordinary_completion(model, make_group, make_learner, steps_taken):
    group = make_group(3, [4, 1, 6], [1.0, -0.5, 0.1])
    as_episodes = replace(group, completions=[replace(c, turns=(Turn(len(c.token_ids)),)) for c in group.completions])
    metrics = [make_learner(copy.deepcopy(model)).train_step(Batch([each])) for each in (group, as_episodes)]
    assert metrics[0] == metrics[1]
    (one, _), (other, _) = steps_taken
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
