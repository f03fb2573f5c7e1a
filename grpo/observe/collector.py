"""Brings together what the actors have recorded."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import NoReturn, Protocol

from grpo.observe.timeline import Timeline
from grpo.spans import Harvest, Spans, record_in
from grpo.structured import Signal, cancelled, together
from grpo.types import InfrastructureError

log = logging.getLogger(__name__)

_AT_MOST_EVERY_S = 2.0
_LAST_S = 5.0  # how long the last answers are waited for


class Source(Protocol):
    """A process that may have recorded something."""

    name: str

    async def harvest(self, *, go_on: bool) -> Harvest: ...


class Sources(Protocol):
    def sources(self) -> Iterable[Source]:
        """Those that answer at the moment."""
        ...


@asynccontextmanager
async def collecting(services: Sources, timeline: Timeline, step_trained: Signal) -> AsyncIterator[None]:
    """Record the block and all actors. One call per process and step at most, and not more often than every 2 s.

    A process that dies takes with it what it had not delivered.
    """
    spans = Spans(on=True)
    record_in(spans)
    collector = _Collector(services, timeline, spans)
    await collector.collect(go_on=True)
    task = asyncio.create_task(collector.run(step_trained), name="collector")
    try:
        yield
    finally:
        await cancelled([task])
        try:
            async with asyncio.timeout(_LAST_S):
                await collector.collect(go_on=False)
        except TimeoutError:
            log.warning("the end of the timeline is missing: an actor did not deliver it within %g s", _LAST_S)
        timeline.close()


class _Collector:
    def __init__(self, services: Sources, timeline: Timeline, spans: Spans) -> None:
        self._services, self._timeline, self._spans = services, timeline, spans

    async def run(self, step_trained: Signal) -> NoReturn:
        while True:
            await asyncio.sleep(_AT_MOST_EVERY_S)
            await step_trained.wait()
            await self.collect(go_on=not self._timeline.full)

    async def collect(self, *, go_on: bool) -> None:
        await together(*(self._collect_from(source, go_on=go_on) for source in self._services.sources()))
        self._timeline.add("driver", self._spans.harvest(go_on=go_on))

    async def _collect_from(self, source: Source, *, go_on: bool) -> None:
        asked_s = time.perf_counter()
        try:
            harvest = await source.harvest(go_on=go_on)
        except InfrastructureError as error:  # its service sees to that
            log.info("nothing recorded comes from %s: %s", source.name, error)
            return
        self._timeline.clocks.answered(source.name, asked_s, harvest.clock_s, time.perf_counter())
        self._timeline.add(source.name, harvest)
