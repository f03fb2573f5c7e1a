"""Work that takes time in a simulation, and more of it while others work on the same cores."""

# MERGED: What the actors of a simulation share: the profile, who computes at the moment, what calls cost; and
# completions.

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from grpo.config.schema import RunConfig
from grpo.tuning.profile import GroupShape, Profile
from grpo.utils.aio import Signal

_NOTHING_S = 1e-9


class Worker:
    """Somebody who computes. `busy` tells; others who feel it are woken."""

    def __init__(self, speed: Callable[[], float]) -> None:
        """`speed` is 1, or less while others are in the way."""
        self.busy, self.changed = False, Signal()
        self.felt_by: list[Worker] = []
        self._speed = speed

    async def work(self, seconds: float, interrupted: Callable[[], bool] = lambda: False) -> float:
        """Do work that takes `seconds` at speed 1, or the part of it until `interrupted` after a change; says how much.

        A change is what `changed` tells: of others, or of what there is to do.
        """
        done_s, now = 0.0, asyncio.get_running_loop().time
        with self._busy():
            while seconds - done_s > _NOTHING_S and not interrupted():
                speed, began = self._speed(), now()
                with suppress(TimeoutError):
                    async with asyncio.timeout((seconds - done_s) / speed):
                        await self.changed.wait()
                done_s += (now() - began) * speed
        return done_s

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self._become(busy=True)
        try:
            yield
        finally:
            self._become(busy=False)

    def _become(self, *, busy: bool) -> None:
        self.busy = busy
        for other in self.felt_by:
            other.changed.notify()


class Line:
    """So many at a time, first come first served."""

    def __init__(self, workers: int) -> None:
        self._places = asyncio.Semaphore(workers)

    async def served(self, seconds: float) -> None:
        async with self._places:
            await asyncio.sleep(seconds)


class Calls:
    """What a call costs beside the work: a part in which the driver does nothing else, and the way."""

    def __init__(self, seconds: float, driver_s: float) -> None:
        self._way_s, self._driver_s = max(0.0, seconds - driver_s), driver_s
        self._driver = Line(1)

    async def begin(self) -> None:
        await self._driver.served(self._driver_s / 2)
        await asyncio.sleep(self._way_s / 2)

    async def end(self) -> None:
        await asyncio.sleep(self._way_s / 2)
        await self._driver.served(self._driver_s / 2)


class World:
    """What the actors of one simulation share."""

    def __init__(self, profile: Profile, config: RunConfig) -> None:
        self.profile, self.config = profile, config
        self.calls = Calls(profile.call, profile.call_driver)
        self.trainer = Worker(self._speed_of_trainer)
        self.generators: list[Worker] = []

    def generator(self) -> Worker:
        worker = Worker(lambda: 1 / (1 + self.profile.decode_slowed * self.trainer.busy))
        self.generators.append(worker)
        if self.profile.train_slowed:
            worker.felt_by.append(self.trainer)
        if self.profile.decode_slowed:
            self.trainer.felt_by.append(worker)
        return worker

    def shape(self, serial: int) -> GroupShape:
        """That of the group of a prompt."""
        groups = self.profile.groups
        return groups[serial % len(groups)].of_size(self.config.rollout.group_size)

    def _speed_of_trainer(self) -> float:
        busy = sum(worker.busy for worker in self.generators) / max(1, len(self.generators))
        return 1 / (1 + self.profile.train_slowed * busy)


@dataclass(frozen=True)
class _Tokens:
    token_ids: range


@dataclass(frozen=True)
class ShapedCompletions:
    """Of which only the number of tokens can be read."""

    shape: GroupShape

    def __iter__(self) -> Iterator[_Tokens]:
        return (_Tokens(range(length)) for length in self.shape.lengths)
