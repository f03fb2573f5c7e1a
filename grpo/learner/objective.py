"""What a config asks of the learner: a loss with its parameters, the off-policy correction, and what batches are
divided by."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo.algorithms.advantages import BATCH_SCALED, batch_scale
from grpo.algorithms.aggregation import batch_denominator
from grpo.algorithms.corrections import importance_ratio, importance_weights
from grpo.algorithms.losses import LOSSES, SHARED_PARAMETERS, LossOutput
from grpo.config.algorithm import LOSS_PARAMETERS, CorrectionConfig, LossConfig
from grpo.errors import ConfigError
from grpo.learner.batch import MicroBatch
from grpo.utils.imports import named_function


class Objective:
    """Turns the log-probabilities of a micro-batch into its share of the loss of the whole batch.

    `needs_proximal`: the loss's ratio is taken to the policy at the start of the train step, and advantages are
    weighted by how far that is from the behavior policy. `trains_zero_advantage`: the KL term pulls on those too.
    Raises ConfigError for a loss that is not there, or parameters that it does not take.
    """

    def __init__(self, loss: LossConfig, correction: CorrectionConfig) -> None:
        function = loss_function(loss)
        self._aggregation = loss.aggregation or _own_aggregation(function)
        self._horizon = loss.horizon
        shared = {"aggregation": self._aggregation, "horizon": loss.horizon, "beta": loss.beta, "kl": loss.kl_estimator}
        self._loss = partial(function, **shared, **_parameters(loss, function))
        _check_call(self._loss, loss.name)
        self._correction = correction
        self._scales_by_batch = loss.advantages in BATCH_SCALED
        self.needs_proximal = correction.mode != "none"
        self.trains_zero_advantage = loss.beta > 0

    def advantage_scale(self, advantages_N: Sequence[float]) -> float:
        """What the advantages of a batch are multiplied by: 1, unless they are in units of its unflatten."""
        return batch_scale(torch.tensor(advantages_N)) if self._scales_by_batch else 1.0

    def denominator(self, lengths_N: Sequence[int]) -> float:
        """What the loss of a batch is divided by, from the number of tokens trained on of each completion."""
        return batch_denominator(lengths_N, self._aggregation, self._horizon)

    def __call__(self, logprobs_BK: Tensor, micro: MicroBatch, denominator: float) -> LossOutput:
        """The proximal policy is the present one where the micro-batch does not bring its log-probabilities."""
        behavior_BK, advantages_BK, said = micro.behavior_logprobs_BK, micro.advantages_BK, dict[str, Tensor]()
        if self.needs_proximal:
            proximal_BK = logprobs_BK.detach() if micro.proximal_logprobs_BK is None else micro.proximal_logprobs_BK
            weights_BK, said = self._weights(proximal_BK, behavior_BK, micro.mask_BK)
            behavior_BK, advantages_BK = proximal_BK, advantages_BK * weights_BK
        output = self._loss(
            logprobs_BK,
            behavior_BK,
            advantages_BK,
            micro.mask_BK,
            reference_logprobs_BT=micro.reference_logprobs_BK,
            denominator=denominator,
        )
        return replace(output, metrics=output.metrics | said)

    def _weights(self, proximal_BK: Tensor, behavior_BK: Tensor, mask_BK: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The importance weights, and what is to be said of them per token."""
        how = self._correction
        weights_BK = importance_weights(
            proximal_BK,
            behavior_BK,
            mask_BK,
            mode=how.mode,
            level=how.level,
            min_ratio=how.min_ratio,
            max_ratio=how.max_ratio,
        )
        ratio_BK = importance_ratio(proximal_BK, behavior_BK, mask_BK, how.level)
        return weights_BK, {"correction_weight": weights_BK, "is_clip_fraction": weights_BK != ratio_BK}


def loss_function(config: LossConfig) -> Callable[..., LossOutput]:
    """An entry of LOSSES, or `module:function`. Raises ConfigError when there is none."""
    return named_function(config.name, LOSSES, key="loss.name")


def _check_call(loss: Callable[..., Any], name: str) -> None:
    """Raise ConfigError for a function that does not take what every loss is given."""
    try:
        inspect.signature(loss).bind(None, None, None, None, reference_logprobs_BT=None, denominator=1.0)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{name!r} can't be called as grpo/algorithms/losses.py says: {error}", key="loss.name"
        ) from error


def _own_aggregation(function: Callable[..., Any]) -> str:
    parameter = inspect.signature(function).parameters.get("aggregation")
    return "token_mean" if parameter is None or parameter.default is parameter.empty else parameter.default


def _parameters(config: LossConfig, function: Callable[..., Any]) -> dict[str, Any]:
    """Those that the config gives. Raises ConfigError for one that the loss would not read."""
    named = {name: value for name in LOSS_PARAMETERS if (value := getattr(config, name)) is not None}
    taken = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in SHARED_PARAMETERS
    ]
    if twice := [name for name in config.args if name in LOSS_PARAMETERS]:
        raise ConfigError(f"is a key of its own: loss.{twice[0]}", key=f"loss.args.{twice[0]}")
    for key, given in (("loss", named), ("loss.args", config.args)):
        if unknown := [name for name in given if name not in taken]:
            raise ConfigError(
                f"the loss {config.name} takes no such parameter, but {', '.join(taken) or 'none'}; leave it at null",
                key=f"{key}.{unknown[0]}",
            )
    return {**named, **config.args}
