"""One group from prompt to advantages."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import torch

from grpo.algorithms.advantages import ADVANTAGES
from grpo.config import LossConfig, RolloutConfig
from grpo.services import Handle, Services
from grpo.structured import together
from grpo.types import GenerationReport, Group, Prompt, SamplingParams, Scores


class PromptQueue:
    """Prompts fetched ahead in bulk, so that a group costs a fraction of a call to the dataloader."""

    def __init__(self, dataloader: Handle, bulk: int) -> None:
        self._dataloader, self._bulk = dataloader, bulk
        self._prompts: deque[Prompt] = deque()
        self._fetching = asyncio.Lock()

    async def next(self) -> Prompt:
        """The next prompt, in the dataloader's order. The first to find the queue empty fetches for all."""
        async with self._fetching:
            if not self._prompts:
                self._prompts.extend(await self._dataloader.sample.call_one(self._bulk))
            return self._prompts.popleft()


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


async def rollout(
    prompt: Prompt, params: SamplingParams, services: Services, loss: LossConfig
) -> tuple[Group, Scores, GenerationReport]:
    """Generate, then score and look up reference log-probabilities side by side.

    Tokens stay where they are: the group carries references to them. Raises what the services raise; RewardError is
    the one that a run may choose to tolerate.
    """
    completions, report = await services.generator.generate.route(prompt, params)
    scores, reference_logprobs = await together(
        services.reward.score.route(prompt, completions),
        _reference_logprobs(services, prompt, completions),
    )
    advantages_G = ADVANTAGES[loss.advantages](torch.tensor(scores.rewards))
    group = Group(
        prompt=prompt,
        completions=completions,
        reference_logprobs=reference_logprobs,
        rewards=scores.rewards,
        advantages=tuple(advantages_G.tolist()),
        oldest_version=report.oldest_version,
    )
    return group, scores, report


async def _reference_logprobs(services: Services, prompt: Prompt, completions: Any) -> Any:
    if services.reference is None:
        return None
    logprobs, _ = await services.reference.logprobs.route(prompt, completions)
    return logprobs
