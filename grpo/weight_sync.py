"""New weights on their way from the trainer into every generator, one version after another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from grpo.config import RunConfig
from grpo.services import OnDemand, Services
from grpo.structured import Interrupted
from grpo.transport import make_transport
from grpo.types import GeneratorStats
from grpo.waiting import begin_activity, waiting_for

R = TypeVar("R")


class WeightSync:
    """The weights are copied between two train steps, and travel beside the next one.

    Tickets bound staleness: they come back when the weights are in use, however far the trainer is by then. It waits
    for the version before the one that it has, whose buffer is written to again. With `buffer.max_policy_age=0` it
    waits for every version: before, there is no batch to go on with.
    """

    def __init__(
        self, services: Services, config: RunConfig, tell: Callable[[str], None], tasks: asyncio.TaskGroup
    ) -> None:
        self._transport, self._tasks = make_transport(services, config, tell), tasks
        self._synchronous = config.buffer.max_policy_age == 0
        self._spreading: asyncio.Task[list[GeneratorStats]] | None = None
        self._finishing: asyncio.Task[None] | None = None

    async def publish(self, *, wait: bool = False) -> None:
        """Copy the trainer's weights as they are, once the version before is in use, and send them on their way.

        With `wait`, or synchronously, returns when they are live.
        """
        await self.done()
        await self._transport.take()
        self._spreading = self._tasks.create_task(_apart(self._transport.spread()), name="weights")
        if wait or self._synchronous:
            await self.live()

    async def live(self) -> list[GeneratorStats]:
        """Wait until every generator has acknowledged what was published."""
        assert self._spreading is not None
        with waiting_for("weights"):
            return await self._spreading

    def stored(self) -> OnDemand:
        """The weights that were published, for others to load."""
        return self._transport.stored()

    async def beside_next_step(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin `work`, which waits until they are live, and return; its errors end the run. If they are, do it now."""
        if self._spreading is not None and self._spreading.done():
            await work
            return
        self._finishing = self._tasks.create_task(_apart(_unless_interrupted(work)), name="step")

    async def done(self) -> None:
        """Wait until that is over."""
        if self._finishing is not None:
            with waiting_for("weights"):
                await asyncio.wait([self._finishing])
            self._finishing.result()


async def _unless_interrupted(work: Coroutine[Any, Any, None]) -> None:
    """A shutdown is no error: the training hears of it by itself."""
    with suppress(Interrupted):
        await work


async def _apart(work: Coroutine[Any, Any, R]) -> R:
    begin_activity("weights")
    return await work
