"""One group from ticket to advantages."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo.algorithms.advantages import ADVANTAGES
from grpo.algorithms.shaping import shape
from grpo.config import LossConfig, RolloutConfig, RunConfig, ShapingConfig
from grpo.difficulty import Difficulty
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

    def __init__(self, dataloader: Handle, pacer: Pacer, bulk: int, by_difficulty: bool = False) -> None:
        self.handed_out = 0
        self._dataloader, self._pacer, self._bulk = dataloader, pacer, bulk
        self._difficulty, self._by_difficulty = Difficulty(), by_difficulty
        self._prompts: deque[Prompt] = deque()
        self._next_serial = 0  # behind those fetched
        self._fetching = asyncio.Lock()
        self._fetched_without: frozenset[int] = frozenset()  # the problems that were left out of the last fetch
        self._left_out: tuple[int, ...] = ()  # the serials where that happened
        self._left_out_before = 0  # how many there were in earlier fetches

    async def prompt_for(self, ticket: Ticket) -> Prompt:
        """The ticket's prompt if it has one, else the next of the stream.

        The first to find the queue empty fetches for all.
        """
        if (serial := self._pacer.prompt_of(ticket)) is not None:
            prompt: Prompt = await self._dataloader.prompt.call_one(serial)
            return prompt
        async with self._fetching:
            if not self._prompts:
                await self._fetch(self._bulk, self._difficulty.left_out)
            prompt = self._prompts.popleft()
        self._pacer.has_prompt(ticket, prompt.serial)
        self.handed_out += 1
        return prompt

    def learned(self, prompt: Prompt, rewards: Sequence[float]) -> None:
        """What the group of a prompt earned. The next fetch goes by it, with `dataloader.sampling=difficulty`."""
        if self._by_difficulty:
            self._difficulty.learned(prompt, rewards)

    @property
    def next_serial(self) -> int:
        """Where the stream goes on for somebody who has not fetched ahead."""
        return self._prompts[0].serial if self._prompts else self._next_serial

    def counts(self) -> dict[str, int]:
        """Prompts handed out to rollouts, and those before them that were over the length limit, or left out."""
        left_out = self._left_out_before + sum(serial < self.next_serial for serial in self._left_out)
        return {
            "handed_out": self.handed_out,
            "skipped_length": self.next_serial - self.handed_out - left_out,
            "left_out_difficulty": left_out,
        }

    def state(self) -> dict[str, Any]:
        """The place in the stream, what happened on the way there, which problems are left out; as JSON can hold it.

        And how the prompts ahead were fetched: more may be left out by now, but not of these.
        """
        without = sorted(self._fetched_without) if self._prompts else []
        return {
            "next_serial": self.next_serial,
            "handed_out": self.handed_out,
            "left_out_difficulty": self.counts()["left_out_difficulty"],
            "difficulty": self._difficulty.state(),
            "ahead": {"count": len(self._prompts), "without": without},
        }

    async def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`, also from one of a version that knew no difficulty."""
        self._prompts.clear()
        self._next_serial, self.handed_out = state["next_serial"], state["handed_out"]
        self._left_out, self._left_out_before = (), state.get("left_out_difficulty", 0)
        self._difficulty = Difficulty(state.get("difficulty", ()))
        ahead = state.get("ahead", {"count": 0})
        if ahead["count"]:
            await self._fetch(ahead["count"], frozenset(ahead["without"]))

    async def _fetch(self, count: int, without: frozenset[int]) -> None:
        batch: PromptBatch = await self._dataloader.sample.call_one(self._next_serial, count, without)
        self._prompts.extend(batch.prompts)
        self._next_serial = batch.next_serial
        self._left_out_before += len(self._left_out)
        self._left_out, self._fetched_without = batch.left_out, without


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
