"""Bandits whose best answer is known: a completion is T tokens out of V, drawn from a table of logits."""

from __future__ import annotations

import pytest
import torch

from grpo.algorithms.advantages import ADVANTAGES, BATCH_SCALED, batch_scale
from grpo.algorithms.corrections import importance_weights
from grpo.algorithms.losses import LOSSES

ARMS_V = torch.tensor([0.2, 0.0, 1.0, 0.5])
FAR_FROM_BEST_1V = torch.tensor([[2.0, 0.0, 0.0, -1.0]])
BEST_SEQUENCE_T = torch.tensor([2, 0, 1])


def reward_of_arm(tokens_NT):
    return ARMS_V[tokens_NT[:, 0]]


def share_of_right_tokens(tokens_NT):
    return (tokens_NT == BEST_SEQUENCE_T).float().mean(dim=1)


def all_tokens_right(tokens_NT):
    return (tokens_NT == BEST_SEQUENCE_T).all(dim=1).float()


def logprobs_of(logits_TV, tokens_NT):
    return logits_TV.log_softmax(dim=-1).gather(1, tokens_NT.T).T


def advantages_of(name, rewards_N, group_size):
    advantages_N = torch.cat([ADVANTAGES[name](rewards_G) for rewards_G in rewards_N.split(group_size)])
    return advantages_N * batch_scale(advantages_N) if name in BATCH_SCALED else advantages_N


def latest(policies):
    return policies[-1]


def train(logits_TV, loss, reward, *, advantages="group_norm", drawn_from=latest, correct=None, lr=3.0):
    """Three steps per batch, so that ratios move away from 1. Returns the logits, and the mean ratio of every step.

    `drawn_from` chooses, among the policies up to now, the one that answers.
    """
    generator = torch.Generator().manual_seed(0)
    logits_TV = logits_TV.clone().requires_grad_()
    optimizer = torch.optim.SGD([logits_TV], lr=lr)
    policies, ratios = [], []
    for _ in range(40):
        policies.append(logits_TV.detach().clone())
        old_TV = drawn_from(policies)
        tokens_NT = torch.multinomial(old_TV.softmax(dim=-1), 32, replacement=True, generator=generator).T
        proximal_NT, mask_NT = logprobs_of(old_TV, tokens_NT), torch.ones(tokens_NT.shape)
        advantages_NT = advantages_of(advantages, reward(tokens_NT), 16)[:, None].expand(tokens_NT.shape)
        if correct is not None:
            behavior_NT, proximal_NT = proximal_NT, logprobs_of(policies[-1], tokens_NT)
            advantages_NT = advantages_NT * importance_weights(proximal_NT, behavior_NT, mask_NT, **correct)
        for _ in range(3):
            optimizer.zero_grad()
            output = loss(logprobs_of(logits_TV, tokens_NT), proximal_NT, advantages_NT, mask_NT)
            output.loss.backward()
            optimizer.step()
            ratios.append(float(output.metrics["ratio"].mean()))
    return logits_TV.detach(), ratios


def probability(logits_TV, tokens):
    return float(logprobs_of(logits_TV, torch.tensor([tokens])).sum().exp())


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_finds_the_best_arm(name):
    logits_TV, ratios = train(FAR_FROM_BEST_1V, LOSSES[name](), reward_of_arm)
    assert probability(logits_TV, [2]) > 0.9
    assert max(abs(ratio - 1) for ratio in ratios) > 0.01, "the policy never left the behavior"


@pytest.mark.parametrize("name", ADVANTAGES)
def test_all_advantages_lead_to_the_best_arm(name):
    logits_TV, _ = train(FAR_FROM_BEST_1V, LOSSES["grpo"](), reward_of_arm, advantages=name)
    assert probability(logits_TV, [2]) > 0.9


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reward", [share_of_right_tokens, all_tokens_right])
def test_every_loss_finds_the_best_sequence(name, reward):
    logits_TV, _ = train(torch.zeros(3, 3), LOSSES[name](), reward)
    assert probability(logits_TV, BEST_SEQUENCE_T.tolist()) > 0.9


@pytest.mark.parametrize("name", ADVANTAGES)
def test_all_advantages_lead_to_the_best_sequence(name):
    logits_TV, _ = train(torch.zeros(3, 3), LOSSES["grpo"](), all_tokens_right, advantages=name)
    assert probability(logits_TV, BEST_SEQUENCE_T.tolist()) > 0.9


def eight_batches_behind(policies):
    return policies[max(0, len(policies) - 9)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_corrected_answers_of_an_old_policy_lead_to_the_best_sequence(name, level):
    correct = {"mode": "truncate", "level": level, "max_ratio": 2.0}
    logits_TV, _ = train(
        torch.zeros(3, 3),
        LOSSES[name](),
        share_of_right_tokens,
        drawn_from=eight_batches_behind,
        correct=correct,
        lr=2.0,
    )
    assert probability(logits_TV, BEST_SEQUENCE_T.tolist()) > 0.9


@pytest.mark.parametrize(
    ("correct", "arm"),
    [
        ({"mode": "truncate", "level": "token", "min_ratio": 1.0, "max_ratio": 1.0}, 3),
        ({"mode": "truncate", "level": "token", "max_ratio": 30.0}, 2),
        ({"mode": "mask", "level": "sequence", "max_ratio": 30.0}, 2),
    ],
)
def test_answers_that_are_never_the_policys_own_lead_to_the_best_arm_only_when_corrected(correct, arm):
    """The best arm is drawn so seldom that a worse one adds up to more, where all weights are one."""

    def stranger(policies):
        return torch.tensor([[0.5, 0.3, 0.04, 0.16]]).log()

    logits_TV, _ = train(
        FAR_FROM_BEST_1V,
        LOSSES["grpo"](),
        reward_of_arm,
        advantages="mean_only",
        drawn_from=stranger,
        correct=correct,
        lr=1.0,
    )
    assert int(logits_TV.argmax()) == arm
    assert probability(logits_TV, [2]) > 0.9 or arm != 2
