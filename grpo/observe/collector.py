"""Brings together what the actors and the driver have recorded: spans into the timeline, metrics into the next line."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import NoReturn, Protocol

from grpo.errors import InfrastructureError
from grpo.observe.timeline import Timeline
from grpo.telemetry.metrics import MetricSet
from grpo.telemetry.recording import Harvest, Recording, record_in
from grpo.utils.aio import Signal, cancelled, together

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
async def collecting(
    services: Sources, step_trained: Signal, metrics: MetricSet, timeline: Timeline | None
) -> AsyncIterator[None]:
    """Record the block and all actors; their metrics are merged into `metrics`, spans go into the timeline if there is.

    One call per process and step at most, and not more often than every 2 s. A process that dies takes with it what it
    had not delivered.
    """
    collector = _Collector(services, metrics, timeline)
    await collector.collect()
    task = asyncio.create_task(collector.run(step_trained), name="collector")
    try:
        yield
    finally:
        await cancelled([task])
        try:
            async with asyncio.timeout(_LAST_S):
                await collector.collect(last=True)
        except TimeoutError:
            log.warning("the end of the timeline is missing: an actor did not deliver it within %g s", _LAST_S)
        if timeline is not None:
            timeline.close()


class _Collector:
    def __init__(self, services: Sources, metrics: MetricSet, timeline: Timeline | None) -> None:
        self._services, self._metrics, self._timeline = services, metrics, timeline
        self._driver = Recording(on=timeline is not None)
        record_in(self._driver)

    async def run(self, step_trained: Signal) -> NoReturn:
        while True:
            await asyncio.sleep(_AT_MOST_EVERY_S)
            await step_trained.wait()
            await self.collect()

    async def collect(self, *, last: bool = False) -> None:
        go_on = not last and self._timeline is not None and not self._timeline.full
        await together(*(self._collect_from(source, go_on=go_on) for source in self._services.sources()))
        self._take("driver", self._driver.harvest(go_on=go_on))

    async def _collect_from(self, source: Source, *, go_on: bool) -> None:
        asked_s = time.perf_counter()
        try:
            harvest = await source.harvest(go_on=go_on)
        except InfrastructureError as error:  # its service sees to that
            log.info("nothing recorded comes from %s: %s", source.name, error)
            return
        if self._timeline is not None:
            self._timeline.clocks.answered(source.name, asked_s, harvest.clock_s, time.perf_counter())
        self._take(source.name, harvest)

    def _take(self, process: str, harvest: Harvest) -> None:
        self._metrics.merge(harvest.metrics)
        if self._timeline is not None:
            self._timeline.add(process, harvest)
