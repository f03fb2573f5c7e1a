"""Actors that do no work, each in a separate process: the time of a run is then the overhead of grpo and Ray.

The module imports neither torch nor grpo's engines, because every figure starts five such processes.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from grpo.actors.marks import batched, replayed_on_join, returns_payload
from grpo.environments.base import Message, Opening, Reply
from grpo.types import (
    Batch,
    Completion,
    GenerationReport,
    GeneratorStats,
    Ints,
    Problem,
    Prompt,
    PromptBatch,
    SamplingParams,
    Scores,
)

_TOKENS = 32
_END = 1  # the end-of-sequence token of the tiny model


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


@dataclass(frozen=True)
class EpisodeTimes:
    """How long everything in an episode takes, drawn from the seed of its group.

    A turn of the policy lasts `turn_s` within 20%. Half of the replies come at once, as those of a calculator do; four
    of ten take as long as a turn, and one of ten four times as long. The groups up to number `staggered` are shorter,
    so that they end at even intervals, as if they had not started all at once.
    """

    turns: int
    turn_s: float
    staggered: int

    def turn(self, seed: int, episode: int, turn: int) -> float:
        return self._scale(seed) * self.turn_s * random.Random(f"{seed} {episode} {turn}").uniform(0.8, 1.2)

    def reply(self, seed: int, turn: int) -> float:
        """Return the seconds that the environment takes, which is the same for all episodes of a group."""
        drawn = random.Random(f"{seed} {turn}").random()
        return self._scale(seed) * self.turn_s * (0.0 if drawn < 0.5 else 1.0 if drawn < 0.9 else 4.0)

    def group(self, seed: int, size: int) -> float:
        """Return the seconds until the last episode of a group is over. Its first turns are sampled together."""
        turns = [sum(self.turn(seed, episode, turn) for turn in range(1, self.turns)) for episode in range(size)]
        return self.turn(seed, 0, 0) + max(turns) + sum(self.reply(seed, turn) for turn in range(self.turns))

    def _scale(self, seed: int) -> float:
        serial = seed & (1 << 40) - 1
        return (serial + 1) / self.staggered if serial < self.staggered else 1.0


class TurnGenerator(IdleGenerator):
    """Sample turns of equal length, each in its own time."""

    def __init__(self, times: EpisodeTimes) -> None:
        super().__init__(0.0)
        self._times = times

    @batched
    async def sample(self, prompt_ids: Ints, params: SamplingParams) -> list[Completion]:
        version, turn = self._version, params.first_token // _TOKENS
        await asyncio.sleep(self._times.turn(params.seed, params.first_sample, turn))
        ids, logprobs = np.full(_TOKENS, 4), np.zeros(_TOKENS, dtype=np.float32)
        ids[-1] = _END
        return [Completion(ids, logprobs, ((version, _TOKENS),), "stop")] * params.n


class WaitingTask:
    """A task whose environments only wait."""

    def __init__(self, **times: Any) -> None:
        self._times = EpisodeTimes(**times)

    def problems(self, split: str) -> list[Problem]:
        return []

    def environment(self, problem: Problem, seed: int) -> WaitingEnvironment:
        return WaitingEnvironment(self._times, seed)


class WaitingEnvironment:
    def __init__(self, times: EpisodeTimes, seed: int) -> None:
        self._times, self._seed, self._turn = times, seed, 0

    async def begin(self) -> Opening:
        return Opening((Message("user", "question"),))

    async def reply(self, said: Message) -> Reply:
        await asyncio.sleep(self._times.reply(self._seed, self._turn))
        self._turn += 1
        return Reply((Message("user", "answer"),), done=self._turn == self._times.turns, reward=self._turn % 2)


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
