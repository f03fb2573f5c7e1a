"""One group from ticket to advantages."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from grpo.algorithms.advantages import ADVANTAGES
from grpo.algorithms.shaping import shape
from grpo.config import LossConfig, RolloutConfig, RunConfig, ShapingConfig
from grpo.imports import named_function
from grpo.pacing import Pacer
from grpo.services import Handle, Services
from grpo.structured import together
from grpo.types import (
    GenerationReport,
    Group,
    Prompt,
    PromptBatch,
    Rollout,
    SamplingParams,
    Scores,
    Ticket,
    ZeroAdvantage,
)


class PromptQueue:
    """Prompts by ticket, fetched ahead in bulk, so that a group costs a fraction of a call to the dataloader."""

    def __init__(self, dataloader: Handle, pacer: Pacer, bulk: int) -> None:
        self.handed_out = 0
        self._dataloader, self._pacer, self._bulk = dataloader, pacer, bulk
        self._prompts: deque[Prompt] = deque()
        self._next_serial = 0  # behind those fetched
        self._fetching = asyncio.Lock()

    async def prompt_for(self, ticket: Ticket) -> Prompt:
        """The ticket's prompt if it has one, else the next of the stream.

        The first to find the queue empty fetches for all.
        """
        if (serial := self._pacer.prompt_of(ticket)) is not None:
            prompt: Prompt = await self._dataloader.prompt.call_one(serial)
            return prompt
        async with self._fetching:
            if not self._prompts:
                batch: PromptBatch = await self._dataloader.sample.call_one(self._next_serial, self._bulk)
                self._prompts.extend(batch.prompts)
                self._next_serial = batch.next_serial
            prompt = self._prompts.popleft()
        self._pacer.has_prompt(ticket, prompt.serial)
        self.handed_out += 1
        return prompt

    @property
    def next_serial(self) -> int:
        """Where the stream goes on for somebody who has not fetched ahead."""
        return self._prompts[0].serial if self._prompts else self._next_serial

    def counts(self) -> dict[str, int]:
        """Prompts handed out to rollouts, and those before them that were over the length limit."""
        return {"handed_out": self.handed_out, "skipped_length": self.next_serial - self.handed_out}

    def state(self) -> dict[str, int]:
        """The place in the stream, and how many prompts were handed out on the way there; the others were skipped."""
        return {"next_serial": self.next_serial, "handed_out": self.handed_out}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from a `state`."""
        self._prompts.clear()
        self._next_serial, self.handed_out = state["next_serial"], state["handed_out"]


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
    the one that a run may choose to tolerate. Raises ZeroAdvantage for a group that `filter` wants dropped.
    """
    completions, report = await services.generator.generate.route(prompt, params)
    scores, reference_logprobs = await together(
        services.reward.score.route(prompt, completions),
        _reference_logprobs(services, prompt, completions),
    )
    shaped_G = shaped_rewards(scores, report, params, config.shaping)
    group = Group(
        prompt=prompt,
        completions=completions,
        reference_logprobs=reference_logprobs,
        rewards=scores.rewards,
        advantages=tuple(advantage_function(config.loss)(shaped_G).tolist()),
        oldest_version=report.oldest_version,
        masked=_masked(report, config.shaping),
    )
    finished = Rollout(group, scores, report, tuple(shaped_G.tolist()))
    if config.filter.zero_advantage and not group.has_signal:
        raise ZeroAdvantage(finished)
    return finished


def shaped_rewards(scores: Scores, report: GenerationReport, params: SamplingParams, config: ShapingConfig) -> Tensor:
    """What the advantages of a group are taken of."""
    return shape(
        torch.tensor(scores.rewards, dtype=torch.float64),
        torch.tensor(report.lengths),
        params.max_tokens,
        scale=config.scale,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        length_penalty=config.length_penalty,
        overlong_zone=config.overlong_zone if config.overlong == "penalize" else 0,
        overlong_penalty=config.overlong_penalty,
    )


def advantage_function(config: LossConfig) -> Callable[[Tensor], Tensor]:
    """An entry of ADVANTAGES, or `module:function`. Raises ConfigError when there is none."""
    return named_function(config.advantages, ADVANTAGES, key="loss.advantages")


def _masked(report: GenerationReport, config: ShapingConfig) -> tuple[int, ...]:
    if config.overlong != "mask":
        return ()
    return tuple(i for i, truncated in enumerate(report.truncated) if truncated)


async def _reference_logprobs(services: Services, prompt: Prompt, completions: Any) -> Any:
    if services.reference is None:
        return None
    logprobs, _ = await services.reference.logprobs.route(prompt, completions)
    return logprobs
