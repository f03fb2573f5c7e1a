"""Collects what happens during a run into metrics, samples and the summary."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from grpo.driver.pacing import Pacer
from grpo.errors import RewardError, ZeroVarianceGroup
from grpo.observe.loop_lag import LoopLag
from grpo.observe.metrics import FinishedGroups, GeneratorRates, History, Startup, Stopwatch, recovery_of
from grpo.observe.renamed_metrics import RENAMED_NOTICE, with_old_names
from grpo.observe.run_dir import Events, RunDirectory, rollout_record, rollout_rows
from grpo.observe.sinks.fanout import Sinks
from grpo.observe.terminal.display import Display
from grpo.observe.terminal.view import RunStatus, Sample
from grpo.observe.timeline import Timeline
from grpo.services.failures import Failures
from grpo.telemetry.activity import MeanWaiting
from grpo.telemetry.metrics import MetricSet
from grpo.types import BatchReport, EvaluationReport, GeneratorStats, Rollout, Ticket
from grpo.utils.aio import gather_or_cancel

log = logging.getLogger(__name__)
Metrics = dict[str, float]
Replicas = Mapping[str, Mapping[str, Mapping[str, Any]]]  # service -> replica -> its figures


@dataclasses.dataclass(frozen=True)
class TrainedStep:
    """What is known of a step once the trainer has taken it: its own metrics, the batch, how long its stages took."""

    number: int
    metrics: Metrics
    batch: BatchReport
    times: Stopwatch


class Recorder:
    """The driver's memory. All methods are quick and called on the event loop; files are written in a thread."""

    def __init__(self, run_dir: RunDirectory, display: Display, pacer: Pacer, failures: Failures) -> None:
        self.loop_lag = LoopLag()
        self.failures = failures
        self.replicas: Callable[[], Replicas] = dict  # as they are at the moment, once they are there
        self.history = History()
        self.prompts: dict[str, int] = {}
        self.run_dir = run_dir
        self.pacer, self._display = pacer, display
        self.startup = Startup()
        self.sinks = Sinks({}, self.warn)
        self.measured = MetricSet()  # by all actors, since the last line
        self.step = 0  # the last one that was trained
        self._finished = FinishedGroups()
        self._wall_s_before = 0.0  # of the run that this one goes on with
        self._for_next_line: Metrics = {}  # what evaluations and checkpoints have left since the last one
        self._events = Events(run_dir, self._run_s)
        failures.warn, failures.on_death, failures.on_recovery = self.warn, self._events.died, self._events.is_back
        self._waiting, self._waiting_seen = MeanWaiting(), MeanWaiting()  # for lines, and for the view
        self._started = self._step_began = time.perf_counter()
        self._generators = GeneratorRates((), self._started)

    async def watch(self, slow_callback_ms: float) -> None:
        """Measure the event loop and keep the view fresh, until cancelled.

        Whatever blocks the loop for longer than that is told, with its stack.
        """
        await gather_or_cancel(self.loop_lag.watch(slow_callback_ms, self.warn), self._display.watch(self._look))

    def stopwatch(self) -> Stopwatch:
        return Stopwatch()

    @property
    def wall_s(self) -> float:
        return self._run_s(time.perf_counter())

    def _run_s(self, at: float) -> float:
        """A time of time.perf_counter on the run's clock."""
        return self._wall_s_before + at - self._started

    def offset_clock(self, wall_s: float) -> None:
        """The run has lasted so long before. To be said before anything is recorded: everything is on this clock."""
        self._wall_s_before = wall_s

    def timeline(self, most_mb: float) -> Timeline:
        """Its zero is that of `wall_s`."""
        return Timeline(self.run_dir, self._started - self._wall_s_before, most_mb, self.warn)

    def training_begins(self, generators: Sequence[GeneratorStats]) -> None:
        """Rates count from here; `wall_s` counts from the construction, the launch included."""
        self.startup.ended("weights")
        log.info("%s", RENAMED_NOTICE)
        self._step_began = time.perf_counter()
        self._generators = GeneratorRates(generators, self._step_began)
        self._waiting.drain(self._step_began)

    def group_finished(self, rollout: Rollout, dropped: str | None = None) -> None:
        """Also of one that is dropped, for the reason given: it has nothing to learn from."""
        self._finished.add(rollout, filtered=dropped is not None)
        scores = rollout.scores
        if scores.texts:
            self.sinks.text(self.step, "rollouts", rollout_rows(rollout))
            question = rollout.group.prompt.problem.question
            self._display.sampled(Sample(self.step, question, scores.texts, scores.rewards))
            tokens = {"tokens": scores.tokens} if scores.tokens else {}
            self.run_dir.append("rollouts.jsonl", rollout_record(self.step, rollout, dropped), **tokens)

    def group_dropped(self, ticket: Ticket, error: RewardError | ZeroVarianceGroup) -> None:
        """Called while its ticket is still out."""
        self.run_dir.append("ledger.jsonl", {"dropped": self.pacer.entry(ticket), "reason": error.reason})
        if isinstance(error, ZeroVarianceGroup):
            self.group_finished(error.rollout, error.reason)
        else:
            self.warn(f"dropped a group: {error}")

    def groups_requeued(self, tickets: Sequence[Ticket], reason: str) -> None:
        """Groups that were lost, with a process or with the run."""
        if tickets:
            entries = [self.pacer.entry(ticket) for ticket in tickets]
            self.run_dir.append("ledger.jsonl", {"requeued": entries, "reason": reason})

    def warn(self, message: str) -> None:
        log.warning("%s", message)
        self._display.warn(message)

    @contextmanager
    def evaluation_wait(self) -> Iterator[None]:
        """Time in which the training waits for an evaluation: `time/eval_s` of the next line, not `time/step_s`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            waited_s = time.perf_counter() - started
            self._step_began += waited_s
            before_s = self._for_next_line.get("time/eval_s", 0.0)
            self._for_next_line["time/eval_s"] = before_s + waited_s

    def evaluated(self, report: EvaluationReport) -> None:
        """Its numbers go into the next line of metrics; where there are two by then, those of the newer one."""
        self.history.add_evaluation(report)
        self.failures.progress.notify()
        self._for_next_line |= {f"eval/{name}": value for name, value in report.as_record().items()}
        self._display.evaluated(report)

    def evaluation_began(self, step: int) -> None:
        """One that runs beside the training."""
        self.history.evaluating = step

    def evaluation_skipped(self, step: int, why: str) -> None:
        self.history.evaluations_skipped += 1
        self._for_next_line["eval/skipped"] = self._for_next_line.get("eval/skipped", 0) + 1
        self.warn(f"no evaluation after step {step}: {why}")

    def checkpoint_skipped(self, step: int) -> None:
        self.history.checkpoints["skipped"] += 1
        self.warn(f"no checkpoint of step {step}: the one before it is still being written; raise checkpoint.every")

    def checkpoint_taken(self, seconds: float) -> None:
        """How long the training waited for it."""
        self._for_next_line["time/checkpoint_wait_s"] = seconds
        self._step_began += seconds

    def checkpoint_written(self, report: Mapping[str, float]) -> None:
        self.history.checkpoints["written"] += 1
        self._for_next_line |= {f"checkpoint/{name}": value for name, value in report.items()}

    def checkpoint_failed(self, step: int, error: Exception) -> None:
        self.history.checkpoints["failed"] += 1
        self.warn(f"no checkpoint of step {step}: {error}; those before it are intact, and the training goes on")

    @contextmanager
    def metrics_line(self, trained: TrainedStep, generators: Sequence[GeneratorStats]) -> Iterator[None]:
        """A step has finished: its line of metrics is written and shown when the block ends, however it ends.

        In the block the step is evaluated if that is due, so the last line carries the last evaluation.
        """
        step, batch = trained.number, trained.batch
        self.failures.step_trained()
        self.run_dir.append("ledger.jsonl", {"step": step, "trained": [self.pacer.entry(t) for t in batch.tickets]})
        now = time.perf_counter()
        step_s, self._step_began = now - self._step_began, now
        rewards = [reward for group in batch.rewards for reward in group]
        metrics: Metrics = {
            "step": step,
            "wall_s": self.wall_s,
            "reward/mean": fmean(rewards),
            "reward/group_std": fmean(_std(group) for group in batch.rewards),
            **trained.metrics,
            **trained.times.seconds,
            "time/step_s": step_s,
            **self._generators.update(generators, now),
            **self._finished.drain(),
            "recovery/restarts": len(self.failures.deaths),
            "recovery/groups_requeued": self.pacer.requeued.total(),
            "buffer/groups_waiting": batch.groups_waiting,
            "rollout/tickets_in_use": self.pacer.outstanding,
            "rollout/concurrency": self.pacer.concurrency.limit,
            **self.loop_lag.drain(),
            **{f"driver/waiting/{group}/{what}": n for (group, what), n in self._waiting.drain(now).items()},
        }
        self.step = step
        self.startup.ended("first_step")
        self.history.add_step(metrics)
        try:
            yield
        finally:
            metrics = with_old_names(metrics | self._for_next_line | self.measured.drain())
            self._for_next_line = {}
            self.run_dir.append("metrics.jsonl", metrics)
            self._display.step(metrics)
            self.sinks.scalars(step, metrics)
            self._send_histograms(step, batch)

    def write_summary(self, status: str, error: BaseException | None = None) -> dict[str, Any]:
        """Leave `summary.json`; also after a failure."""
        ledger = self.pacer
        summary = {
            "status": status,
            "steps": self.step,
            "wall_s": self.wall_s,
            "startup_s": self.startup.seconds,
            **self.history.totals(),
            "groups_admitted": ledger.admitted,
            "groups_trained": ledger.trained,
            "groups_dropped": dict(ledger.dropped),
            "groups_requeued": dict(ledger.requeued),
            "groups_in_flight": ledger.outstanding,
            "prompts": self.prompts,
            "restarts": self.failures.restarts,
            "recovery": recovery_of(self.failures.deaths, self._run_s),
            "services": {name: each for replicas in self.replicas().values() for name, each in replicas.items()},
            "write_errors": self.run_dir.write_errors,
            "sinks": self.sinks.counts(),
            "error": None if error is None else f"{type(error).__name__}: {error}",
        }
        summary = with_old_names(summary)
        self.run_dir.write_json("summary.json", summary)
        self.sinks.summary({name: value for name, value in summary.items() if isinstance(value, (str, int, float))})
        return summary

    def state(self) -> dict[str, Any]:
        """What a resumed run needs of the past, as JSON can hold it."""
        return {"wall_s": self.wall_s, **self.history.state(self.step)}

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """Go on from a `state`. The files of the run's folder were cut to that moment; in a new one there are none."""
        self.step = step
        self.history.restore(step, state, self.run_dir.read("metrics.jsonl"))
        self.offset_clock(state["wall_s"])
        self._events.resumed(step, state["wall_s"])

    def _look(self) -> RunStatus:
        return RunStatus(self.replicas(), self.failures.restarts, self._waiting_seen.drain(time.perf_counter()))

    def _send_histograms(self, step: int, batch: BatchReport) -> None:
        """How the batch lies, to the sinks alone: metrics.jsonl holds numbers."""
        trained_at = step - 1  # the version behind the step
        values: dict[str, list[float]] = {
            "rewards": [reward for group in batch.rewards for reward in group],
            "completion_tokens": [length for group in batch.lengths for length in group],
            "policy_age": [trained_at - version for version in batch.oldest_versions],
        }
        for name, each in values.items():
            self.sinks.histogram(step, f"batch/{name}", each)


def _std(rewards: Sequence[float]) -> float:
    mean = fmean(rewards)
    return fmean((reward - mean) ** 2 for reward in rewards) ** 0.5
