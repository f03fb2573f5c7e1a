"""Policy losses: one frozen dataclass each, with its parameters as fields, callable on log-probabilities.

All tensors are [B, T] over B sequences of T padded tokens, log-probabilities in nats. Masked positions have no
influence, NaN included. Minimizing a loss makes tokens of positive advantage likelier. To add a loss, derive a class
from `PolicyLoss` (see its example), add it to LOSSES, give it a file in configs/loss/ and a test. A class outside this
package needs no entry in LOSSES: it is named `my_module:MyLoss`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from grpo.algorithms.aggregation import Aggregation, aggregate
from grpo.algorithms.corrections import clamp_for_exp, log_ratio
from grpo.config.fields import Hint, Settings


class LossInputs(NamedTuple):
    """Inputs of a loss, all [B, T] and 0 in masked positions; `mask_BT` is boolean."""

    policy_logprobs_BT: Tensor
    """Log-probabilities under the policy that is trained. Only these, and the ratio, carry a gradient."""
    behavior_logprobs_BT: Tensor
    log_ratio_BT: Tensor
    """log(policy / behavior), clamped so that its exp is finite."""
    advantages_BT: Tensor
    mask_BT: Tensor

    @property
    def ratio_BT(self) -> Tensor:
        return self.log_ratio_BT.exp()


class PerTokenLoss(NamedTuple):
    """Loss of every token, its ratio, and a boolean mask of the tokens that were clipped or got no gradient."""

    loss_BT: Tensor
    ratio_BT: Tensor
    clipped_BT: Tensor


@dataclass(frozen=True)
class LossOutput:
    """`loss` is a scalar with a gradient; `metrics` by name are [B, T] without one, 0 in masked positions."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(Settings):
    """Base class of all losses: masks the inputs, takes the ratio, adds the KL term and aggregates over tokens.

    A subclass is a frozen dataclass that declares its parameters as fields and implements `per_token`. It may set
    another default for `aggregation`. Limits stand in the annotations. They are checked when a config is read, and are
    not checked when the class is called in code.

    Example:
        @dataclass(frozen=True)
        class Tempered(PolicyLoss):
            tau: Annotated[float, Gt(0)] = 0.5

            def per_token(self, x: LossInputs) -> PerTokenLoss:
                loss_BT = -(x.ratio_BT**self.tau) * x.advantages_BT
                return PerTokenLoss(loss_BT, x.ratio_BT, torch.zeros_like(x.mask_BT))

        output = Tempered(tau=0.3, beta=0.01)(policy_BT, behavior_BT, advantages_BT, mask_BT, reference_logprobs_BT=r)
        output.loss.backward()

    From a config: `loss.name=my_losses:Tempered` with `tau: 0.3` below `loss`.
    """

    aggregation: Aggregation = "token_mean"
    """Averaging of per-token losses; see grpo/algorithms/aggregation.py."""
    horizon: Annotated[int | None, Ge(1), Hint("the loss is divided by it")] = None
    """Tokens that `fixed_horizon` divides by; None: the length of the longest completion."""
    beta: Annotated[float, Ge(0), Hint("0 switches the KL term off")] = 0.0
    """Weight of the KL divergence from the reference, which is added per token."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that divergence; see KL_ESTIMATORS."""

    def per_token(self, x: LossInputs) -> PerTokenLoss:
        """Compute the loss of every token, without the KL term; whatever it holds in masked positions is ignored."""
        raise NotImplementedError

    def __call__(
        self,
        policy_logprobs_BT: Tensor,
        behavior_logprobs_BT: Tensor,
        advantages_BT: Tensor,
        mask_BT: Tensor,
        *,
        reference_logprobs_BT: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> LossOutput:
        """Return the scalar loss, and metrics per token.

        The ratio r = exp(policy - behavior) is taken to the policy that sampled or, with an off-policy correction, to
        the policy at the start of the train step. `mask_BT` is 1 where a token is trained on. `denominator` replaces
        the divisor of the aggregation, so that micro-batches add up to their batch. The metrics are `ratio`,
        `clip_fraction` (1 where the loss clips the ratio or drops the token) and, given a reference, `reference_kl`.
        """
        mask_BT = mask_BT.bool()
        inputs = LossInputs(
            _masked(policy_logprobs_BT, mask_BT),
            _masked(behavior_logprobs_BT, mask_BT),
            clamp_for_exp(log_ratio(policy_logprobs_BT, behavior_logprobs_BT, mask_BT)),
            _masked(advantages_BT, mask_BT),
            mask_BT,
        )
        loss_BT, ratio_BT, clipped_BT = self.per_token(inputs)
        metrics = {"ratio": ratio_BT, "clip_fraction": clipped_BT.to(ratio_BT.dtype)}
        if reference_logprobs_BT is not None:
            estimate = KL_ESTIMATORS[self.kl_estimator]
            kl_BT = estimate(clamp_for_exp(log_ratio(policy_logprobs_BT, reference_logprobs_BT, mask_BT)))
            loss_BT = loss_BT + self.beta * kl_BT
            metrics["reference_kl"] = kl_BT
        loss = aggregate(loss_BT, mask_BT, self.aggregation, denominator=denominator, horizon=self.horizon)
        return LossOutput(loss, {name: _masked(value_BT.detach(), mask_BT) for name, value_BT in metrics.items()})


@dataclass(frozen=True)
class ClippedLoss(PolicyLoss):
    """Base class of the losses with PPO's clip: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    (PPO, arXiv:1707.06347.)
    """

    clip_low: Annotated[float, Ge(0), Hint("0 clips every ratio below 1")] = 0.2
    clip_high: Annotated[float, Ge(0), Hint("0 clips every ratio above 1")] = 0.2

    def per_token(self, x: LossInputs) -> PerTokenLoss:
        return self.clip(x.ratio_BT, x.advantages_BT)

    def clip(self, ratio_BT: Tensor, advantages_BT: Tensor) -> PerTokenLoss:
        """Compute PPO's pessimistic loss: the larger of the plain and the clipped one."""
        plain_BT = -ratio_BT * advantages_BT
        clipped_BT = -ratio_BT.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages_BT
        return PerTokenLoss(torch.maximum(plain_BT, clipped_BT), ratio_BT, clipped_BT > plain_BT)


@dataclass(frozen=True)
class GRPO(ClippedLoss):
    """Clipped token ratio, mean over tokens; the paper's mean over sequences is `aggregation=sequence_mean`.

    `dual_clip` c bounds the loss of bad answers that have become much likelier: where A < 0 it is at most -c A
    (arXiv:1912.09729, equation 5). (DeepSeekMath, arXiv:2402.03300, equation 3.)
    """

    dual_clip: Annotated[float | None, Ge(1), Hint("the loss is bounded at this multiple of the advantage")] = None

    def per_token(self, x: LossInputs) -> PerTokenLoss:
        loss_BT, ratio_BT, clipped_BT = self.clip(x.ratio_BT, x.advantages_BT)
        if self.dual_clip is not None:
            bound_BT = -self.dual_clip * x.advantages_BT
            over_BT = (x.advantages_BT < 0) & (loss_BT > bound_BT)
            loss_BT, clipped_BT = torch.where(over_BT, bound_BT, loss_BT), clipped_BT | over_BT
        return PerTokenLoss(loss_BT, ratio_BT, clipped_BT)


@dataclass(frozen=True)
class DrGRPO(ClippedLoss):
    """GRPO without its length bias: the sum over tokens is divided by a fixed horizon.

    Belongs with the advantages `mean_only`. (Dr. GRPO, arXiv:2503.20783, section 3.2.)
    """

    aggregation: Aggregation = "fixed_horizon"


@dataclass(frozen=True)
class DAPO(GRPO):
    """GRPO with more room upwards, so that unlikely tokens can become likely and the entropy stays up; token mean.

    The paper's other parts are `filter.zero_variance` and `shaping.overlong`. The dual clip is not in the paper, but in
    many of its implementations, hence in configs/loss/dapo.yaml. (DAPO, arXiv:2503.14476, sections 3.1 and 3.3.)
    """

    clip_high: Annotated[float, Ge(0), Hint("0 clips every ratio above 1")] = 0.28


@dataclass(frozen=True)
class GSPO(ClippedLoss):
    """GRPO with one clipped ratio for the whole sequence, s = exp(mean of log r over its tokens); mean over sequences.

    s stays much closer to 1 than r, hence the narrow clip. Each token gets the gradient of s through its own
    log-probability, so advantages and importance weights may differ within a sequence; where they are equal, the
    gradient is that of the sequence-level loss. (GSPO, arXiv:2507.18071, section 4.3: GSPO-token.)
    """

    aggregation: Aggregation = "sequence_mean"
    clip_low: Annotated[float, Ge(0), Hint("0 clips every ratio below 1")] = 3e-4
    clip_high: Annotated[float, Ge(0), Hint("0 clips every ratio above 1")] = 4e-4

    def per_token(self, x: LossInputs) -> PerTokenLoss:
        lengths_B1 = x.mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
        mean_B1 = x.log_ratio_BT.detach().sum(dim=1, keepdim=True) / lengths_B1
        log_ratio_BT = mean_B1 + (x.policy_logprobs_BT - x.policy_logprobs_BT.detach())  # in value exactly the mean
        return self.clip(log_ratio_BT.exp(), x.advantages_BT)


@dataclass(frozen=True)
class CISPO(PolicyLoss):
    """REINFORCE weighted by the ratio, clipped and without gradient: -clip(r, 1 - clip_low, 1 + clip_high) A log p.

    Every token keeps a gradient, including the rare tokens on which a chain of thought turns. `clip_low` 1 is no lower
    bound, as in the paper. (CISPO of MiniMax-M1, arXiv:2506.13585, equations 4 and 5.)
    """

    clip_low: Annotated[float, Ge(0), Hint("0 clips every ratio below 1")] = 1.0
    clip_high: Annotated[float, Ge(0), Hint("0 clips every ratio above 1")] = 4.0

    def per_token(self, x: LossInputs) -> PerTokenLoss:
        return _weighted(x, x.ratio_BT.detach().clamp(1 - self.clip_low, 1 + self.clip_high))


@dataclass(frozen=True)
class SAPO(PolicyLoss):
    """A soft gate instead of the clip: -f(r) A with f(r) = 4 / tau sigmoid(tau (r - 1)); mean over sequences.

    The gradient is the policy gradient at r = 1 and fades on both sides, faster with a larger tau: `tau_positive`
    where A > 0, `tau_negative` elsewhere. (SAPO, arXiv:2511.20347.)
    """

    aggregation: Aggregation = "sequence_mean"
    tau_positive: Annotated[float, Gt(0)] = 1.0
    tau_negative: Annotated[float, Gt(0)] = 1.05

    def per_token(self, x: LossInputs) -> PerTokenLoss:
        ratio_BT = x.ratio_BT
        tau_BT = torch.full_like(ratio_BT, self.tau_negative).masked_fill(x.advantages_BT > 0, self.tau_positive)
        gate_BT = 4 / tau_BT * torch.sigmoid(tau_BT * (ratio_BT - 1))
        return PerTokenLoss(-gate_BT * x.advantages_BT, ratio_BT, torch.zeros_like(x.mask_BT))


@dataclass(frozen=True)
class Reinforce(PolicyLoss):
    """The policy gradient with a clamped importance weight: -min(r, max_ratio) A log p, the weight without gradient.

    (Williams 1992; the weight as in IMPALA, arXiv:1802.01561, section 4.)
    """

    max_ratio: Annotated[float, Gt(0)] = 2.0

    def per_token(self, x: LossInputs) -> PerTokenLoss:
        return _weighted(x, x.ratio_BT.detach().clamp(max=self.max_ratio))


@dataclass(frozen=True)
class PPOTV(PolicyLoss):
    """The ratio -r A within a trust region of probabilities: no gradient where the policy has gone far enough.

    A token is dropped when its probability has moved by more than `max_tv` in the direction that A pushes. That is
    the total variation between the two policies on the event "this token or another". A ratio says little about a rare
    token, which the clip of PPO stops too early, and about a likely one, which it stops too late.
    (DPPO, arXiv:2602.04879, its variant Binary-TV.)
    """

    max_tv: Annotated[float, Ge(0), Hint("0 drops every token that moves")] = 0.2

    def per_token(self, x: LossInputs) -> PerTokenLoss:
        ratio_BT = x.ratio_BT
        moved_BT = x.behavior_logprobs_BT.exp() * (ratio_BT.detach() - 1)
        dropped_BT = moved_BT * x.advantages_BT.sign() > self.max_tv
        return PerTokenLoss((-ratio_BT * x.advantages_BT).masked_fill(dropped_BT, 0.0), ratio_BT, dropped_BT)


LOSSES: dict[str, type[PolicyLoss]] = {
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "sapo": SAPO,
    "reinforce": Reinforce,
    "ppo_tv": PPOTV,
}


def k1(log_ratio_BT: Tensor) -> Tensor:
    """log(p / reference): unbiased, but its gradient has mean zero on samples of the policy; for monitoring only."""
    return log_ratio_BT


def k2(log_ratio_BT: Tensor) -> Tensor:
    """log(p / reference)² / 2: biased, but its gradient is the divergence's own on samples of the policy."""
    return log_ratio_BT**2 / 2


def k3(log_ratio_BT: Tensor) -> Tensor:
    """reference / p - 1 - log(reference / p): unbiased, never negative, of low variance.

    Its gradient on samples of the policy is that of the reverse divergence, KL(reference || policy).
    """
    return torch.exp(-log_ratio_BT) - 1 + log_ratio_BT


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""Estimators of KL(policy || reference) per token from log(p / reference). (Schulman, Approximating KL Divergence.)"""


def _weighted(x: LossInputs, weights_BT: Tensor) -> PerTokenLoss:
    """Weight the policy gradient by weights that carry no gradient."""
    loss_BT = -weights_BT * x.advantages_BT * x.policy_logprobs_BT
    return PerTokenLoss(loss_BT, x.ratio_BT, weights_BT != x.ratio_BT)


def _masked(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return values_BT.masked_fill(~mask_BT, 0.0)
