"""Simulated actors: they take as long as a profile says and compute nothing. The real driver loop runs on them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grpo.actors.marks import replayed_on_join, returns_payload
from grpo.actors.replay_buffer import ReplayBuffer
from grpo.tuning.machine import Servers, ShapedCompletions, World
from grpo.types import (
    Batch,
    BatchReport,
    GenerationReport,
    GeneratorStats,
    Group,
    Problem,
    Prompt,
    PromptBatch,
    SamplingParams,
    Scores,
    Ticket,
)
from grpo.utils.aio import Signal
from grpo.weights.payload import Weights

_NO_TOKENS = np.zeros(1, dtype=np.int64)
_NO_WEIGHTS = np.zeros(1, dtype=np.uint8)


def simulated_actors(world: World) -> dict[str, Any]:
    """Return the actors by name for `launch_local`; each replica of the generator is made separately."""
    return {
        "generator": lambda: SimulatedGenerator(world),
        "dataloader": _Dataloader(world),
        "reward": _Reward(world),
        "reference": _Reference(world),
        "replay_buffer": _ReplayBuffer(world),
        "trainer": _Trainer(world),
    }


@dataclass(eq=False)
class _Request:
    serial: int
    to_join: list[int]  # tokens of the completions that wait for a place in the batch
    left: list[int] = field(default_factory=list)  # tokens that the running completions have left
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    oldest_version: int = -1

    @property
    def started(self) -> bool:
        return self.oldest_version >= 0


class SimulatedGenerator:
    """Continuous batching as in the torch engine, many tokens at a time while the batch doesn't change."""

    def __init__(self, world: World) -> None:
        self._world, self._worker, self._version = world, world.add_generator(), 0
        self._settings = world.config.generator
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._updates: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._arrived = Signal()
        self.busy_s, self.tokens = 0.0, 0

    async def setup(self) -> None:
        self._task = asyncio.create_task(self._run())

    @returns_payload
    async def generate(self, prompt: Prompt, params: SamplingParams) -> tuple[ShapedCompletions, GenerationReport]:
        async with self._world.calls.overhead():
            shape = self._world.shape(prompt.serial)
            request = _Request(prompt.serial, list(shape.lengths))
            self._waiting.append(request)
            self._wake()
            await request.done
        report = GenerationReport(
            request.oldest_version, self._version, shape.lengths, tuple(False for _ in shape.lengths)
        )
        return ShapedCompletions(shape), report

    @replayed_on_join
    async def update_weights(self, weights: Weights) -> GeneratorStats:
        async with self._world.calls.overhead():
            loaded = asyncio.get_running_loop().create_future()
            self._updates.append((weights.version, loaded))
            self._wake()
            await loaded
            await asyncio.sleep(self._world.profile.step_call)
        return GeneratorStats(self.busy_s, self.tokens, str(id(self)))

    async def close(self) -> None:
        self._task.cancel()

    def _wake(self) -> None:
        self._arrived.notify()
        self._worker.changed.notify()

    async def _run(self) -> None:
        """Decode batch after batch.

        Consumes: requests and weight updates.
        Waits for: a request or an update, then for the worker.
        Unblocked by: `generate` and `update_weights`.
        Ends when: cancelled by `close`.
        """
        while True:
            await self._arrived.wait_for(lambda: self._waiting or self._running or self._updates)
            while self._waiting or self._running or self._updates:
                await self._load_weights()
                joining = self._admit()
                await self._decode(once=bool(joining))
                await self._prefill(joining)

    async def _load_weights(self) -> None:
        if self._can_load():
            version, loaded = self._updates.popleft()
            await self._work(self._world.profile.load)
            self._version = version
            loaded.set_result(None)

    def _can_load(self) -> bool:
        in_progress = self._running or (self._waiting and self._waiting[0].started)
        return bool(self._updates) and not (self._settings.weight_update == "drain" and in_progress)

    def _admit(self) -> list[tuple[_Request, list[int]]]:
        """Return the completions that join the batch, by request."""
        joining: list[tuple[_Request, list[int]]] = []
        while self._can_admit(joined := sum(len(lengths) for _, lengths in joining)):
            request = self._waiting[0]
            free = self._settings.max_sequences - self._batch_size - joined
            joining.append((request, request.to_join[:free]))
            request.to_join = request.to_join[free:]
            if not request.to_join:
                self._waiting.popleft()
        return joining

    def _can_admit(self, joining: int = 0) -> bool:
        has_room = self._batch_size + joining < self._settings.max_sequences
        return has_room and bool(self._waiting) and (not self._updates or self._waiting[0].started)

    async def _decode(self, *, once: bool) -> None:
        """Decode one token of every running completion, or, if nothing joins, until the first completion ends."""
        if not self._running:
            return
        least = min(min(request.left) for request in self._running)
        cost_s = self._world.profile.decode(self._batch_size)
        tokens = 1 if once else least
        if tokens > 1:
            # All tokens but the last, after which a completion ends. An arrival interrupts after a whole token.
            done_s = await self._work((tokens - 1) * cost_s, lambda: self._can_load() or self._can_admit())
            tokens = int(np.ceil(done_s / cost_s - 1e-6))
            await self._work(tokens * cost_s - done_s)
            self._advance(tokens)
            if tokens < least - 1:
                return
        finished = sum(left == 1 for request in self._running for left in request.left)
        await self._work(self._world.profile.decode(self._batch_size, finished))
        self._advance(1)

    async def _prefill(self, joining: list[tuple[_Request, list[int]]]) -> None:
        if joining:
            count = sum(len(lengths) for _, lengths in joining)
            await self._work(self._world.profile.prefill(count))
            self.tokens += count
            for request, lengths in joining:
                if not request.started:
                    request.oldest_version = self._version
                if request not in self._running:
                    self._running.append(request)
                request.left += [length - 1 for length in lengths]
            self._remove_finished()

    def _advance(self, tokens: int) -> None:
        """Lengthen every running completion by `tokens`."""
        self.tokens += tokens * self._batch_size
        for request in self._running:
            request.left = [left - tokens for left in request.left]
        self._remove_finished()

    def _remove_finished(self) -> None:
        """Remove completions that have all of their tokens; a request is done with its last one."""
        for request in self._running:
            request.left = [left for left in request.left if left > 0]
            if not request.left and not request.to_join:
                request.done.set_result(None)
        self._running = [request for request in self._running if request.left]

    @property
    def _batch_size(self) -> int:
        return sum(len(request.left) for request in self._running)

    async def _work(self, seconds: float, interrupted: Callable[[], bool] = lambda: False) -> float:
        done_s = await self._worker.work(seconds, interrupted)
        self.busy_s += done_s
        return done_s


class _Dataloader:
    def __init__(self, world: World) -> None:
        self._calls = world.calls

    async def sample(self, first: int, count: int, without: frozenset[int] = frozenset()) -> PromptBatch:
        async with self._calls.overhead():
            prompts = [Prompt(serial, Problem("", ""), _NO_TOKENS) for serial in range(first, first + count)]
        return PromptBatch(tuple(prompts), first + count)


class _Reward:
    def __init__(self, world: World) -> None:
        self._world, config = world, world.config.reward
        self._servers = Servers(config.workers * config.replicas)

    async def score(self, prompt: Prompt, completions: ShapedCompletions, detail: str) -> Scores:
        async with self._world.calls.overhead():
            seconds = self._world.profile.score
            await self._servers.serve(seconds[prompt.serial % len(seconds)])
        rewards = (float(completions.shape.signal), *(0.0 for _ in completions.shape.lengths[1:]))
        return Scores(rewards, {"task": rewards}, ())


class _Reference:
    def __init__(self, world: World) -> None:
        self._world, self._servers = world, Servers(world.config.reference.replicas)

    @returns_payload
    async def logprobs(self, prompt: Prompt, completions: ShapedCompletions) -> tuple[None, int]:
        async with self._world.calls.overhead():
            seconds = self._world.profile.reference
            await self._servers.serve(seconds[prompt.serial % len(seconds)])
        return None, 0


class _ReplayBuffer(ReplayBuffer):
    """The real replay buffer, behind calls that take time."""

    def __init__(self, world: World) -> None:
        super().__init__(world.config.buffer.reorder_window)
        self._calls, self._step_call_s = world.calls, world.profile.step_call

    async def add(self, ticket: Ticket, group: Group) -> None:
        async with self._calls.overhead():
            await super().add(ticket, group)

    @returns_payload
    async def sample(self, count: int) -> tuple[Batch, BatchReport]:
        async with self._calls.overhead():
            batch, report = await super().sample(count)
            await asyncio.sleep(self._step_call_s)
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
        async with self._world.calls.overhead():
            async with self._one_at_a_time:
                await self._world.trainer.work(seconds)
            await asyncio.sleep(self._world.profile.step_call)
