"""The input of a simulation: a profile of costs and group shapes; and the trace of a run, to fit a profile to.

A profile is fitted by fitting.py, or written by hand.
"""

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

_DRIVER = "driver"


@dataclass(frozen=True)
class GroupShape:
    """The tokens of each completion of a group. `signal`: its rewards differ, so it is trained on."""

    lengths: tuple[int, ...]
    signal: bool = True

    @property
    def tokens_trained(self) -> int:
        return sum(self.lengths) * self.signal

    def of_size(self, completions: int) -> GroupShape:
        """Return the shape with another `rollout.group_size`: the lengths repeated, or the first ones."""
        return replace(self, lengths=tuple(islice(cycle(self.lengths), completions)))


@dataclass(frozen=True)
class Lengths:
    """A distribution of the lengths of completions: fixed:N, geometric:MEAN or lognormal:MEDIAN,SIGMA."""

    name: str
    parameters: tuple[float, ...]

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        if self.name == "geometric":
            return [int(n) for n in rng.geometric(1 / self.parameters[0], count)]
        median, sigma = (*self.parameters, 0.0)[:2]  # fixed: no variance
        return [max(1, round(n)) for n in median * rng.lognormal(0.0, sigma, count)]


def parse_lengths(text: str) -> Lengths:
    """Parse a distribution. Raises ValueError for anything else."""
    name, _, numbers = text.partition(":")
    parameters = tuple(float(number) for number in numbers.split(",") if number.replace(".", "").isdigit())
    if {"fixed": 1, "geometric": 1, "lognormal": 2}.get(name) != len(parameters) or parameters[0] < 1:
        raise ValueError(f"{text} is no distribution of lengths, such as fixed:64, geometric:200 or lognormal:300,0.8")
    return Lengths(name, parameters)


@dataclass(frozen=True)
class Cost:
    """Seconds, linear in the amount of work: `base`, and `each` for every completion or token."""

    base: float
    each: float = 0.0
    each_finished: float = 0.0  # in decoding, for every completion that ends with this token

    def __call__(self, size: float, finished: float = 0.0) -> float:
        return self.base + self.each * size + self.each_finished * finished

    def times(self, factor: float) -> Cost:
        return Cost(self.base * factor, self.each * factor, self.each_finished * factor)


@dataclass(frozen=True)
class Profile:
    """Costs of all parts of a run, in seconds, and the shapes of its groups.

    Example:
        profile = Profile(
            groups=(GroupShape((120, 80, 200, 64)),),
            decode=Cost(0.010, each=0.0002),
            prefill=Cost(0.020),
            train=Cost(0.5, each=0.0001),
            score=(0.05,),
        )
        simulate(profile, config, steps=50).trainer_wait
    """

    groups: tuple[GroupShape, ...]
    """In the order of the run; a longer run starts over with the first."""
    decode: Cost
    """Time to decode one token, by the completions that are decoded together."""
    prefill: Cost
    """Time of prompts and first tokens, by the completions that join."""
    train: Cost
    """Time of a train step, by the tokens that are trained on."""
    score: tuple[float, ...]
    """Times to score a group, in one worker of a reward replica."""
    reference: tuple[float, ...] = (0.0,)
    """Times to score a group with the reference model."""
    load: float = 0.0
    publish: float = 0.0
    snapshot: float = 0.0
    call: float = 0.002
    """An empty remote call, there and back, on an idle machine."""
    call_driver: float = 0.001
    """The part of `call` that occupies the driver and Ray."""
    step_call: float = 0.0
    """Extra time of calls in a train step, which carry batches and weights."""
    decode_slowed: float = 0.0
    """Relative slowdown of decoding while the trainer computes, where they share cores or memory."""
    train_slowed: float = 0.0
    """Relative slowdown of training while all generators compute."""

    def scaled(self, *, generator: float = 1.0, trainer: float = 1.0, reward: float = 1.0) -> Profile:
        """Return the profile of machines that are faster by these factors."""
        return replace(
            self,
            decode=self.decode.times(1 / generator),
            prefill=self.prefill.times(1 / generator),
            train=self.train.times(1 / trainer),
            score=tuple(seconds / reward for seconds in self.score),
        )

    def with_lengths(self, lengths: Lengths, most: int) -> Profile:
        """Return the profile with other completion lengths, of at most `most` tokens; signals stay the same."""
        rng = np.random.default_rng(0)
        groups = [
            GroupShape(tuple(min(most, length) for length in lengths.draw(rng, len(group.lengths))), group.signal)
            for group in self.groups
        ]
        return replace(self, groups=tuple(groups))

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


def load_profile(file: Path) -> Profile:
    """Load a saved profile. Raises TuningError when the file holds none."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        for name in ("decode", "prefill", "train"):
            record[name] = Cost(**record[name])
        record["groups"] = tuple(GroupShape(tuple(g["lengths"]), g.get("signal", True)) for g in record["groups"])
        record |= {name: tuple(record[name]) for name in ("score", "reference") if name in record}
        return Profile(**record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TuningError(f"{file} is no profile: {error}. Make one with scripts/tune.py --save-profile") from None


@dataclass(frozen=True, eq=False)
class TraceSpan:
    """A span of a timeline; `begin` and `end` are in seconds."""

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
    """The timeline of a run, with its spans in the order of their begin."""

    def __init__(self, run: Path, spans: Iterable[TraceSpan], reward_workers: int) -> None:
        self.run, self.reward_workers = run, reward_workers
        self._by_name: dict[str, list[TraceSpan]] = defaultdict(list)
        for span in sorted(spans, key=lambda span: span.begin):
            self._by_name[span.name].append(span)

    def of(self, actor: str, *names: str) -> list[TraceSpan]:
        """Return the spans with these names of all replicas of an actor."""
        spans = (span for name in names for span in self._by_name[name])
        return sorted((s for s in spans if s.process.partition("-")[0] == actor), key=lambda span: span.begin)

    def by_process(self, actor: str, *names: str) -> Iterator[list[TraceSpan]]:
        """Yield the spans of each replica of an actor."""
        spans: dict[str, list[TraceSpan]] = defaultdict(list)
        for span in self.of(actor, *names):
            spans[span.process].append(span)
        yield from spans.values()

    def driver(self, name: str, kind: str) -> list[TraceSpan]:
        return [span for span in self._by_name[name] if span.process == _DRIVER and span.kind == kind]

    def rollouts(self, name: str) -> list[TraceSpan]:
        """Return the spans with this name of all rollout coroutines."""
        return [span for span in self._by_name[name] if span.track.startswith("rollouts")]


def read_trace(run: Path) -> Trace:
    """Read the timeline of a run. Raises TuningError when there is none."""
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
    """Return the share of each interval that is covered by at least one of the `busy` spans."""
    # Merge the busy spans into disjoint ones.
    merged: list[list[float]] = []
    for span in busy:
        if merged and span.begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], span.end)
        else:
            merged.append([span.begin, span.end])
    if not merged:
        return [0.0] * len(intervals)
    # Busy seconds up to a time are piecewise linear between the edges: interpolate at both ends of each interval.
    edges = np.array(merged).ravel()
    busy_s = np.concatenate(([0.0], np.cumsum(np.diff(edges) * (np.arange(len(edges) - 1) % 2 == 0))))
    begin, end = np.array(intervals).reshape(-1, 2).T
    inside = np.interp(end, edges, busy_s) - np.interp(begin, edges, busy_s)
    shares: list[float] = (inside / np.maximum(end - begin, 1e-12)).tolist()
    return shares


def service_times(spans: Sequence[TraceSpan], workers: int) -> list[float]:
    """Return the seconds of service, without queueing, of spans that start on arrival; first come first served."""
    free = [0.0] * workers
    seconds = []
    for span in spans:
        started = max(span.begin, heapq.heappop(free))
        seconds.append(max(0.0, span.end - started))
        heapq.heappush(free, span.end)
    return seconds
