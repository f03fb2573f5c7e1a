"""Losses as slow loops over Python floats, with derivatives by the policy's log-probabilities worked out by hand.

Nothing is clamped for the sake of floating point: the ratios must be moderate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

AGGREGATION = {
    "grpo": "token_mean",
    "dr_grpo": "fixed_horizon",
    "dapo": "token_mean",
    "gspo": "sequence_mean",
    "cispo": "token_mean",
    "sapo": "sequence_mean",
    "reinforce": "token_mean",
    "ppo_tv": "token_mean",
}


@dataclass(frozen=True)
class Token:
    policy: float
    behavior: float
    advantage: float

    @property
    def ratio(self):
        return math.exp(self.policy - self.behavior)


@dataclass(frozen=True)
class Term:
    """What a token adds to the loss; `slope` is the derivative by its own log-probability, or by the log of `ratio`."""

    value: float
    slope: float
    ratio: float
    cut: bool


def clipped(ratio, advantage, clip_low, clip_high, dual_clip=None):
    if advantage > 0 and ratio > 1 + clip_high:
        return Term(-(1 + clip_high) * advantage, 0.0, ratio, True)
    if advantage < 0 and ratio < 1 - clip_low:
        return Term(-(1 - clip_low) * advantage, 0.0, ratio, True)
    if advantage < 0 and dual_clip is not None and ratio > dual_clip:
        return Term(-dual_clip * advantage, 0.0, ratio, True)
    return Term(-ratio * advantage, -ratio * advantage, ratio, False)


def grpo(token, clip_low=0.2, clip_high=0.2, dual_clip=None):
    return clipped(token.ratio, token.advantage, clip_low, clip_high, dual_clip)


def dapo(token, clip_low=0.2, clip_high=0.28, dual_clip=None):
    return clipped(token.ratio, token.advantage, clip_low, clip_high, dual_clip)


def weighted(token, weight):
    """Policy gradient with a weight that counts as a constant."""
    slope = -weight * token.advantage
    return Term(slope * token.policy, slope, token.ratio, weight != token.ratio)


def cispo(token, clip_low=1.0, clip_high=4.0):
    return weighted(token, min(max(token.ratio, 1 - clip_low), 1 + clip_high))


def reinforce(token, max_ratio=2.0):
    return weighted(token, min(token.ratio, max_ratio))


def sapo(token, tau_positive=1.0, tau_negative=1.05):
    tau = tau_positive if token.advantage > 0 else tau_negative
    gate = 1 / (1 + math.exp(-tau * (token.ratio - 1)))
    slope = 4 * gate * (1 - gate) * token.ratio  # the taus of 4 / tau and of the chain rule cancel
    return Term(-4 / tau * gate * token.advantage, -slope * token.advantage, token.ratio, False)


def ppo_tv(token, max_tv=0.2):
    gone = math.exp(token.policy) - math.exp(token.behavior)
    if (token.advantage > 0 and gone > max_tv) or (token.advantage < 0 and gone < -max_tv):
        return Term(0.0, 0.0, token.ratio, True)
    return Term(-token.ratio * token.advantage, -token.ratio * token.advantage, token.ratio, False)


TOKEN_LOSSES = {
    "grpo": grpo,
    "dr_grpo": grpo,
    "dapo": dapo,
    "cispo": cispo,
    "sapo": sapo,
    "reinforce": reinforce,
    "ppo_tv": ppo_tv,
}


def gspo(tokens, clip_low=3e-4, clip_high=4e-4):
    ratio = math.exp(sum(token.policy - token.behavior for token in tokens) / len(tokens))
    return [clipped(ratio, token.advantage, clip_low, clip_high) for token in tokens]


def terms_of(name, tokens, own):
    """The terms of the tokens of a row. GSPO-token has the gradient of a term go to the token's own log-probability."""
    if name == "gspo":
        return gspo(tokens, **own)
    return [TOKEN_LOSSES[name](token, **own) for token in tokens]


def slow_kl(kl, difference):
    """Value and derivative by the policy's log-probability, from log(policy / reference)."""
    if kl == "k1":
        return difference, 1.0
    if kl == "k2":
        return difference**2 / 2, difference
    return math.exp(-difference) - 1 + difference, 1 - math.exp(-difference)


def slow_weights(mask, aggregation, denominator=None, horizon=None):
    """The factor of every token in the aggregate: the aggregate is the sum of factor times value."""
    lengths = [sum(1 for on in row if on) for row in mask]
    if denominator is None:
        denominator = {
            "token_mean": sum(lengths),
            "sequence_mean": sum(1 for length in lengths if length > 0),
            "fixed_horizon": len(mask) * (horizon or len(mask[0])),
        }[aggregation]
    weights = [[0.0 for _ in row] for row in mask]
    for b, row in enumerate(mask):
        for t, on in enumerate(row):
            if on:
                weights[b][t] = 1 / denominator / (lengths[b] if aggregation == "sequence_mean" else 1)
    return weights


def slow_loss(
    name,
    policy,
    behavior,
    advantages,
    mask,
    reference=None,
    *,
    denominator=None,
    aggregation=None,
    horizon=None,
    beta=0.0,
    kl_estimator="k3",
    **own,
):
    """Value of the loss, its gradient and its metrics; the arguments are lists of rows."""
    weights = slow_weights(mask, aggregation or AGGREGATION[name], denominator, horizon)
    loss, gradient = 0.0, [[0.0 for _ in row] for row in policy]
    metrics = {"ratio": 0.0, "clip_fraction": 0.0}
    if reference is not None:
        metrics["reference_kl"] = 0.0
    for b, row in enumerate(mask):
        places = [t for t, on in enumerate(row) if on]
        if not places:
            continue
        tokens = [Token(policy[b][t], behavior[b][t], advantages[b][t]) for t in places]
        terms = terms_of(name, tokens, own)
        for i, t in enumerate(places):
            loss += weights[b][t] * terms[i].value
            gradient[b][t] += weights[b][t] * terms[i].slope
            metrics["ratio"] += terms[i].ratio
            metrics["clip_fraction"] += terms[i].cut
            if reference is not None:
                value, slope = slow_kl(kl_estimator, policy[b][t] - reference[b][t])
                loss += beta * weights[b][t] * value
                gradient[b][t] += beta * weights[b][t] * slope
                metrics["reference_kl"] += value
    return loss, gradient, metrics
