"""Fit a profile to the timelines of runs: costs by least squares, everything else as means and samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from grpo.errors import TuningError
from grpo.tuning.profile import Cost, GroupShape, Profile, Trace, TraceSpan, overlaps, read_trace, service_times

Array = NDArray[np.float64]
_MIN_STEPS = 5
_WARM_UP_STEPS = 2  # not counted: they load code and pages


def profile_of(runs: Sequence[Path]) -> Profile:
    """Fit a profile to one run, or to several with the same model and machines but different settings.

    Raises TuningError when a run has no timeline, too few steps, no spans of its generators, or several turns.
    """
    traces = [read_trace(run) for run in runs]
    if any(trace.rollouts("environment.play") for trace in traces):
        raise TuningError("episodes of several turns can't be simulated; leave out --simulate to measure short runs")
    decodes = np.array([decode for trace in traces for decode in _decodes(trace)])
    prefills = np.array([(s.seconds, s.args["rows"]) for trace in traces for s in trace.of("generator", "prefill")])
    if not len(decodes):
        raise TuningError(
            f"{runs[0]} has no decode spans: run it with generator.engine=torch, or write the profile by hand"
        )
    steps = np.array([step for trace in traces for step in _train_steps(trace)])
    if len(steps) < _MIN_STEPS:
        raise TuningError(
            f"{len(steps)} train steps are too few: set trainer.max_steps={_MIN_STEPS + _WARM_UP_STEPS} or more"
        )
    # What slows decoding and training down is fitted too: both work on the same cores.
    call, call_driver = _calls(np.array([add for trace in traces for add in _adds(trace)]))
    decode, decode_slowed = _fit(decodes, contended=True)
    train, train_slowed = _fit(steps, contended=True)
    return Profile(
        groups=tuple(shape for trace in traces for shape in _groups(trace)),
        decode=decode,
        prefill=_fit(prefills)[0],
        train=train,
        score=tuple(s for trace in traces for s in _services(trace, "reward", "score", trace.reward_workers)) or (0.0,),
        reference=tuple(s for trace in traces for s in _services(trace, "reference", "logprobs", 1)) or (0.0,),
        load=_mean(span.seconds for trace in traces for span in trace.of("generator", "load")),
        publish=_mean(s for trace in traces for s in _trainer_services(trace)["publish"]),
        snapshot=_mean(s for trace in traces for s in _trainer_services(trace)["snapshot"]),
        call=call,
        call_driver=call_driver,
        step_call=max(0.0, _mean(seconds for trace in traces for seconds in _step_calls(trace)) - call),
        decode_slowed=decode_slowed,
        train_slowed=train_slowed,
    )


def _groups(trace: Trace) -> list[GroupShape]:
    """Return the groups in the order of their tickets."""
    finished = [span.args for span in trace.rollouts("group") if "lengths" in span.args]
    if not finished:
        raise TuningError(f"{trace.run}/timeline.json has no lengths of groups: it was written by an older version")
    finished.sort(key=lambda args: args["ticket"])
    return [GroupShape(tuple(args["lengths"]), bool(args["signal"])) for args in finished]


def _decodes(trace: Trace) -> Iterable[tuple[float, ...]]:
    """Yield for each token: seconds until the next could follow, completions, those that ended, and contention.

    Contention is the share of the time in which the trainer computed.
    """
    trainer = trace.of("trainer", "train_step", "publish", "snapshot")
    for spans in trace.by_process("generator", "decode", "prefill"):
        pairs = [(span, after) for span, after in pairwise(spans) if span.name == "decode"]
        # A token lasts until the next one starts; before a prefill the generator may have idled. It may also have
        # loaded weights in between: so at most twice the span counts.
        ends = [after.begin if after.name == "decode" else span.end for span, after in pairs]
        ends = [min(end, 2 * span.end - span.begin) for (span, _), end in zip(pairs, ends, strict=True)]
        shares = overlaps([(span.begin, end) for (span, _), end in zip(pairs, ends, strict=True)], trainer)
        remaining = _remaining(spans)
        for (span, _), end, share in zip(pairs, ends, shares, strict=True):
            rows = span.args["rows"]
            yield end - span.begin, rows, rows - remaining[span], share


def _remaining(spans: Sequence[TraceSpan]) -> dict[TraceSpan, int]:
    """Return how many completions continued after each decoded token, from the size of the next batch."""
    remaining, joined = {}, 0
    before: TraceSpan | None = None
    for span in spans:
        if span.name == "prefill":
            joined += span.args["rows"]
            continue
        if before is not None:
            remaining[before] = max(0, min(before.args["rows"], span.args["rows"] - joined))
        before, joined = span, 0
    if before is not None:
        remaining[before] = before.args["rows"]
    return remaining


def _train_steps(trace: Trace) -> Iterable[tuple[float, ...]]:
    """Yield seconds, tokens trained on, and the share of the time in which generators computed."""
    tokens = {
        span.args["ticket"]: GroupShape(tuple(span.args["lengths"]), span.args["signal"]).tokens_trained
        for span in trace.rollouts("group")
        if "lengths" in span.args
    }
    generators = list(trace.by_process("generator", "decode", "prefill", "load"))
    stages = {span.args["step"]: span.args["tickets"] for span in trace.driver("train_step", kind="stage")}
    steps = [s for s in trace.of("trainer", "train_step") if s.args["version"] + 1 in stages][_WARM_UP_STEPS:]
    times = [(span.begin, span.end) for span in steps]
    shares = np.mean([overlaps(times, spans) for spans in generators], axis=0)
    for span, share in zip(steps, shares, strict=True):
        yield span.seconds, sum(tokens.get(t, 0) for t in stages[span.args["version"] + 1]), share


def _services(trace: Trace, actor: str, name: str, workers: int) -> Iterable[float]:
    for spans in trace.by_process(actor, name):
        yield from service_times(spans, workers)


def _trainer_services(trace: Trace) -> dict[str, list[float]]:
    """Return the seconds of the trainer's one thread by kind of work."""
    services: dict[str, list[float]] = defaultdict(list)
    for spans in trace.by_process("trainer", "train_step", "publish", "snapshot"):
        for span, seconds in zip(spans, service_times(spans, 1), strict=True):
            services[span.name].append(seconds)
    return services


def _adds(trace: Trace) -> Iterable[tuple[float, float]]:
    """Yield the seconds of calls without work, and how many calls of other rollouts began or ended meanwhile."""
    adds = trace.rollouts("replay_buffer.add")
    calls = [*adds, *trace.rollouts("reward.score"), *trace.rollouts("generator.generate")]
    events = np.sort([time for call in calls for time in (call.begin, call.end)])
    for add in adds:
        yield add.seconds, float(np.searchsorted(events, add.end) - np.searchsorted(events, add.begin, "right"))


def _calls(adds: Array) -> tuple[float, float]:
    """Return the seconds of a call by itself, and the part of them that occupies the driver."""
    cost, _ = _fit(adds)
    if cost.each == 0:  # a single rollout at a time: no call delayed another
        return cost.base, min(Profile.call_driver, cost.base)
    return cost.base, min(2 * cost.each, cost.base)


def _step_calls(trace: Trace) -> Iterable[float]:
    """Yield the mean overhead of each kind of call of the training, without the work done in it."""
    services = _trainer_services(trace)
    work = {  # calls by their names in either weight transport
        ("trainer.train_step",): services["train_step"],
        ("trainer.push_weights", "trainer.write_weights"): services["publish"],
        ("generator.update_weights", "generator.receive_weights"): [
            sum(_mean(span.seconds for span in trace.of("generator", name)) for name in ("receive", "load"))
        ],
    }
    for names, seconds in work.items():
        waits = (wait.seconds for name in names for wait in trace.driver(name, kind="wait"))
        yield max(0.0, _mean(waits) - _mean(seconds))


def _fit(measured: Array, *, contended: bool = False) -> tuple[Cost, float]:
    """Fit costs by least squares to rows of seconds, sizes and, if `contended`, contention.

    Returns the cost and the relative slowdown at full contention. Coefficients are not negative: a column whose
    coefficient would be is left out. The mean is preserved.
    """
    seconds, *columns = measured.T
    kept = [i for i, column in enumerate(columns) if column.std() > 0.02 * abs(column).max()]  # columns that vary
    while True:
        design = np.column_stack([np.ones_like(seconds), *(columns[i] for i in kept)])
        base, *coefficients = (float(value) for value in np.linalg.lstsq(design, seconds, rcond=None)[0])
        if all(value >= 0 for value in coefficients):
            break
        kept.pop(int(np.argmin(coefficients)))
    by_column = dict(zip(kept, coefficients, strict=True))
    if base < 0:  # set it to 0, and scale the coefficients so that the mean stays
        by_column = {i: value * seconds.mean() / (seconds.mean() - base) for i, value in by_column.items()}
        base = 0.0
    slowed = by_column.pop(len(columns) - 1, 0.0) if contended else 0.0
    cost = Cost(base, *(by_column.get(i, 0.0) for i in range(len(columns) - contended)))
    return cost, slowed / cost(*(float(column.mean()) for column in columns[: len(columns) - contended]))


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return float(np.mean(listed)) if listed else 0.0
