"""Reads a profile from the timelines of runs: costs by least squares, everything else as means and samples."""

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
_FEW = 5  # spans that say something about a condition
_STEPS_TO_WARM_UP = 2  # the first ones load code and pages: not what a step takes


def profile_of(runs: Sequence[Path]) -> Profile:
    """Of one run, or of several with the same model on the same machines: other settings show other conditions.

    Raises TuningError when a run has no timeline, or one that says nothing of what its generators did.
    """
    traces = [read_trace(run) for run in runs]
    decodes = np.array([decode for trace in traces for decode in _decodes(trace)])
    prefills = np.array([prefill for trace in traces for prefill in _prefills(trace)])
    if not len(decodes):
        raise TuningError(f"{runs[0]} has no decode spans: a profile needs generator.engine=torch, or to be written")
    steps = np.array([step for trace in traces for step in _train_steps(trace)])
    if len(steps) < _FEW:
        raise TuningError(f"{len(steps)} train steps are too few: trainer.max_steps={_FEW + _STEPS_TO_WARM_UP} or more")
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
    """In the order of their tickets."""
    noted = [span.args for span in trace.rollouts("group") if "lengths" in span.args]
    if not noted:
        raise TuningError(f"{trace.run}/timeline.json has no lengths of groups: it is of an older version")
    noted.sort(key=lambda args: args["ticket"])
    return [GroupShape(tuple(args["lengths"]), bool(args["signal"])) for args in noted]


def _decodes(trace: Trace) -> Iterable[tuple[float, ...]]:
    """Seconds until the next token could follow, completions, those of them that ended with this one, contention."""
    trainer = trace.of("trainer", "train_step", "publish", "snapshot")
    for spans in trace.by_process("generator", "decode", "prefill"):
        pairs = [(span, after) for span, after in pairwise(spans) if span.name == "decode"]
        ends = [after.begin if after.name == "decode" else span.end for span, after in pairs]  # else it may have idled
        ends = [min(end, 2 * span.end - span.begin) for (span, _), end in zip(pairs, ends, strict=True)]  # or loaded
        shares = overlaps([(span.begin, end) for (span, _), end in zip(pairs, ends, strict=True)], trainer)
        left = _rows_left(spans)
        for (span, _), end, share in zip(pairs, ends, shares, strict=True):
            rows = span.args["rows"]
            yield end - span.begin, rows, rows - left[span], share


def _rows_left(spans: Sequence[TraceSpan]) -> dict[TraceSpan, int]:
    """How many completions went on after each decoded token, as the next one tells."""
    left, joined = {}, 0
    before: TraceSpan | None = None
    for span in spans:
        if span.name == "prefill":
            joined += span.args["rows"]
            continue
        if before is not None:
            left[before] = max(0, min(before.args["rows"], span.args["rows"] - joined))
        before, joined = span, 0
    if before is not None:
        left[before] = before.args["rows"]
    return left


def _prefills(trace: Trace) -> Iterable[tuple[float, ...]]:
    """Seconds, and completions that joined."""
    return ((span.seconds, span.args["rows"]) for span in trace.of("generator", "prefill"))


def _train_steps(trace: Trace) -> Iterable[tuple[float, ...]]:
    """Seconds, tokens learned from, and the share of the time in which generators computed."""
    tokens = {
        span.args["ticket"]: GroupShape(tuple(span.args["lengths"]), span.args["signal"]).tokens_trained
        for span in trace.rollouts("group")
        if "lengths" in span.args
    }
    generators = list(trace.by_process("generator", "decode", "prefill", "load"))
    stages = {span.args["step"]: span.args["tickets"] for span in trace.driver("train_step", kind="stage")}
    steps = [s for s in trace.of("trainer", "train_step") if s.args["version"] + 1 in stages][_STEPS_TO_WARM_UP:]
    times = [(span.begin, span.end) for span in steps]
    shares = np.mean([overlaps(times, spans) for spans in generators], axis=0)
    for span, share in zip(steps, shares, strict=True):
        yield span.seconds, sum(tokens.get(t, 0) for t in stages[span.args["version"] + 1]), share


def _services(trace: Trace, actor: str, name: str, workers: int) -> Iterable[float]:
    for spans in trace.by_process(actor, name):
        yield from service_times(spans, workers)


def _trainer_services(trace: Trace) -> dict[str, list[float]]:
    """What each kind of work took of the trainer's one thread."""
    found: dict[str, list[float]] = defaultdict(list)
    for spans in trace.by_process("trainer", "train_step", "publish", "snapshot"):
        for span, seconds in zip(spans, service_times(spans, 1), strict=True):
            found[span.name].append(seconds)
    return found


def _adds(trace: Trace) -> Iterable[tuple[float, float]]:
    """Seconds of calls that do next to nothing, and how many other calls of rollouts began or ended meanwhile."""
    adds = trace.rollouts("replay_buffer.add")
    calls = [*adds, *trace.rollouts("reward.score"), *trace.rollouts("generator.generate")]
    events = np.sort([time for call in calls for time in (call.begin, call.end)])
    for add in adds:
        yield add.seconds, float(np.searchsorted(events, add.end) - np.searchsorted(events, add.begin, "right"))


def _calls(adds: Array) -> tuple[float, float]:
    """What a call takes by itself, and what part of that others have to wait for."""
    cost, _ = _fit(adds)
    if cost.each == 0:  # one rollout after another: nobody was in the way
        return cost.base, min(Profile.call_driver, cost.base)
    return cost.base, min(2 * cost.each, cost.base)


def _step_calls(trace: Trace) -> Iterable[float]:
    """What the calls of the training cost beside the work that was done in them, a mean for each kind."""
    services = _trainer_services(trace)
    work = {  # by the names of either transport of weights
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
    """Least squares of rows of seconds, sizes and, if so, contention: the cost, and what full contention adds to it.

    No coefficient is below 0: what comes out so is left out. The mean is kept in any case.
    """
    seconds, *columns = measured.T
    kept = [i for i, column in enumerate(columns) if column.std() > 0.02 * abs(column).max()]  # others say nothing
    while True:
        design = np.column_stack([np.ones_like(seconds), *(columns[i] for i in kept)])
        base, *found = (float(value) for value in np.linalg.lstsq(design, seconds, rcond=None)[0])
        if all(value >= 0 for value in found):
            break
        kept.pop(int(np.argmin(found)))
    of = dict(zip(kept, found, strict=True))
    if base < 0:  # all of it grows with the sizes
        of, base = {i: value * seconds.mean() / (seconds.mean() - base) for i, value in of.items()}, 0.0
    slowed = of.pop(len(columns) - 1, 0.0) if contended else 0.0
    cost = Cost(base, *(of.get(i, 0.0) for i in range(len(columns) - contended)))
    return cost, slowed / cost(*(float(column.mean()) for column in columns[: len(columns) - contended]))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(np.mean(found)) if found else 0.0
