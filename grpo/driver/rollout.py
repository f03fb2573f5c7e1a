"""One group, from its prompt to its advantages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo.algorithms.advantages import ADVANTAGES, shape
from grpo.config.algorithm import LossConfig, RolloutConfig, ShapingConfig
from grpo.config.schema import RunConfig
from grpo.errors import ConfigError, EnvironmentFailed, GroupError, LeaseLost, ZeroVarianceGroup
from grpo.services.handle import EvaluationServices, Services
from grpo.telemetry.recording import note
from grpo.types import Detail, GenerationReport, Group, Prompt, Rollout, SamplingParams, Scores
from grpo.utils.aio import gather_or_cancel
from grpo.utils.imports import named_function


def sampling_params(config: RolloutConfig, seed: int, prompt: Prompt, n: int | None = None) -> SamplingParams:
    """Return the sampling parameters of `n` completions (default: `rollout.group_size`).

    Their seed is a function of the run's seed and the prompt's serial alone.
    """
    return SamplingParams(
        n=n or config.group_size,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_tokens=config.max_completion_tokens,
        seed=(seed << 40) | prompt.serial,
    )


@dataclass(frozen=True)
class Sampled:
    """The completions of a prompt, as a reference, and their report; with scores if an environment gave them.

    The prompt's tokens are those that the completions follow.
    """

    prompt: Prompt
    completions: Any
    report: GenerationReport
    scores: Scores | None = None


async def sample_group(
    prompt: Prompt, params: SamplingParams, services: Services | EvaluationServices, detail: Detail
) -> Sampled:
    """Sample the completions of a prompt: answers of the generator, or episodes that an environment plays with it.

    The turns of all episodes go from the environment to one generator, without the driver. A group whose generator dies
    is played again with another one.
    """
    if services.environment is None:
        return Sampled(prompt, *await services.generator.generate.route(prompt, params))
    while True:
        with suppress(LeaseLost):
            async with services.generator.lease() as generator:
                completions, played = await services.environment.play.route(prompt, params, generator, detail)
            prompt = dataclasses.replace(prompt, token_ids=played.opening)
            return Sampled(prompt, completions, played.generation, played.scores)


async def scores_of(sampled: Sampled, services: Services | EvaluationServices, detail: Detail) -> Scores:
    """Return the scores of a sampled group. Raises RewardError."""
    if sampled.scores is not None:
        return sampled.scores
    assert services.reward is not None
    scores: Scores = await services.reward.score.route(sampled.prompt, sampled.completions, detail)
    return scores


async def rollout(prompt: Prompt, params: SamplingParams, services: Services, config: RunConfig) -> Rollout:
    """Sample a group, score it, and compute its advantages.

    Rewards and reference log-probabilities are computed concurrently. Tokens never reach the driver: the group holds
    references to them. Raises what the services raise (a run may tolerate GroupError), ZeroVarianceGroup when
    `filter.zero_variance` drops the group, and ConfigError when `loss.advantages` returns the wrong shape.
    """
    # Few groups are sampled for people to read; the driver receives the texts of these alone.
    detail: Detail = "rewards"
    if prompt.serial % config.observe.rollouts_every == 0:
        detail = "tokens" if config.observe.rollouts_tokens else "texts"

    sampled = await sample_group(prompt, params, services, detail)
    calls = [scores_of(sampled, services, detail)]
    if services.reference is not None:
        calls.append(services.reference.logprobs.route(sampled.prompt, sampled.completions))
    scores, *reference = await gather_or_cancel(*calls)

    report = sampled.report
    shaped = _shaped_rewards(scores, report, params, config.shaping)
    masks_overlong = config.shaping.overlong == "mask"
    group = Group(
        prompt=sampled.prompt,
        completions=sampled.completions,
        reference_logprobs=reference[0][0] if reference else None,  # a pair (payload, report)
        rewards=scores.rewards,
        advantages=_advantages(shaped, config.loss),
        oldest_version=report.oldest_version,
        masked=tuple(i for i, truncated in enumerate(report.truncated) if truncated and masks_overlong),
    )
    finished = Rollout(group, scores, report, shaped)
    note(lengths=report.lengths, signal=not group.is_zero_variance)
    if config.filter.zero_variance and group.is_zero_variance:
        raise ZeroVarianceGroup(finished)
    return finished


def ends_run(config: RunConfig, error: GroupError) -> bool:
    """Return True if a failure of the user's code ends the run, False if it costs only its group."""
    decides = config.environment if isinstance(error, EnvironmentFailed) else config.reward
    return decides.on_error == "fail"


def advantage_function(config: LossConfig) -> Callable[[Tensor], Tensor]:
    """Return the entry of ADVANTAGES, or the `module:function`, that `loss.advantages` names.

    Raises ConfigError when there is none.
    """
    return named_function(config.advantages, ADVANTAGES, key="loss.advantages")


def _shaped_rewards(
    scores: Scores, report: GenerationReport, params: SamplingParams, config: ShapingConfig
) -> tuple[float, ...]:
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


def _advantages(shaped: Sequence[float], config: LossConfig) -> tuple[float, ...]:
    shaped_G = torch.tensor(shaped, dtype=torch.float64)
    advantages_G = advantage_function(config)(shaped_G)
    if advantages_G.shape != shaped_G.shape:
        raise ConfigError(
            f"{config.advantages!r} returns {tuple(advantages_G.shape)} advantages for {tuple(shaped_G.shape)} "
            "rewards. Return one for each.",
            key="loss.advantages",
        )
    return tuple(advantages_G.tolist())
