"""What an actor, or a coroutine of the driver, was busy with and when: spans of time, kept until they are collected.

    with span("decode", rows=12): ...

Every actor and the driver have `Spans` of their own; which ones a piece of work adds to follows from its context, so
it is the same in a process and among several actors in one. While nobody records, a span costs a lookup.
"""

from __future__ import annotations

import heapq
import time
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

_MOST = 100_000  # spans kept between two collections


class Span(NamedTuple):
    """`begin_s` and `end_s` are of time.perf_counter, whose zero is another on every machine.

    Spans of one lane of a track lie one after another, or one in another. `failed`: it ended with an exception.
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
class Harvest:
    """What was recorded since the last one, the clock at that moment, and how many spans there was no room for."""

    spans: list[Span]
    clock_s: float
    lost: int


class Spans:
    """Where spans go. Off until `harvest` is asked to go on recording."""

    def __init__(self, *, on: bool = False) -> None:
        self.on = on
        self._finished: list[Span] = []
        self._lost = 0
        self._lanes: dict[str, _Lanes] = defaultdict(_Lanes)

    def add(self, span: Span) -> None:
        if len(self._finished) < _MOST:
            self._finished.append(span)
        else:
            self._lost += 1

    def lanes(self, track: str) -> _Lanes:
        return self._lanes[track]

    def harvest(self, *, go_on: bool) -> Harvest:
        """Hand over what there is; `go_on` says whether to record from now on."""
        self.on = go_on
        finished, self._finished = self._finished, []
        lost, self._lost = self._lost, 0
        return Harvest(finished, time.perf_counter(), lost)


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


_spans: ContextVar[Spans | None] = ContextVar("spans", default=None)
_track: ContextVar[str] = ContextVar("track", default="")
_parent: ContextVar[_OpenSpan | None] = ContextVar("parent", default=None)
_OFF = nullcontext()


def record_in(spans: Spans) -> None:
    """From now on, the spans of the present task and of those that it starts go there."""
    _spans.set(spans)
    _track.set("")
    _parent.set(None)


def unrecorded() -> None:
    """From now on, the present task and those that it starts leave no spans."""
    _spans.set(None)


def on_track(track: str) -> None:
    """From now on, the present task and those that it starts are one track among those of the driver."""
    _track.set(track)
    _parent.set(None)


def context_for(spans: Spans) -> Context:
    """The context of work that an actor does for somebody else: its spans are the actor's own."""
    context = copy_context()
    context.run(record_in, spans)
    return context


def span(name: str, kind: str = "busy", **args: Any) -> AbstractContextManager[object]:
    """Record the time that the block takes. `args` are numbers and words that people will see beside it."""
    spans = _spans.get()
    return _OFF if spans is None or not spans.on else _OpenSpan(spans, name, kind, args)


class _OpenSpan:
    """Takes the lane of the span around it, or a free one of the track where there is none, or it is taken."""

    def __init__(self, spans: Spans, name: str, kind: str, args: dict[str, Any]) -> None:
        self._spans, self._name, self._kind, self._args = spans, name, kind, args
        self._track, self._parent = _track.get(), _parent.get()
        self._has_child, self._lane = False, 0

    def __enter__(self) -> Self:
        parent = self._parent
        if parent is not None and not parent._has_child:
            parent._has_child, self._lane = True, parent._lane
        else:
            self._parent, self._lane = None, self._spans.lanes(self._track).take()
        self._token = _parent.set(self)
        self._begin_s = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        end_s = time.perf_counter()
        _parent.reset(self._token)
        if self._parent is not None:
            self._parent._has_child = False
        else:
            self._spans.lanes(self._track).give_back(self._lane)
        self._spans.add(
            Span(self._track, self._lane, self._name, self._kind, self._begin_s, end_s, kind is not None, self._args)
        )
