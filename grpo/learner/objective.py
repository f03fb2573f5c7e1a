"""The objective of a config: its loss, the off-policy correction, and the divisor of a batch's loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from grpo.algorithms.advantages import BATCH_SCALED, batch_scale
from grpo.algorithms.aggregation import batch_denominator
from grpo.algorithms.corrections import importance_ratio, importance_weights
from grpo.algorithms.losses import LOSSES, LossOutput, PolicyLoss
from grpo.config.algorithm import CorrectionConfig, LossConfig
from grpo.config.validation import build
from grpo.errors import ConfigError
from grpo.learner.batch import MicroBatch
from grpo.utils.imports import named_function

_COMMON = tuple(field.name for field in fields(PolicyLoss))  # each is a field of LossConfig, too


class Objective:
    """Turn the log-probabilities of a micro-batch into its part of the loss of the whole batch.

    With `needs_proximal` the loss's ratio is taken to the policy at the start of the train step, and advantages are
    weighted by the ratio of that policy to the behavior policy. `trains_zero_advantage` is true with a KL term, which
    has a gradient for completions of zero advantage, too. Raises ConfigError for an unknown loss, or for parameters
    that the loss does not take.

    Example:
        objective = Objective(LossConfig("dapo", args={"clip_high": 0.3}), CorrectionConfig())
        denominator = objective.denominator([sample.trained_length for sample in samples])
        for part in micro_batches:
            objective(logprobs_BK, collate(part, device), denominator).loss.backward()
    """

    def __init__(self, loss: LossConfig, correction: CorrectionConfig) -> None:
        self._loss, self._correction = make_loss(loss), correction
        self._scales_by_batch = loss.advantages in BATCH_SCALED
        self.needs_proximal = correction.mode != "none"
        self.trains_zero_advantage = loss.beta > 0

    def advantage_scale(self, advantages_N: Sequence[float]) -> float:
        """Return the factor for a batch's advantages: 1, unless they are normalized over the batch."""
        return batch_scale(torch.tensor(advantages_N)) if self._scales_by_batch else 1.0

    def denominator(self, lengths_N: Sequence[int]) -> float:
        """Return the divisor of a batch's loss, from the number of trained tokens of each completion."""
        return batch_denominator(lengths_N, self._loss.aggregation, self._loss.horizon)

    def __call__(self, logprobs_BK: Tensor, micro: MicroBatch, denominator: float) -> LossOutput:
        """Compute the loss; without proximal log-probabilities in `micro` the present policy is the proximal one."""
        behavior_BK, advantages_BK = micro.behavior_logprobs_BK, micro.advantages_BK
        correction_metrics = dict[str, Tensor]()
        if self.needs_proximal:
            proximal_BK = logprobs_BK.detach() if micro.proximal_logprobs_BK is None else micro.proximal_logprobs_BK
            weights_BK, correction_metrics = self._weights(proximal_BK, behavior_BK, micro.mask_BK)
            behavior_BK, advantages_BK = proximal_BK, advantages_BK * weights_BK
        output = self._loss(
            logprobs_BK,
            behavior_BK,
            advantages_BK,
            micro.mask_BK,
            reference_logprobs_BT=micro.reference_logprobs_BK,
            denominator=denominator,
        )
        return replace(output, metrics=output.metrics | correction_metrics)

    def _weights(self, proximal_BK: Tensor, behavior_BK: Tensor, mask_BK: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the importance weights, and their metrics per token."""
        config = self._correction
        weights_BK = importance_weights(
            proximal_BK,
            behavior_BK,
            mask_BK,
            mode=config.mode,
            level=config.level,
            min_ratio=config.min_ratio,
            max_ratio=config.max_ratio,
        )
        ratio_BK = importance_ratio(proximal_BK, behavior_BK, mask_BK, config.level)
        return weights_BK, {"correction_weight": weights_BK, "is_clip_fraction": weights_BK != ratio_BK}


def make_loss(config: LossConfig) -> PolicyLoss:
    """Build the loss that a config names, with its parameters.

    Raises ConfigError for a name that is no PolicyLoss, and for parameters that are unknown or out of range.
    """
    cls = named_function(config.name, LOSSES, key="loss.name")
    if not (isinstance(cls, type) and issubclass(cls, PolicyLoss)) or cls is PolicyLoss:
        raise ConfigError(
            f"{config.name!r} is no loss; name a subclass of grpo.algorithms.losses.PolicyLoss", key="loss.name"
        )
    if misplaced := [name for name in config.args if name in _COMMON]:
        raise ConfigError(f"is no parameter of a single loss; set loss.{misplaced[0]}", key=f"loss.args.{misplaced[0]}")
    common = {name: getattr(config, name) for name in _COMMON}
    given = {name: value for name, value in common.items() if value is not None}
    return build(cls, {**given, **config.args}, key="loss")
