"""Registry of what each long-lived task is waiting for, and since when: a stalled run reports it.

Every long-lived task is an activity of a group ("rollouts", "training"). `waiting_for` notes what the task awaits, also
in tasks that it starts.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import WeakValueDictionary

from grpo.telemetry.recording import on_track, span

_current: ContextVar[Activity | None] = ContextVar("activity", default=None)
Waits = dict[tuple[str, str], float]
"""A number by (group, what is waited for)."""


class ActivityRegistry:
    """The activities of a run, in the order in which they began and as long as their tasks live; seconds waited."""

    def __init__(self) -> None:
        self.activities: WeakValueDictionary[object, Activity] = WeakValueDictionary()
        self.waited_s: Waits = defaultdict(float)  # of waits that have ended

    def waited_until(self, now: float) -> Waits:
        """Return the seconds waited so far, including waits that have not ended."""
        total_s = defaultdict(float, self.waited_s)
        for activity in list(self.activities.values()):
            for what, since in activity.waits.values():
                total_s[activity.group, what] += now - since
        return total_s


class Activity:
    """One task and its present waits, each with the time at which it began."""

    def __init__(self, group: str, registry: ActivityRegistry) -> None:
        self.group, self.registry = group, registry
        self.waits: dict[object, tuple[str, float]] = {}
        registry.activities[object()] = self


def begin_activity(group: str, track: str | None = None) -> None:
    """Note the waits of the current task, and of tasks that it starts, under `group` from now on.

    In the timeline the activity has a track: `track`, or else `group`.
    """
    on_track(track or group)
    current = _current.get()
    _current.set(Activity(group, ActivityRegistry() if current is None else current.registry))


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Note a wait of the current activity, and record it as a span; outside of an activity only the span."""
    activity, key = _current.get(), object()
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
    """Mean number of tasks waiting since the last `drain`. Each reader needs its own instance."""

    def __init__(self) -> None:
        self._before_s: Waits = {}
        self._drained_at = time.perf_counter()

    def drain(self, now: float) -> Waits:
        """Return the mean number of waiting tasks; empty outside of an activity. `now` is of time.perf_counter."""
        current = _current.get()
        if current is None:
            return {}
        total_s, before_s = current.registry.waited_until(now), self._before_s
        elapsed_s, self._drained_at, self._before_s = now - self._drained_at, now, total_s
        return {key: (seconds - before_s.get(key, 0.0)) / elapsed_s for key, seconds in sorted(total_s.items())}


def describe_blocked() -> str:
    """Return one line that names every wait of the run.

    Example: "Blocked: 32 rollouts on generator.generate (oldest 181 s); training on replay_buffer.sample (12 s)".
    """
    now, current = time.perf_counter(), _current.get()
    ages_s: dict[tuple[str, str], list[float]] = defaultdict(list)
    for activity in [] if current is None else list(current.registry.activities.values()):
        if activity.waits:
            what = " and ".join(sorted({what for what, _ in activity.waits.values()}))
            ages_s[activity.group, what].append(now - min(since for _, since in activity.waits.values()))
    if not ages_s:
        return "nothing is blocked on an actor"
    lines = [
        f"{len(ages)} {group} on {what} (oldest {max(ages):.0f} s)"
        if len(ages) > 1
        else f"{group} on {what} ({ages[0]:.0f} s)"
        for (group, what), ages in ages_s.items()
    ]
    return f"Blocked: {'; '.join(lines)}"
