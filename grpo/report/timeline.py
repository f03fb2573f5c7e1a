"""Convert `timeline.json` for the page: tracks, spans, and the switches of the event loop between coroutines.

A coroutine runs from the end of one of its waits to the start of the next. That interval is a `switch`. If another
coroutine ran in between, the first one must have waited for something that was not recorded.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

MOST_SPANS = 40_000
_MOST_BYTES = 128_000_000
_DRIVER = 0
# Tracks are shown in this order, rollouts last.
_FIRST = ("training", "weights", "evaluation", "trainer", "generator", "reward")
_LANE = re.compile(r" \(\d+\)$")
_SEPARATORS = re.compile(r"[\s,\[]*")


@dataclass
class _Span:
    track: int
    name: str
    kind: str
    begin: float
    end: float
    args: dict[str, Any]
    depth: int = 0


def read_timeline(file: Path, most: int = MOST_SPANS, from_s: float = 0.0) -> dict[str, Any] | None:
    """Return the first `most` spans from `from_s` on, with tracks and switches; None without a timeline or spans."""
    if not file.is_file():
        return None
    with file.open(encoding="utf-8", errors="replace") as opened:
        events = list(parse(opened.read(_MOST_BYTES)))
    tracks = _tracks(events)
    spans = sorted(_spans(events, tracks), key=lambda span: (span.begin, -span.end))
    if not spans:
        return None
    # The page holds so many spans: the first ones after `from_s`, or the last ones of all if none are that late.
    late = [span for span in spans if span.end >= from_s * 1e6]
    kept = (late or spans[-most:])[:most]
    _nest(kept)
    names = list(dict.fromkeys(span.name for span in kept))
    numbers = {name: number for number, name in enumerate(names)}
    ends_at = max(span.begin for span in kept) if len(late) > most else max(span.end for span in kept)
    return {
        "begin": kept[0].begin,
        "end": ends_at,
        "spans_in_all": len(spans),
        "tracks": [{"name": name, "process": process} for process, name in tracks.values()],
        "names": names,
        "spans": [
            [s.track, round(s.begin, 1), round(s.end - s.begin, 1), numbers[s.name], s.kind, s.depth, s.args or 0]
            for s in kept
        ],
        "switches": _switches(kept, list(tracks.values())),
    }


def parse(text: str) -> Iterator[dict[str, Any]]:
    """Yield the events of either form of the file, up to the first broken one: a killed run may stop anywhere."""
    decoder = json.JSONDecoder()
    found = re.search(r'"traceEvents"\s*:', text) if text.lstrip().startswith("{") else None
    place = found.end() if found else 0
    while (separators := _SEPARATORS.match(text, place)) and text[separators.end() : separators.end() + 1] == "{":
        try:
            event, place = decoder.raw_decode(text, separators.end())
        except ValueError:
            return
        yield event


def _tracks(events: Sequence[dict[str, Any]]) -> dict[tuple[Any, Any], tuple[str, str]]:
    """Return process and name by pid and tid, in the order of the page: coroutines, then actors."""
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    named = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    used = {(e["pid"], e.get("tid")) for e in events if e.get("ph") == "X"}
    tracks = {at: (str(processes.get(at[0], at[0])), str(named.get(at, at[1]))) for at in used}
    return dict(sorted(tracks.items(), key=lambda item: _order(item[0][0], *item[1])))


def _order(pid: Any, process: str, name: str) -> tuple[Any, ...]:
    numbers = tuple(int(digits) for digits in re.findall(r"\d+", name))
    rank = next((at for at, start in enumerate(_FIRST) if name.startswith(start)), len(_FIRST))
    return pid != _DRIVER, name.startswith("rollouts-"), rank, re.sub(r"\d+.*", "", process + name), numbers


def _spans(events: Sequence[dict[str, Any]], tracks: dict[tuple[Any, Any], tuple[str, str]]) -> Iterator[_Span]:
    numbers = {at: number for number, at in enumerate(tracks)}
    for e in events:
        if e.get("ph") == "X":
            kind = "busy" if e["pid"] != _DRIVER else e.get("cat", "wait")
            track, begin = numbers[e["pid"], e.get("tid")], float(e["ts"])
            yield _Span(track, str(e["name"]), kind, begin, begin + float(e.get("dur", 0)), e.get("args") or {})


def _nest(spans: Sequence[_Span]) -> None:
    """Set each span's depth: how many other spans of its track contain it. `spans` are in order of their begin."""
    around: dict[int, list[_Span]] = defaultdict(list)
    for span in spans:
        open_ones = around[span.track]
        while open_ones and open_ones[-1].end <= span.begin:
            open_ones.pop()
        span.depth = len(open_ones)
        open_ones.append(span)


def _switches(spans: Sequence[_Span], tracks: Sequence[tuple[str, str]]) -> list[list[Any]]:
    """Return [begin, end, track, ended span, started span, whether no other coroutine ran in between], in order."""
    names = {name: number for number, (_, name) in enumerate(tracks)}
    of_coroutine: dict[int, list[int]] = defaultdict(list)
    for number, span in enumerate(spans):
        if span.kind in ("wait", "stage"):
            name = tracks[span.track][1]
            of_coroutine[names.get(_LANE.sub("", name), span.track)].append(number)
    switches = [s for track, numbers in of_coroutine.items() for s in _gaps(spans, track, _leaves(spans, numbers))]
    switches.sort(key=lambda switch: (switch[0], switch[1]))
    for this, following in pairwise(switches):
        this.append(following[0] >= this[1] or following[2] == this[2])
    return [s if len(s) == 6 else [*s, True] for s in switches]


def _leaves(spans: Sequence[_Span], numbers: Sequence[int]) -> list[int]:
    """Return the waits, and the stages without a recorded wait, such as an evaluation's, in order of their begin."""
    waits = [spans[number] for number in numbers if spans[number].kind == "wait"]
    begins = [wait.begin for wait in waits]
    leaves = []
    for number in numbers:
        span, place = spans[number], 0
        if span.kind == "stage":
            place = bisect_left(begins, span.begin)
        if span.kind == "wait" or place == len(begins) or begins[place] >= span.end:
            leaves.append(number)
    return leaves


def _gaps(spans: Sequence[_Span], track: int, waits: Sequence[int]) -> Iterator[list[Any]]:
    """Yield the gaps in which a coroutine waits for nothing. It may wait for several things in parallel."""
    last: int | None = None  # the wait so far that ends last
    for number in waits:
        if last is not None and spans[number].begin >= spans[last].end:
            yield [round(spans[last].end, 1), round(spans[number].begin, 1), track, last, number]
        if last is None or spans[number].end >= spans[last].end:
            last = number
