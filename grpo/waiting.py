"""Who waits for what, and since when: so that a stalled run can say it.

Every long-lived coroutine is an activity of some group ("rollouts", "training"). What it awaits below, also in tasks
that it starts, is noted under it by `waiting_for`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_current: ContextVar[Activity | None] = ContextVar("activity", default=None)


class Activity:
    """One coroutine: what it waits for at this moment, with the time at which each wait began."""

    def __init__(self, group: str, among: Activities) -> None:
        self.group, self.among = group, among
        self.waits: dict[object, tuple[str, float]] = {}


class Activities:
    """All activities of a run."""

    def __init__(self) -> None:
        self._activities: list[Activity] = []

    def begin(self, group: str) -> None:
        """What the present task, and every task it starts from now on, waits for is noted under `group`."""
        activity = Activity(group, self)
        self._activities.append(activity)
        _current.set(activity)

    def forget(self, activity: Activity) -> None:
        self._activities.remove(activity)

    def describe(self) -> str:
        """For example: "32 rollouts wait for generator.generate, oldest 181 s; training waits for ..."."""
        now = time.perf_counter()
        ages: dict[tuple[str, str], list[float]] = defaultdict(list)
        for activity in self._activities:
            if activity.waits:
                what = " and ".join(sorted({what for what, _ in activity.waits.values()}))
                ages[activity.group, what].append(now - min(since for _, since in activity.waits.values()))
        lines = [_line(group, what, seconds) for (group, what), seconds in ages.items()]
        return "; ".join(lines) or "nobody waits for an actor"


def who_waits() -> str:
    """`describe` of the activities that the present task belongs to."""
    activity = _current.get()
    return activity.among.describe() if activity else "nobody knows who waits"


@contextmanager
def activity_of_its_own(group: str) -> Iterator[None]:
    """For a task that an activity starts and does not wait for: what it waits for is noted under `group`."""
    parent = _current.get()
    if parent is None:
        yield
        return
    parent.among.begin(group)
    own = _current.get()
    assert own is not None
    try:
        yield
    finally:
        parent.among.forget(own)
        _current.set(parent)


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Note what the activity at hand waits for; outside of any, nothing is noted."""
    activity = _current.get()
    if activity is None:
        yield
        return
    key = object()
    activity.waits[key] = (what, time.perf_counter())
    try:
        yield
    finally:
        del activity.waits[key]


def _line(group: str, what: str, seconds: list[float]) -> str:
    if len(seconds) == 1:
        return f"{group}: waits for {what}, {seconds[0]:.0f} s"
    return f"{len(seconds)} {group} wait for {what}, oldest {max(seconds):.0f} s"
