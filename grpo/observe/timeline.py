"""The run's timeline: what every coroutine waited for and every actor did, for https://ui.perfetto.dev.

`timeline.json` is Chrome's trace format, an array of events with times in microseconds. It grows during the run, so a
run that is killed leaves a file without the closing bracket; Perfetto reads that too.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from grpo.observe.run_dir import RunDirectory
from grpo.telemetry.recording import Span, TelemetryBatch

NAME = "timeline.json"
_DRIVER = "driver"


class Clocks:
    """Offsets between the clocks of the processes and the driver's, estimated as NTP does.

    An answer's clock was read about half-way between question and answer; the quickest answer of a process counts.
    An offset that the round trip can explain is taken as 0: processes of one machine share their clock.
    """

    def __init__(self) -> None:
        self._best: dict[str, tuple[float, float]] = {}  # round trip and offset, in seconds

    def answered(self, process: str, asked_s: float, its_s: float, answered_s: float) -> None:
        round_trip_s = answered_s - asked_s
        offset_s = (asked_s + answered_s) / 2 - its_s
        if abs(offset_s) <= round_trip_s / 2:
            offset_s = 0.0
        self._best[process] = min(self._best.get(process, (round_trip_s, offset_s)), (round_trip_s, offset_s))

    def offset_s(self, process: str) -> float:
        """Return the seconds to add to the times of a process."""
        return self._best[process][1] if process in self._best else 0.0


class Timeline:
    """Writes spans as events until the file has `most_mb` megabytes; `full` from then on."""

    def __init__(self, run_dir: RunDirectory, zero_s: float, most_mb: float, warn: Callable[[str], None]) -> None:
        """`zero_s`: the driver's time.perf_counter at which `wall_s` was 0. `warn` is called when spans are missing."""
        self.clocks = Clocks()
        self._lost, self._warn = 0, warn
        self._run_dir, self._zero_s, self._most_bytes = run_dir, zero_s, most_mb * 1e6
        self._bytes = run_dir.size(NAME)
        self._tracks: set[tuple[int, int]] = set()

    @property
    def full(self) -> bool:
        return self._bytes >= self._most_bytes

    def add(self, process: str, batch: TelemetryBatch) -> None:
        """Write the spans that a process recorded since its last batch. The driver's name is `driver`."""
        self._lost += batch.lost
        offset_s = self.clocks.offset_s(process) - self._zero_s
        events: list[Mapping[str, Any]] = []
        for span in sorted(batch.spans, key=lambda each: (each.begin_s, -each.end_s)):
            pid, tid = self._track(process, span, events)
            begin_us, end_us = ((at + offset_s) * 1e6 for at in (span.begin_s, span.end_s))
            args = span.args | ({"failed": True} if span.failed else {})
            at = {"pid": pid, "tid": tid, "ts": round(begin_us, 1)}
            events.append(
                {"ph": "X", "name": span.name, "cat": span.kind, **at, "dur": round(end_us - begin_us, 1), "args": args}
            )
            events += _arrows(span, at)
        self._write(events)

    def close(self) -> None:
        if self._lost:
            self._warn(f"{NAME} lacks {self._lost} spans: more were recorded between two steps than are kept")
        if self._bytes:
            self._run_dir.append_text(NAME, "\n]\n")

    def _track(self, process: str, span: Span, events: list[Mapping[str, Any]]) -> tuple[int, int]:
        """Return the pid and tid of a span's track; the first time, add the events that name it.

        Both are hashes of the names, so a resumed run continues the same tracks.
        """
        track = span.track or process
        name = f"{track} ({span.lane + 1})" if span.lane else track
        pid = 0 if process == _DRIVER else zlib.crc32(process.encode()) >> 1
        tid = zlib.crc32(name.encode()) >> 1
        if (pid, tid) not in self._tracks:
            self._tracks.add((pid, tid))
            for kind, args in (("process_name", {"name": process}), ("thread_name", {"name": name})):
                events.append({"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args})
        return pid, tid

    def _write(self, events: list[Mapping[str, Any]]) -> None:
        if not events or self.full:
            return
        text = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
        text = (",\n" if self._bytes else "[\n") + text
        self._bytes += len(text)
        self._run_dir.append_text(NAME, text)
        if self._bytes >= self._most_bytes:
            self._warn(f"{NAME} ends here: it has reached its size limit (observe.timeline_mb)")


def _arrows(span: Span, at: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return flow events from the group of a ticket, at its prompt, to the train step that consumed it."""
    common = {"name": "group", "cat": "ticket", **at}
    if span.name == "group" and not span.failed:
        return [{"ph": "s", "id": span.args["ticket"], **common}]
    return [{"ph": "f", "bp": "e", "id": ticket, **common} for ticket in span.args.get("tickets", ())]
