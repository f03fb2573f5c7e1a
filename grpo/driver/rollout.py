"""One group from ticket to advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo.algorithms.advantages import ADVANTAGES, shape
from grpo.config.algorithm import LossConfig, RolloutConfig, ShapingConfig
from grpo.config.operation import ObserveConfig
from grpo.config.schema import RunConfig
from grpo.errors import ConfigError, ZeroVarianceGroup
from grpo.services.handle import Services
from grpo.telemetry.recording import note
from grpo.types import Detail, GenerationReport, Group, Prompt, Rollout, SamplingParams, Scores
from grpo.utils.aio import gather_or_cancel
from grpo.utils.imports import named_function


def sampling_params(config: RolloutConfig, seed: int, prompt: Prompt, n: int | None = None) -> SamplingParams:
    """How `n` completions (a group, by default) are drawn.

    The seed follows from the run's seed and the prompt's number, and from nothing else.
    """
    return SamplingParams(
        n=n or config.group_size,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_tokens=config.max_completion_tokens,
        seed=(seed << 40) | prompt.serial,
    )


async def rollout(prompt: Prompt, params: SamplingParams, services: Services, config: RunConfig) -> Rollout:
    """Generate, then score and look up reference log-probabilities side by side.

    Tokens stay where they are: the group carries references to them. Raises what the services raise; RewardError is
    the one that a run may choose to tolerate. Raises ZeroVarianceGroup for a group that `filter` wants dropped.
    """
    completions, report = await services.generator.generate.route(prompt, params)
    scores, reference_logprobs = await gather_or_cancel(
        services.reward.score.route(prompt, completions, _detail(prompt, config.observe)),
        _reference_logprobs(services, prompt, completions),
    )
    shaped = shaped_rewards(scores, report, params, config.shaping)
    group = Group(
        prompt=prompt,
        completions=completions,
        reference_logprobs=reference_logprobs,
        rewards=scores.rewards,
        advantages=_advantages(shaped, config.loss),
        oldest_version=report.oldest_version,
        masked=_masked(report, config.shaping),
    )
    finished = Rollout(group, scores, report, shaped)
    note(lengths=report.lengths, signal=not group.is_zero_variance)
    if config.filter.zero_variance and group.is_zero_variance:
        raise ZeroVarianceGroup(finished)
    return finished


def shaped_rewards(
    scores: Scores, report: GenerationReport, params: SamplingParams, config: ShapingConfig
) -> tuple[float, ...]:
    """What the advantages of a group are taken of."""
    return shape(
        scores.rewards,
        report.lengths,
        params.max_tokens,
        scale=config.scale,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        length_penalty=config.length_penalty,
        overlong_buffer=config.overlong_buffer * params.max_tokens if config.overlong == "penalize" else 0,
        overlong_penalty=config.overlong_penalty,
    )


def advantage_function(config: LossConfig) -> Callable[[Tensor], Tensor]:
    """An entry of ADVANTAGES, or `module:function`. Raises ConfigError when there is none."""
    return named_function(config.advantages, ADVANTAGES, key="loss.advantages")


def _advantages(shaped: Sequence[float], config: LossConfig) -> tuple[float, ...]:
    shaped_G = torch.tensor(shaped, dtype=torch.float64)
    found_G = advantage_function(config)(shaped_G)
    if found_G.shape != shaped_G.shape:
        raise ConfigError(
            f"{config.advantages!r} returns {tuple(found_G.shape)} advantages for {tuple(shaped_G.shape)} rewards",
            key="loss.advantages",
        )
    return tuple(found_G.tolist())


def _masked(report: GenerationReport, config: ShapingConfig) -> tuple[int, ...]:
    if config.overlong != "mask":
        return ()
    return tuple(i for i, truncated in enumerate(report.truncated) if truncated)


def _detail(prompt: Prompt, config: ObserveConfig) -> Detail:
    """What of a group comes to the driver, for people to see: of most groups, nothing."""
    if prompt.serial % config.rollouts_every:
        return "rewards"
    return "tokens" if config.rollouts_tokens else "texts"


async def _reference_logprobs(services: Services, prompt: Prompt, completions: Any) -> Any:
    if services.reference is None:
        return None
    logprobs, _ = await services.reference.logprobs.route(prompt, completions)
    return logprobs
