"""The simulated machine: workers that slow each other down, costs of calls, and the world of one simulation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

from grpo.config.schema import RunConfig
from grpo.tuning.profile import GroupShape, Profile
from grpo.utils.aio import Signal

_NEGLIGIBLE_S = 1e-9


class Worker:
    """A compute resource. `busy` is true while it works; `slows` lists the workers that this one slows down."""

    def __init__(self, speed: Callable[[], float]) -> None:
        """`speed` returns 1, or less while other workers interfere."""
        self.busy, self.changed = False, Signal()
        self.slows: list[Worker] = []
        self._speed = speed

    async def work(self, seconds: float, interrupted: Callable[[], bool] = lambda: False) -> float:
        """Work for `seconds` at speed 1, or until `interrupted()`; return the seconds' worth of work done.

        Waits for: the time that the rest takes at the present speed.
        Unblocked by: `changed`, when another worker starts or stops, or there may be reason to interrupt.
        """
        done_s, now = 0.0, asyncio.get_running_loop().time
        with self._busy():
            while seconds - done_s > _NEGLIGIBLE_S and not interrupted():
                speed, started = self._speed(), now()
                with suppress(TimeoutError):
                    async with asyncio.timeout((seconds - done_s) / speed):
                        await self.changed.wait()
                done_s += (now() - started) * speed
        return done_s

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self.busy = True
        self._notify_slowed()
        try:
            yield
        finally:
            self.busy = False
            self._notify_slowed()

    def _notify_slowed(self) -> None:
        for other in self.slows:
            other.changed.notify()


class Servers:
    """A number of servers with one queue, first come first served."""

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)

    async def serve(self, seconds: float) -> None:
        async with self._free:
            await asyncio.sleep(seconds)


class Calls:
    """The overhead of remote calls: a part that occupies the driver, and a part that passes in parallel."""

    def __init__(self, seconds: float, driver_s: float) -> None:
        self._transit_s, self._driver_s = max(0.0, seconds - driver_s), driver_s
        self._driver = Servers(1)

    @asynccontextmanager
    async def overhead(self) -> AsyncIterator[None]:
        """Spend half of the overhead before the block and half after it."""
        await self._driver.serve(self._driver_s / 2)
        await asyncio.sleep(self._transit_s / 2)
        yield
        await asyncio.sleep(self._transit_s / 2)
        await self._driver.serve(self._driver_s / 2)


class World:
    """Shared state of the simulated actors: profile, config, workers and calls."""

    def __init__(self, profile: Profile, config: RunConfig) -> None:
        self.profile, self.config = profile, config
        self.calls = Calls(profile.call, profile.call_driver)
        self.trainer = Worker(self._trainer_speed)
        self.generators: list[Worker] = []

    def add_generator(self) -> Worker:
        worker = Worker(lambda: 1 / (1 + self.profile.decode_slowed * self.trainer.busy))
        self.generators.append(worker)
        if self.profile.train_slowed:
            worker.slows.append(self.trainer)
        if self.profile.decode_slowed:
            self.trainer.slows.append(worker)
        return worker

    def shape(self, serial: int) -> GroupShape:
        """Return the shape of the group of a prompt."""
        groups = self.profile.groups
        return groups[serial % len(groups)].of_size(self.config.rollout.group_size)

    def _trainer_speed(self) -> float:
        busy = sum(worker.busy for worker in self.generators) / max(1, len(self.generators))
        return 1 / (1 + self.profile.train_slowed * busy)


@dataclass(frozen=True)
class _Tokens:
    sampled_count: int


@dataclass(frozen=True)
class ShapedCompletions:
    """Completions that have a number of tokens, but no tokens."""

    shape: GroupShape

    def __iter__(self) -> Iterator[_Tokens]:
        return map(_Tokens, self.shape.lengths)
