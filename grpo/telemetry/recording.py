"""What an actor, or a coroutine of the driver, does and measures, kept until it is collected.

    with span("decode", rows=12): ...
    measure("generator/queue_s", waited_s, "percentiles")

Every actor and the driver have a `Recording` of their own; which one a piece of work adds to follows from its context,
so it is the same in a process and among several actors in one. While nobody wants spans, one costs a lookup.
"""

from __future__ import annotations

import heapq
import time
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from grpo.telemetry.metrics import MetricSet

_MOST = 100_000  # spans kept between two collections


class Span(NamedTuple):
    """`begin_s` and `end_s` are of time.perf_counter, whose zero is another on every machine.

    Recording of one lane of a track lie one after another, or one in another. `failed`: it ended with an exception.
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
    """What was recorded since the last one, the clock at that moment, and how many spans there was no room for."""

    spans: list[Span]
    metrics: MetricSet
    clock_s: float
    lost: int


class Recording:
    """Of one actor, or of the driver. Metrics always; spans only while `on`, which a harvest changes."""

    def __init__(self, *, on: bool = False) -> None:
        self.on = on
        self.metrics = MetricSet()
        self._spans: list[Span] = []
        self._lost = 0
        self._lanes: dict[str, _Lanes] = defaultdict(_Lanes)

    def add(self, span: Span) -> None:
        if len(self._spans) < _MOST:
            self._spans.append(span)
        else:
            self._lost += 1

    def lanes(self, track: str) -> _Lanes:
        return self._lanes[track]

    def drain(self, *, keep_recording: bool) -> TelemetryBatch:
        """Hand over what there is; `keep_recording` says whether to record spans from now on."""
        self.on = keep_recording
        drain = TelemetryBatch(self._spans, self.metrics, time.perf_counter(), self._lost)
        self._spans, self.metrics, self._lost = [], MetricSet(), 0
        return drain


@dataclass
class _Lanes:
    """Lanes of one track. Those in use may be left in any order."""

    used: int = 0
    free: list[int] = field(default_factory=list)

    def take(self) -> int:
        if self.free:
            return heapq.heappop(self.free)
        self.used += 1
        return self.used - 1

    def give_back(self, lane: int) -> None:
        heapq.heappush(self.free, lane)


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)
_track: ContextVar[str] = ContextVar("track", default="")
_parent: ContextVar[_OpenSpan | None] = ContextVar("parent", default=None)
_OFF = nullcontext()


def record_in(recording: Recording) -> None:
    """From now on, what the present task and those that it starts record goes there."""
    _recording.set(recording)
    _track.set("")
    _parent.set(None)


def unrecorded() -> None:
    """From now on, the present task and those that it starts record nothing."""
    _recording.set(None)


def on_track(track: str) -> None:
    """From now on, the present task and those that it starts are one track among those of the driver."""
    _track.set(track)
    _parent.set(None)


def context_for(recording: Recording) -> Context:
    """The context of work that an actor does for somebody else: it goes into the actor's own recording."""
    context = copy_context()
    context.run(record_in, recording)
    return context


def span(name: str, kind: str = "busy", **args: Any) -> AbstractContextManager[object]:
    """Record the time that the block takes. `args` are numbers and words that people will see beside it."""
    recording = _recording.get()
    return _OFF if recording is None or not recording.on else _OpenSpan(recording, name, kind, args)


def note(**args: Any) -> None:
    """Add to the span around this place what is known only now; outside of any, nothing is noted."""
    if (around := _parent.get()) is not None:
        around.args.update(args)


def measure(name: str, value: float, reduce: str = "mean", weight: float = 1.0) -> None:
    """Add a value to a metric: `name/<figure>` in a coming line of metrics.jsonl, over all processes that measure it.

    See REDUCERS for what `reduce` may be. Raises ConfigError for another one than this name had before.
    """
    recording = _recording.get()
    if recording is not None:
        recording.metrics.record(name, value, reduce, weight)


class _OpenSpan:
    """Takes the lane of the span around it, or a free one of the track where there is none, or it is taken."""

    def __init__(self, recording: Recording, name: str, kind: str, args: dict[str, Any]) -> None:
        self._recording, self._name, self._kind, self.args = recording, name, kind, args
        self._track, self._parent = _track.get(), _parent.get()
        self._has_child, self._lane = False, 0

    def __enter__(self) -> Self:
        parent = self._parent
        if parent is not None and not parent._has_child:
            parent._has_child, self._lane = True, parent._lane
        else:
            self._parent, self._lane = None, self._recording.lanes(self._track).take()
        self._token = _parent.set(self)
        self._begin_s = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        end_s = time.perf_counter()
        _parent.reset(self._token)
        if self._parent is not None:
            self._parent._has_child = False
        else:
            self._recording.lanes(self._track).give_back(self._lane)
        self._recording.add(
            Span(self._track, self._lane, self._name, self._kind, self._begin_s, end_s, kind is not None, self.args)
        )
