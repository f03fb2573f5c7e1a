"""Actors that take as long as a profile says and do nothing: the real loop runs on them in virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from grpo.actors.replay_buffer import ReplayBuffer
from grpo.services import returns_payload
from grpo.tuning.generator import SimulatedGenerator
from grpo.tuning.machine import Line
from grpo.tuning.world import ShapedCompletions, World
from grpo.types import Batch, BatchReport, Group, Problem, Prompt, PromptBatch, Scores, Ticket
from grpo.weights import Weights

_NO_TOKENS = np.zeros(1, dtype=np.int64)
_NO_WEIGHTS = np.zeros(1, dtype=np.uint8)


def simulated_actors(world: World) -> dict[str, Any]:
    """By name, as `launch_local` takes them: every replica of the generator is one of its own."""
    return {
        "generator": lambda: SimulatedGenerator(world),
        "dataloader": _Dataloader(world),
        "reward": _Reward(world),
        "reference": _Reference(world),
        "replay_buffer": _ReplayBuffer(world),
        "trainer": _Trainer(world),
    }


class _Dataloader:
    def __init__(self, world: World) -> None:
        self._calls = world.calls

    async def sample(self, first: int, count: int, without: frozenset[int] = frozenset()) -> PromptBatch:
        await self._calls.begin()
        prompts = [Prompt(serial, Problem("", ""), _NO_TOKENS) for serial in range(first, first + count)]
        await self._calls.end()
        return PromptBatch(tuple(prompts), first + count)


class _Reward:
    def __init__(self, world: World) -> None:
        self._world, config = world, world.config.reward
        self._line = Line(config.workers * config.replicas)

    async def score(self, prompt: Prompt, completions: ShapedCompletions, detail: str) -> Scores:
        await self._world.calls.begin()
        seconds = self._world.profile.score
        await self._line.served(seconds[prompt.serial % len(seconds)])
        await self._world.calls.end()
        rewards = (float(completions.shape.signal), *(0.0 for _ in completions.shape.lengths[1:]))
        return Scores(rewards, {"task": rewards}, ())


class _Reference:
    def __init__(self, world: World) -> None:
        self._world, self._line = world, Line(world.config.reference.replicas)

    @returns_payload
    async def logprobs(self, prompt: Prompt, completions: ShapedCompletions) -> tuple[None, int]:
        await self._world.calls.begin()
        seconds = self._world.profile.reference
        await self._line.served(seconds[prompt.serial % len(seconds)])
        await self._world.calls.end()
        return None, 0


class _ReplayBuffer(ReplayBuffer):
    """The real one; calls take their time."""

    def __init__(self, world: World) -> None:
        super().__init__(world.config.buffer.window)
        self._calls, self._step_call_s = world.calls, world.profile.step_call

    async def add(self, ticket: Ticket, group: Group) -> None:
        await self._calls.begin()
        await super().add(ticket, group)
        await self._calls.end()

    @returns_payload
    async def sample(self, count: int) -> tuple[Batch, BatchReport]:
        await self._calls.begin()
        batch, report = await super().sample(count)
        await asyncio.sleep(self._step_call_s)
        await self._calls.end()
        return batch, report


class _Trainer:
    def __init__(self, world: World) -> None:
        self._world, self._version = world, 0
        self._one_at_a_time = asyncio.Lock()

    async def train_step(self, batch: Batch) -> dict[str, float]:
        tokens = sum(group.completions.shape.tokens_trained for group in batch.groups)  # type: ignore[attr-defined]
        await self._work(self._world.profile.train(tokens))
        ages = [self._version - group.oldest_version for group in batch.groups]
        self._version += 1
        return {"policy_age/mean": float(np.mean(ages)), "policy_age/max": float(max(ages))}

    @returns_payload
    async def push_weights(self) -> tuple[Weights, int]:
        await self._work(self._world.profile.publish)
        return Weights(self._version, (), _NO_WEIGHTS), self._version

    @returns_payload
    async def snapshot(self) -> tuple[int, int]:
        await self._work(self._world.profile.snapshot)
        return self._version, self._version

    async def _work(self, seconds: float) -> None:
        await self._world.calls.begin()
        async with self._one_at_a_time:
            await self._world.trainer.work(seconds)
        await asyncio.sleep(self._world.profile.step_call)
        await self._world.calls.end()
