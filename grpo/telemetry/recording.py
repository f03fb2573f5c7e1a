"""Spans, metrics and warnings that an actor, or the driver, records until they are collected.

    with span("decode", rows=12): ...
    measure("generator/queue_s", waited_s, "percentiles")
    warn("the disk is nearly full")

Every actor and the driver have their own `Recording`. The context of a piece of work decides which one it records in,
so several actors in one process are kept apart too. While spans are off, `span` costs one lookup.
"""

from __future__ import annotations

import heapq
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from grpo.telemetry.metrics import MetricSet

_MAX_SPANS = 100_000  # kept between two collections


class Span(NamedTuple):
    """An interval of work on one lane of a track. Spans of one lane follow one another or nest.

    `begin_s` and `end_s` are of time.perf_counter, whose zero differs between machines. `failed`: the block raised.
    """

    track: str
    lane: int
    name: str
    kind: str
    begin_s: float
    end_s: float
    failed: bool
    args: dict[str, Any]


@dataclass(frozen=True)
class TelemetryBatch:
    """Everything recorded since the last batch, the clock at that moment, and the number of dropped spans."""

    spans: list[Span]
    metrics: MetricSet
    clock_s: float
    lost: int
    warnings: tuple[str, ...] = ()


class Recording:
    """Telemetry of one actor or of the driver. Metrics are always kept; spans only while `on`, which `drain` sets.

    Example:
        recording = Recording(on=True)
        record_in(recording)
        with span("decode", rows=12):
            measure("generator/batch_size", 12)
        batch = recording.drain(keep_recording=True)     # batch.spans[0].name == "decode"
    """

    def __init__(self, *, on: bool = False) -> None:
        self.on = on
        self.metrics = MetricSet()
        self._spans: list[Span] = []
        self._warnings: dict[str, bool] = {}  # in their order; True once drained
        self._lost = 0
        self._lanes: dict[str, _Lanes] = defaultdict(_Lanes)

    def add(self, span: Span) -> None:
        if len(self._spans) < _MAX_SPANS:
            self._spans.append(span)
        else:
            self._lost += 1

    def warn(self, message: str) -> None:
        self._warnings.setdefault(message, False)

    def lanes(self, track: str) -> _Lanes:
        return self._lanes[track]

    def drain(self, *, keep_recording: bool) -> TelemetryBatch:
        """Return what was recorded since the last call; `keep_recording` turns spans on or off from now on."""
        self.on = keep_recording
        warnings = tuple(message for message, drained in self._warnings.items() if not drained)
        self._warnings |= dict.fromkeys(warnings, True)
        batch = TelemetryBatch(self._spans, self.metrics, time.perf_counter(), self._lost, warnings)
        self._spans, self.metrics, self._lost = [], MetricSet(), 0
        return batch


@dataclass
class _Lanes:
    """The lanes of one track. Lanes in use may be released in any order."""

    count: int = 0
    free: list[int] = field(default_factory=list)

    def acquire(self) -> int:
        if self.free:
            return heapq.heappop(self.free)
        self.count += 1
        return self.count - 1

    def release(self, lane: int) -> None:
        heapq.heappush(self.free, lane)


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)
_track: ContextVar[str] = ContextVar("track", default="")
_parent: ContextVar[_OpenSpan | None] = ContextVar("parent", default=None)
_without_spans: ContextVar[bool] = ContextVar("without_spans", default=False)
_OFF = nullcontext()


def record_in(recording: Recording) -> None:
    """Make the current task, and tasks that it starts, record in `recording` from now on."""
    _recording.set(recording)
    _without_spans.set(False)
    _track.set("")
    _parent.set(None)


def stop_recording() -> None:
    """Make the current task, and tasks that it starts, record nothing from now on."""
    _recording.set(None)


@contextmanager
def no_spans() -> Iterator[None]:
    """Record no spans in the block, nor in tasks that it starts; metrics are kept."""
    token = _without_spans.set(True)
    try:
        yield
    finally:
        _without_spans.reset(token)


def on_track(track: str) -> None:
    """Put the current task, and tasks that it starts, on a track of their process from now on."""
    _track.set(track)
    _parent.set(None)


def context_for(recording: Recording) -> Context:
    """Return a context for a call that an actor serves: the call records in the actor's own recording."""
    context = copy_context()
    context.run(record_in, recording)
    return context


def span(name: str, kind: str = "busy", **args: Any) -> AbstractContextManager[object]:
    """Record the time that the block takes. `args` are numbers and words that the timeline shows with the span."""
    recording = _recording.get()
    if recording is None or not recording.on or _without_spans.get():
        return _OFF
    return _OpenSpan(recording, name, kind, args)


def note(**args: Any) -> None:
    """Add to the args of the enclosing span what is known only now; does nothing outside of a span."""
    if (enclosing := _parent.get()) is not None:
        enclosing.args.update(args)


def measure(name: str, value: float, reduce: str = "mean", weight: float = 1.0) -> None:
    """Add a value to a metric: `name/<figure>` in the next lines of metrics.jsonl, over all processes that measure it.

    `reduce` is a key of REDUCERS. Raises ConfigError for one that differs from the name's earlier reducer.
    """
    recording = _recording.get()
    if recording is not None:
        recording.metrics.record(name, value, reduce, weight)


def warn(message: str) -> None:
    """Show a warning to the user of the run, once per process, however often it is given."""
    recording = _recording.get()
    if recording is not None:
        recording.warn(message)


class _OpenSpan:
    """An open span. It shares the lane of its parent; without a parent, or next to a sibling, it gets its own lane."""

    def __init__(self, recording: Recording, name: str, kind: str, args: dict[str, Any]) -> None:
        self._recording, self._name, self._kind, self.args = recording, name, kind, args
        self._track, self._parent = _track.get(), _parent.get()
        self._has_child, self._lane = False, 0

    def __enter__(self) -> Self:
        parent = self._parent
        if parent is not None and not parent._has_child:
            parent._has_child, self._lane = True, parent._lane
        else:
            self._parent, self._lane = None, self._recording.lanes(self._track).acquire()
        self._token = _parent.set(self)
        self._begin_s = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        end_s = time.perf_counter()
        _parent.reset(self._token)
        if self._parent is not None:
            self._parent._has_child = False
        else:
            self._recording.lanes(self._track).release(self._lane)
        self._recording.add(
            Span(self._track, self._lane, self._name, self._kind, self._begin_s, end_s, kind is not None, self.args)
        )
