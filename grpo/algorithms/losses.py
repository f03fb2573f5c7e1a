"""Policy losses: pure functions of log-probabilities. Add one: write the function, put it into LOSSES.

All tensors are [B, T] over B sequences of T padded tokens, log-probabilities in nats: `policy_logprobs_BT` carries the
gradient; `behavior_logprobs_BT` is what the ratio r = exp(policy - behavior) is taken to: the policy that sampled, or,
with an off-policy correction, the one at the start of the train step; `advantages_BT` repeats the completion's
advantage; `mask_BT` is 1 where a token is trained on. What stands in masked places has no influence, NaN included.

A loss falls when a token of positive advantage becomes likelier. All of them take, besides parameters of their own,

    aggregation, denominator, horizon   how tokens become one number: see grpo/algorithms/aggregation.py
    reference_logprobs_BT, beta, kl     beta times the KL divergence from the reference per token is added: see `KL`

and return a scalar to call `backward` on, with metrics per token: `ratio`, `clip_fraction` (1 where the loss clips the
ratio or cuts the token off) and, given a reference, `reference_kl`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from grpo.algorithms.aggregation import aggregate

_LARGEST_LOG_RATIO = 20.0  # exp of more would overflow into NaN gradients; no ratio that means anything comes near it


@dataclass(frozen=True)
class LossOutput:
    """`loss` is a scalar with a gradient; `metrics` by name are [B, T] without one, 0 in masked places."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Common(TypedDict, total=False):
    """The parameters that every loss takes."""

    reference_logprobs_BT: Tensor | None
    denominator: float | Tensor | None
    horizon: int | None
    beta: float
    kl: str


def grpo(
    policy_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "token_mean",
    **common: Unpack[Common],
) -> LossOutput:
    """The clipped token ratio: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), mean over tokens.

    `dual_clip` c > 1 bounds the loss of bad answers that have become much likelier: where A < 0 it is at most -c A
    (arXiv:1912.09729, equation 5). (DeepSeekMath, arXiv:2402.03300, equation 3, which is `sequence_mean`; the clip is
    PPO's, arXiv:1707.06347.)
    """
    log_ratio_BT = _log_ratio(policy_logprobs_BT, behavior_logprobs_BT, mask_BT)
    advantages_BT = _masked(advantages_BT, mask_BT)
    token_loss_BT, cut_BT = _clipped(log_ratio_BT.exp(), advantages_BT, clip_low, clip_high, dual_clip)
    return _output(token_loss_BT, log_ratio_BT, cut_BT, policy_logprobs_BT, mask_BT, aggregation, **common)


def dr_grpo(
    policy_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregation: str = "fixed_horizon",
    **common: Unpack[Common],
) -> LossOutput:
    """GRPO without its bias by length: the sum over tokens is divided by a fixed horizon.

    Belongs with the advantages `mean_only`. (Dr. GRPO, arXiv:2503.20783, section 3.2.)
    """
    return grpo(
        policy_logprobs_BT, behavior_logprobs_BT, advantages_BT, mask_BT,
        clip_low=clip_low, clip_high=clip_high, aggregation=aggregation, **common,
    )  # fmt: skip


def dapo(
    policy_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    aggregation: str = "token_mean",
    **common: Unpack[Common],
) -> LossOutput:
    """GRPO with more room upwards, so that unlikely tokens can become likely and the entropy stays up; token mean.

    The paper's other parts are `filter.zero_advantage` and `shaping.overlong`. The dual clip is not in it, but in many
    of its implementations, hence in configs/loss/dapo.yaml. (DAPO, arXiv:2503.14476, sections 3.1 and 3.3.)
    """
    return grpo(
        policy_logprobs_BT, behavior_logprobs_BT, advantages_BT, mask_BT,
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, aggregation=aggregation, **common,
    )  # fmt: skip


def gspo(
    policy_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    aggregation: str = "sequence_mean",
    **common: Unpack[Common],
) -> LossOutput:
    """GRPO with one ratio for the whole sequence, s = exp(mean of log r over its tokens), clipped; mean over sequences.

    s stays much closer to 1 than r, hence the narrow clip. The gradient of s goes to each token by itself, so that
    advantages, or importance weights, may differ within a sequence; where they don't, it is that of the sequence.
    (GSPO, arXiv:2507.18071, section 4.3: GSPO-token.)
    """
    mask_BT = mask_BT.bool()
    log_ratio_BT = _log_ratio(policy_logprobs_BT, behavior_logprobs_BT, mask_BT)
    log_ratio_B1 = log_ratio_BT.sum(dim=1, keepdim=True) / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    log_ratio_BT = log_ratio_B1.detach() + _masked(policy_logprobs_BT - policy_logprobs_BT.detach(), mask_BT)
    advantages_BT = _masked(advantages_BT, mask_BT)
    token_loss_BT, cut_BT = _clipped(log_ratio_BT.exp(), advantages_BT, clip_low, clip_high)
    return _output(token_loss_BT, log_ratio_BT, cut_BT, policy_logprobs_BT, mask_BT, aggregation, **common)


def cispo(
    policy_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
    aggregation: str = "token_mean",
    **common: Unpack[Common],
) -> LossOutput:
    """REINFORCE weighted by the ratio, clipped and without gradient: -clip(r, 1 - clip_low, 1 + clip_high) A log p.

    Every token keeps a gradient, the rare ones on which a chain of thought turns included. `clip_low` 1 is no lower
    bound, as in the paper. (CISPO of MiniMax-M1, arXiv:2506.13585, equations 4 and 5.)
    """
    log_ratio_BT = _log_ratio(policy_logprobs_BT, behavior_logprobs_BT, mask_BT)
    ratio_BT = log_ratio_BT.detach().exp()
    weights_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    token_loss_BT = -weights_BT * _masked(advantages_BT, mask_BT) * _masked(policy_logprobs_BT, mask_BT)
    cut_BT = weights_BT != ratio_BT
    return _output(token_loss_BT, log_ratio_BT, cut_BT, policy_logprobs_BT, mask_BT, aggregation, **common)


def sapo(
    policy_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    aggregation: str = "sequence_mean",
    **common: Unpack[Common],
) -> LossOutput:
    """A soft gate in place of the clip: -f(r) A with f(r) = 4 / tau sigmoid(tau (r - 1)); mean over sequences.

    The gradient is the policy gradient at r = 1 and fades on both sides, faster with a larger tau: `tau_positive`
    where A > 0, `tau_negative` elsewhere. (SAPO, arXiv:2511.20347.)
    """
    log_ratio_BT = _log_ratio(policy_logprobs_BT, behavior_logprobs_BT, mask_BT)
    advantages_BT = _masked(advantages_BT, mask_BT)
    tau_BT = torch.full_like(log_ratio_BT, tau_negative).masked_fill(advantages_BT > 0, tau_positive)
    gate_BT = 4 / tau_BT * torch.sigmoid(tau_BT * (log_ratio_BT.exp() - 1))
    token_loss_BT, cut_BT = -gate_BT * advantages_BT, torch.zeros_like(mask_BT)
    return _output(token_loss_BT, log_ratio_BT, cut_BT, policy_logprobs_BT, mask_BT, aggregation, **common)


def reinforce(
    policy_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    max_ratio: float = 2.0,
    aggregation: str = "token_mean",
    **common: Unpack[Common],
) -> LossOutput:
    """The policy gradient with a clamped importance weight: -min(r, max_ratio) A log p, the weight without gradient.

    (Williams 1992; the weight as in IMPALA, arXiv:1802.01561, section 4.)
    """
    log_ratio_BT = _log_ratio(policy_logprobs_BT, behavior_logprobs_BT, mask_BT)
    ratio_BT = log_ratio_BT.detach().exp()
    weights_BT = ratio_BT.clamp(max=max_ratio)
    token_loss_BT = -weights_BT * _masked(advantages_BT, mask_BT) * _masked(policy_logprobs_BT, mask_BT)
    cut_BT = ratio_BT > max_ratio
    return _output(token_loss_BT, log_ratio_BT, cut_BT, policy_logprobs_BT, mask_BT, aggregation, **common)


def ppo_tv(
    policy_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    max_tv: float = 0.2,
    aggregation: str = "token_mean",
    **common: Unpack[Common],
) -> LossOutput:
    """The ratio -r A within a trust region of probabilities: no gradient where the policy has gone far enough.

    A token is cut off when its probability has moved by more than `max_tv` in the direction that A pushes. That is
    the total variation between the two policies seen as "this token or another". A ratio says little for a rare token,
    which the clip of PPO stops too early, and for a likely one, which it stops too late.
    (DPPO, arXiv:2602.04879, its variant Binary-TV.)
    """
    log_ratio_BT = _log_ratio(policy_logprobs_BT, behavior_logprobs_BT, mask_BT)
    advantages_BT = _masked(advantages_BT, mask_BT)
    behavior_BT = _masked(behavior_logprobs_BT, mask_BT).exp()
    moved_BT = behavior_BT * (log_ratio_BT.detach().exp() - 1)
    cut_BT = moved_BT * advantages_BT.sign() > max_tv
    token_loss_BT = (-log_ratio_BT.exp() * advantages_BT).masked_fill(cut_BT, 0.0)
    return _output(token_loss_BT, log_ratio_BT, cut_BT, policy_logprobs_BT, mask_BT, aggregation, **common)


def k1(log_ratio_BT: Tensor) -> Tensor:
    """log(p / reference): unbiased, but its gradient has mean zero on samples of the policy: to look at."""
    return log_ratio_BT


def k2(log_ratio_BT: Tensor) -> Tensor:
    """log(p / reference)² / 2: biased, but its gradient is the divergence's own on samples of the policy."""
    return log_ratio_BT**2 / 2


def k3(log_ratio_BT: Tensor) -> Tensor:
    """reference / p - 1 - log(reference / p): unbiased, never negative, of low variance."""
    return torch.exp(-log_ratio_BT) - 1 + log_ratio_BT


KL: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""Estimates of KL(policy || reference) per token from log(p / reference). (Schulman, Approximating KL Divergence.)"""

LOSSES: dict[str, Callable[..., LossOutput]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "reinforce": reinforce,
    "ppo_tv": ppo_tv,
}


def _clipped(
    ratio_BT: Tensor, advantages_BT: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic loss per token, and where it has no gradient."""
    plain_BT = -ratio_BT * advantages_BT
    clipped_BT = -ratio_BT.clamp(1 - clip_low, 1 + clip_high) * advantages_BT
    loss_BT, cut_BT = torch.maximum(plain_BT, clipped_BT), clipped_BT > plain_BT
    if dual_clip is not None:
        most_BT = -dual_clip * advantages_BT
        over_BT = (advantages_BT < 0) & (loss_BT > most_BT)
        loss_BT, cut_BT = torch.where(over_BT, most_BT, loss_BT), cut_BT | over_BT
    return loss_BT, cut_BT


def _log_ratio(policy_logprobs_BT: Tensor, behavior_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    difference_BT = _masked(policy_logprobs_BT - behavior_logprobs_BT, mask_BT)
    return difference_BT.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)


def _masked(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return values_BT.masked_fill(~mask_BT.bool(), 0.0)


def _output(
    token_loss_BT: Tensor,
    log_ratio_BT: Tensor,
    cut_BT: Tensor,
    policy_logprobs_BT: Tensor,
    mask_BT: Tensor,
    aggregation: str,
    *,
    reference_logprobs_BT: Tensor | None = None,
    denominator: float | Tensor | None = None,
    horizon: int | None = None,
    beta: float = 0.0,
    kl: str = "k3",
) -> LossOutput:
    metrics = {"ratio": log_ratio_BT.exp(), "clip_fraction": cut_BT.to(log_ratio_BT.dtype)}
    if reference_logprobs_BT is not None:
        kl_BT = KL[kl](_log_ratio(policy_logprobs_BT, reference_logprobs_BT, mask_BT))
        token_loss_BT = token_loss_BT + beta * kl_BT
        metrics["reference_kl"] = kl_BT
    loss = aggregate(token_loss_BT, mask_BT, aggregation, denominator=denominator, horizon=horizon)
    return LossOutput(loss, {name: _masked(value_BT.detach(), mask_BT) for name, value_BT in metrics.items()})
