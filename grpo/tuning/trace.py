"""The timeline of a run by actor, and what its intervals say: how far they overlap, how long was really served."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grpo.composition import from_run
from grpo.report.timeline import parse
from grpo.types import TuningError

_DRIVER = "driver"


@dataclass(frozen=True, eq=False)
class TraceSpan:
    """`begin` and `end` are in seconds."""

    process: str
    track: str
    name: str
    kind: str
    begin: float
    end: float
    args: dict[str, Any]

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class Trace:
    """Spans in the order in which they began."""

    def __init__(self, run: Path, spans: Iterable[TraceSpan], reward_workers: int) -> None:
        self.run, self.reward_workers = run, reward_workers
        self._by_name: dict[str, list[TraceSpan]] = defaultdict(list)
        for span in sorted(spans, key=lambda span: span.begin):
            self._by_name[span.name].append(span)

    def of(self, actor: str, *names: str) -> list[TraceSpan]:
        """Of all replicas of an actor."""
        found = (span for name in names for span in self._by_name[name])
        return sorted((s for s in found if s.process.partition("-")[0] == actor), key=lambda span: span.begin)

    def by_process(self, actor: str, *names: str) -> Iterator[list[TraceSpan]]:
        """One list for each replica."""
        spans: dict[str, list[TraceSpan]] = defaultdict(list)
        for span in self.of(actor, *names):
            spans[span.process].append(span)
        yield from spans.values()

    def driver(self, name: str, kind: str) -> list[TraceSpan]:
        return [span for span in self._by_name[name] if span.process == _DRIVER and span.kind == kind]

    def rollouts(self, name: str) -> list[TraceSpan]:
        """Of all rollout coroutines."""
        return [span for span in self._by_name[name] if span.track.startswith("rollouts")]


def read_trace(run: Path) -> Trace:
    """Raises TuningError when there is no timeline."""
    file = run / "timeline.json"
    if not file.is_file():
        raise TuningError(f"{run} has no timeline.json: name the folder of a run with observe.timeline=true")
    events = list(parse(file.read_text(encoding="utf-8", errors="replace")))
    processes = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    spans = (
        TraceSpan(
            processes[e["pid"]],
            tracks[e["pid"], e["tid"]],
            e["name"],
            e["cat"],
            e["ts"] / 1e6,
            (e["ts"] + e["dur"]) / 1e6,
            e.get("args", {}),
        )
        for e in events
        if e["ph"] == "X"
    )
    return Trace(run, spans, from_run(run).reward.workers)


def overlaps(intervals: Sequence[tuple[float, float]], busy: Sequence[TraceSpan]) -> list[float]:
    """The share of each interval in which one of the spans went on."""
    merged: list[list[float]] = []
    for span in busy:
        if merged and span.begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], span.end)
        else:
            merged.append([span.begin, span.end])
    if not merged:
        return [0.0] * len(intervals)
    edges = np.array(merged).ravel()
    busy_s = np.concatenate(([0.0], np.cumsum(np.diff(edges) * (np.arange(len(edges) - 1) % 2 == 0))))
    begin, end = np.array(intervals).reshape(-1, 2).T
    inside = np.interp(end, edges, busy_s) - np.interp(begin, edges, busy_s)
    shares: list[float] = (inside / np.maximum(end - begin, 1e-12)).tolist()
    return shares


def service_times(spans: Sequence[TraceSpan], workers: int) -> list[float]:
    """Seconds without the time in line, of spans that count from the arrival, first come first served."""
    free = [0.0] * workers
    seconds = []
    for span in spans:
        began = max(span.begin, heapq.heappop(free))
        seconds.append(max(0.0, span.end - began))
        heapq.heappush(free, span.end)
    return seconds
