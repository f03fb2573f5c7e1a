"""New weights on their way from the trainer into every generator, one version after another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from grpo.config import RunConfig
from grpo.services import Services
from grpo.transport import make_transport
from grpo.types import GeneratorStats
from grpo.waiting import begin_activity

R = TypeVar("R")


class WeightSync:
    """The weights are copied between two train steps, and travel beside the next one.

    Tickets bound staleness: they come back when the weights are in use, however far the trainer is by then. It waits
    only for the version before the one that it has, whose buffer is written to again, and with
    `buffer.max_policy_age=0` for every one: before, there is no batch to go on with.
    """

    def __init__(
        self, services: Services, config: RunConfig, tell: Callable[[str], None], tasks: asyncio.TaskGroup
    ) -> None:
        self._transport, self._tasks = make_transport(services, config, tell), tasks
        self._synchronous = config.buffer.max_policy_age == 0
        self._spreading: asyncio.Task[list[GeneratorStats]] | None = None
        self._finishing: asyncio.Task[None] | None = None

    async def publish(self) -> None:
        """Copy the trainer's weights as they are, once the version before is in use; then they are on their way."""
        await self.done()
        await self._transport.take()
        self._spreading = self._tasks.create_task(_apart(self._transport.spread()), name="weights")

    async def live(self) -> list[GeneratorStats]:
        """Wait until every generator has acknowledged what was published."""
        assert self._spreading is not None
        return await self._spreading

    async def reference(self) -> Any:
        """To the weights that were published, for others to load."""
        return await self._transport.reference()

    async def beside_next_step(self, work: Coroutine[Any, Any, None], *, unless: bool) -> None:
        """Begin `work`, which waits until they are live, and return; its errors end the run. Or wait for it."""
        if unless or self._synchronous:
            await work
            return
        self._finishing = self._tasks.create_task(_apart(work), name="step")

    async def done(self) -> None:
        """Wait until that is over."""
        if self._finishing is not None:
            await asyncio.wait([self._finishing])
            self._finishing.result()


async def _apart(work: Coroutine[Any, Any, R]) -> R:
    begin_activity("weights")
    return await work
