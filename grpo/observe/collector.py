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
from grpo.telemetry.recording import Recording, TelemetryBatch, record_in
from grpo.utils.aio import Signal, cancel_and_wait, gather_or_cancel

log = logging.getLogger(__name__)
_AT_MOST_EVERY_S = 2.0
_LAST_S = 5.0  # how long the last answers are waited for


class Source(Protocol):
    """A process that may have recorded something."""

    name: str

    async def drain(self, *, keep_recording: bool) -> TelemetryBatch: ...


class Sources(Protocol):
    def processes(self) -> Iterable[Source]:
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
        await cancel_and_wait([task])
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
        keep_recording = not last and self._timeline is not None and not self._timeline.full
        await gather_or_cancel(
            *(self._collect_from(source, keep_recording=keep_recording) for source in self._services.processes())
        )
        self._take("driver", self._driver.drain(keep_recording=keep_recording))

    async def _collect_from(self, source: Source, *, keep_recording: bool) -> None:
        asked_s = time.perf_counter()
        try:
            drain = await source.drain(keep_recording=keep_recording)
        except InfrastructureError as error:  # its service sees to that
            log.info("nothing recorded comes from %s: %s", source.name, error)
            return
        if self._timeline is not None:
            self._timeline.clocks.answered(source.name, asked_s, drain.clock_s, time.perf_counter())
        self._take(source.name, drain)

    def _take(self, process: str, drain: TelemetryBatch) -> None:
        self._metrics.merge(drain.metrics)
        if self._timeline is not None:
            self._timeline.add(process, drain)
