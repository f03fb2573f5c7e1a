"""Collect what the actors and the driver recorded.

Spans go into the timeline, metrics into the next line, warnings to the user.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import NoReturn, Protocol

from grpo.errors import InfrastructureError
from grpo.observe.timeline import Timeline
from grpo.telemetry.metrics import MetricSet
from grpo.telemetry.recording import Recording, TelemetryBatch, record_in
from grpo.utils.aio import Signal, cancel_and_wait, gather_or_cancel

log = logging.getLogger(__name__)
_MIN_INTERVAL_S = 2.0
_LAST_TIMEOUT_S = 5.0  # for the last batches, when the run ends


class Source(Protocol):
    """A process that may have recorded something."""

    name: str

    async def drain(self, *, keep_recording: bool) -> TelemetryBatch: ...


class Sources(Protocol):
    def processes(self) -> Iterable[Source]:
        """Return the processes that answer at the moment."""
        ...


@asynccontextmanager
async def collecting(
    services: Sources,
    step_trained: Signal,
    metrics: MetricSet,
    timeline: Timeline | None,
    warn: Callable[[str], object] = log.warning,
) -> AsyncIterator[None]:
    """Record the block and all actors; metrics are merged into `metrics`, spans written to the timeline, if any.
    `warn` is called with every warning, which begins with the name of its process.

    A process is asked at most once per step and every 2 s. What a process recorded since then is lost when it dies.
    """
    collector = _Collector(services, metrics, timeline, warn)
    await collector.collect()
    task = asyncio.create_task(collector.run(step_trained), name="collector")
    try:
        yield
    finally:
        await cancel_and_wait([task])
        try:
            async with asyncio.timeout(_LAST_TIMEOUT_S):
                await collector.collect(last=True)
        except TimeoutError:
            log.warning("the end of the timeline is missing: an actor sent nothing within %g s", _LAST_TIMEOUT_S)
        if timeline is not None:
            timeline.close()


class _Collector:
    def __init__(
        self, services: Sources, metrics: MetricSet, timeline: Timeline | None, warn: Callable[[str], object]
    ) -> None:
        self._services, self._metrics, self._timeline, self._warn = services, metrics, timeline, warn
        self._driver = Recording(on=timeline is not None)
        record_in(self._driver)

    async def run(self, step_trained: Signal) -> NoReturn:
        """Collect after each step.

        Consumes: the telemetry of the driver and of every process that answers.
        Waits for: 2 s, then the next trained step.
        Unblocked by: `step_trained`.
        Ends when: cancelled at the end of the run.
        """
        while True:
            await asyncio.sleep(_MIN_INTERVAL_S)
            await step_trained.wait()
            await self.collect()

    async def collect(self, *, last: bool = False) -> None:
        keep_recording = not last and self._timeline is not None and not self._timeline.full
        await gather_or_cancel(
            *(self._collect_from(source, keep_recording=keep_recording) for source in self._services.processes())
        )
        self._store("driver", self._driver.drain(keep_recording=keep_recording))

    async def _collect_from(self, source: Source, *, keep_recording: bool) -> None:
        asked_s = time.perf_counter()
        try:
            batch = await source.drain(keep_recording=keep_recording)
        except InfrastructureError as error:  # its service replaces it
            log.info("no telemetry from %s: %s", source.name, error)
            return
        if self._timeline is not None:
            self._timeline.clocks.answered(source.name, asked_s, batch.clock_s, time.perf_counter())
        self._store(source.name, batch)

    def _store(self, process: str, batch: TelemetryBatch) -> None:
        self._metrics.merge(batch.metrics)
        for message in batch.warnings:
            self._warn(f"{process}: {message}")
        if self._timeline is not None:
            self._timeline.add(process, batch)
