"""A generator of a simulation."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grpo.services import brings_up_to_date, returns_payload
from grpo.structured import Signal
from grpo.tuning.world import ShapedCompletions, World
from grpo.types import GenerationReport, GeneratorStats, Prompt, SamplingParams
from grpo.weights import Weights


@dataclass(eq=False)
class _Request:
    serial: int
    to_join: list[int]  # tokens of the completions that wait for a place
    left: list[int] = field(default_factory=list)  # tokens that the running ones have left
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    oldest_version: int = -1

    @property
    def begun(self) -> bool:
        return self.oldest_version >= 0


class SimulatedGenerator:
    """Continuous batching as the embedded engine does it, many tokens at a time while nobody comes or leaves."""

    def __init__(self, world: World) -> None:
        self._world, self._worker, self._version = world, world.generator(), 0
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
        await self._world.calls.begin()
        shape = self._world.shape(prompt.serial)
        request = _Request(prompt.serial, list(shape.lengths))
        self._waiting.append(request)
        self._wake()
        await request.done
        await self._world.calls.end()
        report = GenerationReport(
            request.oldest_version, self._version, shape.lengths, tuple(False for _ in shape.lengths)
        )
        return ShapedCompletions(shape), report

    @brings_up_to_date
    async def update_weights(self, weights: Weights) -> GeneratorStats:
        await self._world.calls.begin()
        loaded = asyncio.get_running_loop().create_future()
        self._updates.append((weights.version, loaded))
        self._wake()
        await loaded
        await asyncio.sleep(self._world.profile.step_call)
        await self._world.calls.end()
        return GeneratorStats(self.busy_s, self.tokens, str(id(self)))

    async def close(self) -> None:
        self._task.cancel()

    def _wake(self) -> None:
        self._arrived.notify()
        self._worker.changed.notify()

    async def _run(self) -> None:
        while True:
            await self._arrived.wait_for(lambda: self._waiting or self._running or self._updates)
            while self._waiting or self._running or self._updates:
                await self._load()
                joining = self._admit()
                await self._decode(once=bool(joining))
                await self._prefill(joining)

    async def _load(self) -> None:
        if self._can_load():
            version, loaded = self._updates.popleft()
            await self._work(self._world.profile.load)
            self._version = version
            loaded.set_result(None)

    def _admit(self) -> list[tuple[_Request, list[int]]]:
        """Completions that join, by group."""
        joining: list[tuple[_Request, list[int]]] = []
        while self._can_admit(joined := sum(len(lengths) for _, lengths in joining)):
            request = self._waiting[0]
            free = self._settings.max_sequences - self._rows - joined
            joining.append((request, request.to_join[:free]))
            request.to_join = request.to_join[free:]
            if not request.to_join:
                self._waiting.popleft()
        return joining

    def _can_load(self) -> bool:
        under_way = self._running or (self._waiting and self._waiting[0].begun)
        return bool(self._updates) and not (self._settings.weight_update == "drain" and under_way)

    def _can_admit(self, joining: int = 0) -> bool:
        free = self._rows + joining < self._settings.max_sequences
        return free and bool(self._waiting) and (not self._updates or self._waiting[0].begun)

    async def _decode(self, *, once: bool) -> None:
        """A token for every running completion, or as many as all of them have left if nobody comes before."""
        if not self._running:
            return
        least = min(min(request.left) for request in self._running)
        cost_s = self._world.profile.decode(self._rows)
        tokens = 1 if once else least
        if tokens > 1:  # the last of them, with which somebody leaves, is done below
            done_s = await self._work((tokens - 1) * cost_s, lambda: self._can_load() or self._can_admit())
            tokens = int(np.ceil(done_s / cost_s - 1e-6))
            await self._work(tokens * cost_s - done_s)
            self._count(tokens)
            if tokens < least - 1:
                return  # somebody came
        finished = sum(left == 1 for request in self._running for left in request.left)
        await self._work(self._world.profile.decode(self._rows, finished))
        self._count(1)

    async def _prefill(self, joining: list[tuple[_Request, list[int]]]) -> None:
        if joining:
            rows = sum(len(lengths) for _, lengths in joining)
            await self._work(self._world.profile.prefill(rows))
            self.tokens += rows
            for request, lengths in joining:
                if not request.begun:
                    request.oldest_version = self._version
                if request not in self._running:
                    self._running.append(request)
                request.left += [length - 1 for length in lengths]
            self._let_leave()

    def _count(self, tokens: int) -> None:
        """Every running completion is so many tokens longer."""
        self.tokens += tokens * self._rows
        for request in self._running:
            request.left = [left - tokens for left in request.left]
        self._let_leave()

    def _let_leave(self) -> None:
        """The completions that have all of their tokens; their groups, when these were the last."""
        for request in self._running:
            request.left = [left for left in request.left if left > 0]
            if not request.left and not request.to_join:
                request.done.set_result(None)
        self._running = [request for request in self._running if request.left]

    @property
    def _rows(self) -> int:
        return sum(len(request.left) for request in self._running)

    async def _work(self, seconds: float, *interrupted: Any) -> float:
        done_s = await self._worker.work(seconds, *interrupted)
        self.busy_s += done_s
        return done_s
