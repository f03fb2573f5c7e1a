"""Who waits for what, and since when: so that a stalled run can say it.

Every long-lived task is an activity of some group ("rollouts", "training"). What it awaits below, also in tasks that
it starts, is noted under it by `waiting_for`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import WeakValueDictionary

from grpo.telemetry.recording import on_track, span

_present: ContextVar[Activity | None] = ContextVar("activity", default=None)
Waited = dict[tuple[str, str], float]


class ActivityRegistry:
    """The activities of a run in the order in which they began, as long as their tasks live; how long they waited."""

    def __init__(self) -> None:
        self.activities: WeakValueDictionary[object, Activity] = WeakValueDictionary()
        self.waited_s: Waited = defaultdict(float)  # of waits that have ended

    def waited_until(self, now: float) -> Waited:
        """Seconds by group and what was waited for, the waits that go on included."""
        total_s = defaultdict(float, self.waited_s)
        for activity in list(self.activities.values()):
            for what, since in activity.waits.values():
                total_s[activity.group, what] += now - since
        return total_s


class Activity:
    """One task: what it waits for at this moment, with the time at which each wait began.

    `registry` holds all activities of the run.
    """

    def __init__(self, group: str, registry: ActivityRegistry) -> None:
        self.group, self.registry = group, registry
        self.waits: dict[object, tuple[str, float]] = {}
        registry.activities[object()] = self


def begin_activity(group: str, track: str | None = None) -> None:
    """From now on, what the present task and those that it starts wait for is noted under `group`.

    In the timeline it is a track of its own.
    """
    on_track(track or group)
    present = _present.get()
    _present.set(Activity(group, ActivityRegistry() if present is None else present.registry))


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Note what the activity at hand waits for, as a span of its track too; outside of any, nothing is noted."""
    activity, key = _present.get(), object()
    if activity is not None:
        activity.waits[key] = (what, time.perf_counter())
    try:
        with span(what, "wait"):
            yield
    finally:
        if activity is not None:
            _, since = activity.waits.pop(key)
            activity.registry.waited_s[activity.group, what] += time.perf_counter() - since


class MeanWaiting:
    """How many of each group waited for what, on average since the last look. One for everybody who looks."""

    def __init__(self) -> None:
        self._before_s: Waited = {}
        self._looked_at = time.perf_counter()

    def take(self, now: float) -> Waited:
        """By group and what is waited for; of the activity at hand. `now` is of time.perf_counter."""
        present = _present.get()
        if present is None:
            return {}
        total_s, before_s = present.registry.waited_until(now), self._before_s
        elapsed_s, self._looked_at, self._before_s = now - self._looked_at, now, total_s
        return {key: (seconds - before_s.get(key, 0.0)) / elapsed_s for key, seconds in sorted(total_s.items())}


def describe_blocked() -> str:
    """For example: "32 rollouts wait for generator.generate, oldest 181 s; training: waits for ..."."""
    now, present = time.perf_counter(), _present.get()
    ages: dict[tuple[str, str], list[float]] = defaultdict(list)
    for activity in [] if present is None else list(present.registry.activities.values()):
        if activity.waits:
            what = " and ".join(sorted({what for what, _ in activity.waits.values()}))
            ages[activity.group, what].append(now - min(since for _, since in activity.waits.values()))
    return (
        "; ".join(_line(group, what, seconds) for (group, what), seconds in ages.items()) or "nobody waits for an actor"
    )


def _line(group: str, what: str, seconds: list[float]) -> str:
    if len(seconds) == 1:
        return f"{group}: waits for {what}, {seconds[0]:.0f} s"
    return f"{len(seconds)} {group} wait for {what}, oldest {max(seconds):.0f} s"
