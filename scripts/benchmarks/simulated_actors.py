"""Actors that do no work, each in a separate process: the time of a run is then the overhead of grpo and Ray.

The module imports neither torch nor grpo's engines, because every figure starts five such processes.
"""

from __future__ import annotations

import asyncio
import random
from typing import NamedTuple

import numpy as np

from grpo.actors.marks import replayed_on_join, returns_payload
from grpo.types import (
    Batch,
    Completion,
    GenerationReport,
    GeneratorStats,
    Problem,
    Prompt,
    PromptBatch,
    SamplingParams,
    Scores,
)

_TOKENS = 32


class IdleWeights(NamedTuple):
    version: int


class _Idle:
    async def setup(self) -> None: ...

    async def close(self) -> None: ...


class IdleDataloader(_Idle):
    async def stats(self) -> dict[str, int]:
        return {}

    async def sample(self, first: int, count: int, without: frozenset[int] = frozenset()) -> PromptBatch:
        ids = np.arange(_TOKENS)
        prompts = tuple(Prompt(serial, Problem("question", "answer"), ids) for serial in range(first, first + count))
        return PromptBatch(prompts, first + count)


class IdleGenerator(_Idle):
    """Answer each group after `latency_s`, varied uniformly by the fraction `spread` in both directions.

    The first `staggered` groups end at even intervals over `latency_s`, as if they had not started all at once.
    """

    def __init__(self, latency_s: float, spread: float = 0.0, staggered: int = 0) -> None:
        self._latency_s, self._spread, self._staggered = latency_s, spread, staggered
        self._version = self._begun = 0
        self._random = random.Random(0)

    @returns_payload
    async def generate(self, prompt: Prompt, params: SamplingParams) -> tuple[list[Completion], GenerationReport]:
        version = self._version
        if self._latency_s:
            await asyncio.sleep(self._next_latency_s())
        ids, logprobs = np.arange(_TOKENS), np.zeros(_TOKENS, dtype=np.float32)
        completion = Completion(ids, logprobs, ((version, _TOKENS),), "stop")
        report = GenerationReport(version, version, (_TOKENS,) * params.n, (False,) * params.n)
        return [completion] * params.n, report

    def _next_latency_s(self) -> float:
        self._begun += 1
        if self._begun <= self._staggered:
            return self._latency_s * self._begun / self._staggered
        return self._latency_s * self._random.uniform(1 - self._spread, 1 + self._spread)

    @replayed_on_join
    async def update_weights(self, weights: IdleWeights) -> GeneratorStats:
        self._version = weights.version
        return GeneratorStats(0.0, 0)


class IdleReward(_Idle):
    async def score(self, prompt: Prompt, completions: list[Completion], detail: str = "rewards") -> Scores:
        rewards = tuple(float(i % 2) for i in range(len(completions)))
        return Scores(rewards, {"task": rewards}, ())


class IdleTrainer(_Idle):
    def __init__(self) -> None:
        self._version = 0

    async def train_step(self, batch: Batch) -> dict[str, float]:
        ages = [self._version - group.oldest_version for group in batch.groups]
        self._version += 1
        return {"loss": 0.0, "policy_age/mean": float(np.mean(ages)), "policy_age/max": float(max(ages))}

    @returns_payload
    async def push_weights(self) -> tuple[IdleWeights, int]:
        return IdleWeights(self._version), self._version

    @returns_payload
    async def snapshot(self) -> tuple[int, int]:
        return self._version, self._version
