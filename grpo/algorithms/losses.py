"""Policy losses: pure functions of log-probabilities. Add one: write what it is per token, put it into LOSSES.

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

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor

from grpo.algorithms.aggregation import aggregate
from grpo.algorithms.corrections import bounded, log_ratio

SHARED_PARAMETERS = ("reference_logprobs_BT", "denominator", "aggregation", "horizon", "beta", "kl")


@dataclass(frozen=True)
class LossOutput:
    """`loss` is a scalar with a gradient; `metrics` by name are [B, T] without one, 0 in masked places."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Tokens(NamedTuple):
    """What a loss is made of, all [B, T] and 0 in masked places; `mask_BT` is boolean."""

    logprobs_BT: Tensor
    behavior_logprobs_BT: Tensor
    log_ratio_BT: Tensor
    advantages_BT: Tensor
    mask_BT: Tensor

    @property
    def ratio_BT(self) -> Tensor:
        return self.log_ratio_BT.exp()


class Terms(NamedTuple):
    """The loss of every token, its ratio, and whether that was clipped or the token cut off."""

    loss_BT: Tensor
    ratio_BT: Tensor
    cut_BT: Tensor


def policy_loss(aggregation: str) -> Callable[[Callable[..., Terms]], Callable[..., LossOutput]]:
    """Make a loss, as described above, of its terms per token; `aggregation` is what it takes by default."""

    def decorate(terms_of: Callable[..., Terms]) -> Callable[..., LossOutput]:
        @wraps(terms_of)
        def loss(
            policy_logprobs_BT: Tensor,
            behavior_logprobs_BT: Tensor,
            advantages_BT: Tensor,
            mask_BT: Tensor,
            *,
            reference_logprobs_BT: Tensor | None = None,
            denominator: float | Tensor | None = None,
            aggregation: str = aggregation,
            horizon: int | None = None,
            beta: float = 0.0,
            kl: str = "k3",
            **own: float | None,
        ) -> LossOutput:
            mask_BT = mask_BT.bool()
            tokens = Tokens(
                _masked(policy_logprobs_BT, mask_BT),
                _masked(behavior_logprobs_BT, mask_BT),
                bounded(log_ratio(policy_logprobs_BT, behavior_logprobs_BT, mask_BT)),
                _masked(advantages_BT, mask_BT),
                mask_BT,
            )
            loss_BT, ratio_BT, cut_BT = terms_of(tokens, **own)
            metrics = {"ratio": ratio_BT, "clip_fraction": cut_BT.to(ratio_BT.dtype)}
            if reference_logprobs_BT is not None:
                kl_BT = KL[kl](bounded(log_ratio(policy_logprobs_BT, reference_logprobs_BT, mask_BT)))
                loss_BT = loss_BT + beta * kl_BT
                metrics["reference_kl"] = kl_BT
            total = aggregate(loss_BT, mask_BT, aggregation, denominator=denominator, horizon=horizon)
            return LossOutput(total, {name: _masked(value_BT.detach(), mask_BT) for name, value_BT in metrics.items()})

        return _with_parameters_of(terms_of, loss)

    return decorate


def _with_parameters_of(terms_of: Callable[..., Terms], loss: Callable[..., LossOutput]) -> Callable[..., LossOutput]:
    """Have `loss` say which parameters it takes: those of all losses, and those of its terms."""
    shared = inspect.signature(loss, follow_wrapped=False).parameters.values()
    own = inspect.signature(terms_of).parameters.values()
    parameters = [
        *(parameter for parameter in shared if parameter.kind is not parameter.VAR_KEYWORD),
        *(parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY),
    ]
    loss.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return loss


@policy_loss("token_mean")
def grpo(tokens: Tokens, *, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None) -> Terms:
    """The clipped token ratio: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), mean over tokens.

    `dual_clip` c > 1 bounds the loss of bad answers that have become much likelier: where A < 0 it is at most -c A
    (arXiv:1912.09729, equation 5). (DeepSeekMath, arXiv:2402.03300, equation 3, which is `sequence_mean`; the clip is
    PPO's, arXiv:1707.06347.)
    """
    return _clipped(tokens.ratio_BT, tokens.advantages_BT, clip_low, clip_high, dual_clip)


@policy_loss("fixed_horizon")
def dr_grpo(tokens: Tokens, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Terms:
    """GRPO without its bias by length: the sum over tokens is divided by a fixed horizon.

    Belongs with the advantages `mean_only`. (Dr. GRPO, arXiv:2503.20783, section 3.2.)
    """
    return _clipped(tokens.ratio_BT, tokens.advantages_BT, clip_low, clip_high)


@policy_loss("token_mean")
def dapo(tokens: Tokens, *, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = None) -> Terms:
    """GRPO with more room upwards, so that unlikely tokens can become likely and the entropy stays up; token mean.

    The paper's other parts are `filter.zero_variance` and `shaping.overlong`. The dual clip is not in it, but in many
    of its implementations, hence in configs/loss/dapo.yaml. (DAPO, arXiv:2503.14476, sections 3.1 and 3.3.)
    """
    return _clipped(tokens.ratio_BT, tokens.advantages_BT, clip_low, clip_high, dual_clip)


@policy_loss("sequence_mean")
def gspo(tokens: Tokens, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> Terms:
    """GRPO with one ratio for the whole sequence, s = exp(mean of log r over its tokens), clipped; mean over sequences.

    s stays much closer to 1 than r, hence the narrow clip. The gradient of s goes to each token by itself, so that
    advantages, or importance weights, may differ within a sequence; where they don't, it is that of the sequence.
    (GSPO, arXiv:2507.18071, section 4.3: GSPO-token.)
    """
    lengths_B1 = tokens.mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    mean_B1 = tokens.log_ratio_BT.detach().sum(dim=1, keepdim=True) / lengths_B1
    log_ratio_BT = mean_B1 + (tokens.logprobs_BT - tokens.logprobs_BT.detach())  # exactly the mean
    return _clipped(log_ratio_BT.exp(), tokens.advantages_BT, clip_low, clip_high)


@policy_loss("token_mean")
def cispo(tokens: Tokens, *, clip_low: float = 1.0, clip_high: float = 4.0) -> Terms:
    """REINFORCE weighted by the ratio, clipped and without gradient: -clip(r, 1 - clip_low, 1 + clip_high) A log p.

    Every token keeps a gradient, the rare ones on which a chain of thought turns included. `clip_low` 1 is no lower
    bound, as in the paper. (CISPO of MiniMax-M1, arXiv:2506.13585, equations 4 and 5.)
    """
    return _weighted(tokens, tokens.ratio_BT.detach().clamp(1 - clip_low, 1 + clip_high))


@policy_loss("sequence_mean")
def sapo(tokens: Tokens, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Terms:
    """A soft gate in place of the clip: -f(r) A with f(r) = 4 / tau sigmoid(tau (r - 1)); mean over sequences.

    The gradient is the policy gradient at r = 1 and fades on both sides, faster with a larger tau: `tau_positive`
    where A > 0, `tau_negative` elsewhere. (SAPO, arXiv:2511.20347.)
    """
    ratio_BT, advantages_BT = tokens.ratio_BT, tokens.advantages_BT
    tau_BT = torch.full_like(ratio_BT, tau_negative).masked_fill(advantages_BT > 0, tau_positive)
    gate_BT = 4 / tau_BT * torch.sigmoid(tau_BT * (ratio_BT - 1))
    return Terms(-gate_BT * advantages_BT, ratio_BT, torch.zeros_like(tokens.mask_BT))


@policy_loss("token_mean")
def reinforce(tokens: Tokens, *, max_ratio: float = 2.0) -> Terms:
    """The policy gradient with a clamped importance weight: -min(r, max_ratio) A log p, the weight without gradient.

    (Williams 1992; the weight as in IMPALA, arXiv:1802.01561, section 4.)
    """
    return _weighted(tokens, tokens.ratio_BT.detach().clamp(max=max_ratio))


@policy_loss("token_mean")
def ppo_tv(tokens: Tokens, *, max_tv: float = 0.2) -> Terms:
    """The ratio -r A within a trust region of probabilities: no gradient where the policy has gone far enough.

    A token is cut off when its probability has moved by more than `max_tv` in the direction that A pushes. That is
    the total variation between the two policies seen as "this token or another". A ratio says little for a rare token,
    which the clip of PPO stops too early, and for a likely one, which it stops too late.
    (DPPO, arXiv:2602.04879, its variant Binary-TV.)
    """
    ratio_BT = tokens.ratio_BT
    moved_BT = tokens.behavior_logprobs_BT.exp() * (ratio_BT.detach() - 1)
    cut_BT = moved_BT * tokens.advantages_BT.sign() > max_tv
    return Terms((-ratio_BT * tokens.advantages_BT).masked_fill(cut_BT, 0.0), ratio_BT, cut_BT)


def k1(log_ratio_BT: Tensor) -> Tensor:
    """log(p / reference): unbiased, but its gradient has mean zero on samples of the policy: to look at."""
    return log_ratio_BT


def k2(log_ratio_BT: Tensor) -> Tensor:
    """log(p / reference)² / 2: biased, but its gradient is the divergence's own on samples of the policy."""
    return log_ratio_BT**2 / 2


def k3(log_ratio_BT: Tensor) -> Tensor:
    """reference / p - 1 - log(reference / p): unbiased, never negative, of low variance.

    Its gradient on samples of the policy is that of the divergence the other way round, KL(reference || policy).
    """
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
) -> Terms:
    """PPO's pessimistic loss."""
    plain_BT = -ratio_BT * advantages_BT
    clipped_BT = -ratio_BT.clamp(1 - clip_low, 1 + clip_high) * advantages_BT
    loss_BT, cut_BT = torch.maximum(plain_BT, clipped_BT), clipped_BT > plain_BT
    if dual_clip is not None:
        most_BT = -dual_clip * advantages_BT
        over_BT = (advantages_BT < 0) & (loss_BT > most_BT)
        loss_BT, cut_BT = torch.where(over_BT, most_BT, loss_BT), cut_BT | over_BT
    return Terms(loss_BT, ratio_BT, cut_BT)


def _weighted(tokens: Tokens, weights_BT: Tensor) -> Terms:
    """The policy gradient, with weights that have none."""
    loss_BT = -weights_BT * tokens.advantages_BT * tokens.logprobs_BT
    return Terms(loss_BT, tokens.ratio_BT, weights_BT != tokens.ratio_BT)


def _masked(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return values_BT.masked_fill(~mask_BT, 0.0)
