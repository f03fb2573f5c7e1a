"""What the parts of a run take: all that a simulation needs to know. Read by fitting.py, or written by hand."""

# MERGED: The timeline of a run by actor, and what its intervals say: how far they overlap, how long was
# really served.

from __future__ import annotations

import heapq
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from grpo.config.composition import from_run
from grpo.errors import TuningError
from grpo.report.timeline import parse


@dataclass(frozen=True)
class GroupShape:
    """The tokens of each completion of a group, and whether there was anything to learn from it."""

    lengths: tuple[int, ...]
    signal: bool = True

    @property
    def tokens_trained(self) -> int:
        return sum(self.lengths) * self.signal

    def of_size(self, completions: int) -> GroupShape:
        """The same with another `rollout.group_size`: its lengths over and over, or the first of them."""
        return replace(self, lengths=tuple(islice(cycle(self.lengths), completions)))


@dataclass(frozen=True)
class Lengths:
    """A distribution of the lengths of completions: fixed:N, geometric:MEAN or lognormal:MEDIAN,SIGMA."""

    name: str
    parameters: tuple[float, ...]

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        if self.name == "geometric":
            return [int(n) for n in rng.geometric(1 / self.parameters[0], count)]
        median, sigma = (*self.parameters, 0.0)[:2]  # fixed: without any spread
        return [max(1, round(n)) for n in median * rng.lognormal(0.0, sigma, count)]


def parse_lengths(text: str) -> Lengths:
    """Raises ValueError for what is none."""
    name, _, numbers = text.partition(":")
    parameters = tuple(float(number) for number in numbers.split(",") if number.replace(".", "").isdigit())
    if {"fixed": 1, "geometric": 1, "lognormal": 2}.get(name) != len(parameters) or parameters[0] < 1:
        raise ValueError(f"{text} is no distribution of lengths: fixed:64, geometric:200 or lognormal:300,0.8")
    return Lengths(name, parameters)


@dataclass(frozen=True)
class Cost:
    """Seconds, linear in what is done: `base` and so much for each completion or token."""

    base: float
    each: float = 0.0
    each_finished: float = 0.0  # decoding: for every completion that ends with the token

    def __call__(self, size: float, finished: float = 0.0) -> float:
        return self.base + self.each * size + self.each_finished * finished

    def times(self, factor: float) -> Cost:
        return Cost(self.base * factor, self.each * factor, self.each_finished * factor)


@dataclass(frozen=True)
class Profile:
    """Seconds, where nothing else is said."""

    groups: tuple[GroupShape, ...]  # in the order of the run; a longer one begins again with the first
    decode: Cost  # of one token, by the completions that are decoded together
    prefill: Cost  # of prompts and first tokens, by the completions that join
    train: Cost  # of a step, by the tokens that are learned from
    score: tuple[float, ...]  # of groups, by one worker of a reward replica
    reference: tuple[float, ...] = (0.0,)  # of groups
    load: float = 0.0
    publish: float = 0.0
    snapshot: float = 0.0
    call: float = 0.002  # an empty call, there and back, with nothing else going on
    call_driver: float = 0.001  # of it, the part in which the driver and Ray do nothing else
    step_call: float = 0.0  # what a call of the training takes beyond that: batches and weights are brought along
    decode_slowed: float = 0.0  # by so much more while the trainer computes, where they share cores or memory
    train_slowed: float = 0.0  # by so much more while all generators compute

    def scaled(self, *, generator: float = 1.0, trainer: float = 1.0, reward: float = 1.0) -> Profile:
        """That of machines so many times as fast."""
        return replace(
            self,
            decode=self.decode.times(1 / generator),
            prefill=self.prefill.times(1 / generator),
            train=self.train.times(1 / trainer),
            score=tuple(seconds / reward for seconds in self.score),
        )

    def with_lengths(self, lengths: Lengths, most: int) -> Profile:
        """The same with completions of other lengths, of `most` tokens at most; as many groups have a signal."""
        rng = np.random.default_rng(0)
        groups = [
            GroupShape(tuple(min(most, length) for length in lengths.draw(rng, len(group.lengths))), group.signal)
            for group in self.groups
        ]
        return replace(self, groups=tuple(groups))

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


def load_profile(file: Path) -> Profile:
    """The inverse of `save`. Raises TuningError for a file that is none."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        for name in ("decode", "prefill", "train"):
            record[name] = Cost(**record[name])
        record["groups"] = tuple(GroupShape(tuple(g["lengths"]), g.get("signal", True)) for g in record["groups"])
        record |= {name: tuple(record[name]) for name in ("score", "reference") if name in record}
        return Profile(**record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TuningError(f"{file} is no profile: {error}; scripts/tune.py --save-profile makes one") from None


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
