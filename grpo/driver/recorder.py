"""Record a run: metrics, sampled groups, the ledger of tickets, events, and the summary."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from grpo.driver.pacing import Pacer
from grpo.errors import GroupError, ZeroVarianceGroup
from grpo.observe.metrics import FinishedGroups, GeneratorRates, History, Startup, Stopwatch, recovery_of
from grpo.observe.renamed_metrics import RENAMED_NOTICE, with_old_names
from grpo.observe.run_dir import Events, RunDirectory, rollout_record, rollout_rows
from grpo.observe.sinks.fanout import Sinks
from grpo.observe.terminal.display import Display
from grpo.observe.terminal.view import RunStatus, Sample
from grpo.observe.timeline import Timeline
from grpo.services.failures import Failures
from grpo.telemetry.activity import MeanWaiting
from grpo.telemetry.loop_lag import LoopLag
from grpo.telemetry.metrics import MetricSet
from grpo.types import BatchReport, EvaluationReport, GeneratorStats, Rollout, Ticket
from grpo.utils.aio import gather_or_cancel

log = logging.getLogger(__name__)
Metrics = dict[str, float]
Replicas = Mapping[str, Mapping[str, Mapping[str, Any]]]  # service -> replica -> its stats


@dataclasses.dataclass(frozen=True)
class TrainedStep:
    """A step that the trainer has finished: the trainer's metrics, the batch, and the durations of the stages."""

    number: int
    metrics: Metrics
    batch: BatchReport
    times: Stopwatch


class Recorder:
    """Records what the loop and the actors report, and forwards it to the run directory, the display and the sinks.

    All methods are quick and are called on the event loop; files are written in a thread. Its constructor subscribes
    to `failures`: warnings are shown, deaths and returns of actors become events.

    Example:
        recorder = Recorder(run_dir, make_display(...), make_pacer(config), Failures(config.recovery))
        await train_loop(services, config, recorder, shutdown)
        summary = recorder.write_summary("completed")
    """

    def __init__(
        self,
        run_dir: RunDirectory,
        display: Display,
        pacer: Pacer,
        failures: Failures,
        *,
        startup: Startup | None = None,
        make_sinks: Callable[[Callable[[str], None]], Sinks] | None = None,
        wall_s_before: float = 0.0,
    ) -> None:
        """`make_sinks` is called with `warn`. `wall_s_before` is how long the run lasted before it was resumed."""
        self.run_dir, self.pacer, self.failures, self._display = run_dir, pacer, failures, display
        self.step = 0  # last trained step
        self.startup = startup or Startup()
        self.sinks = make_sinks(self.warn) if make_sinks else Sinks({}, self.warn)
        self.history = History()
        self.loop_lag = LoopLag()
        self.measured = MetricSet()  # by all actors, since the last line of metrics
        self._finished = FinishedGroups()
        self._for_next_line: Metrics = {}  # from evaluations and checkpoints, since the last line of metrics
        self.replicas: Replicas = {}  # final stats, once training has ended
        self._prompt_counts: dict[str, int] = {}
        self._waiting = MeanWaiting()
        self._wall_s_before = wall_s_before
        self._started = self._step_began = time.perf_counter()
        self._generators = GeneratorRates((), self._started)
        self._events = Events(run_dir, self._run_s)
        failures.warn, failures.on_death, failures.on_recovery = self.warn, self._events.died, self._events.is_back

    async def watch(self, replicas: Callable[[], Replicas], slow_callback_ms: float) -> None:
        """Measure the lag of the event loop and refresh the display.

        Warns of a callback that blocks the loop longer than `slow_callback_ms`, with its stack.

        Consumes: the stats of `replicas` and the waits of all tasks.
        Waits for: timers.
        Unblocked by: the clock alone.
        Ends when: cancelled.
        """
        waiting = MeanWaiting()  # its own: each one averages since its own last reading

        def status() -> RunStatus:
            return RunStatus(replicas(), self.failures.restarts, waiting.drain(time.perf_counter()))

        await gather_or_cancel(self.loop_lag.watch(slow_callback_ms, self.warn), self._display.watch(status))

    def stopwatch(self) -> Stopwatch:
        """Return the stopwatch for the stages of one step; a subclass may use another clock."""
        return Stopwatch()

    @property
    def wall_s(self) -> float:
        """Seconds since the start of the run, the time before a resume included."""
        return self._run_s(time.perf_counter())

    def _run_s(self, at: float) -> float:
        """Convert a reading of time.perf_counter to the run's clock."""
        return self._wall_s_before + at - self._started

    def timeline(self, most_mb: float) -> Timeline:
        """Create the run's timeline, which starts at `wall_s` 0 and grows to at most `most_mb` megabytes."""
        return Timeline(self.run_dir, self._started - self._wall_s_before, most_mb, self.warn)

    def training_begins(self, generators: Sequence[GeneratorStats]) -> None:
        """Start the rates and step times here; `wall_s` started with the constructor and includes the launch."""
        self.startup.ended("weights")
        log.info("%s", RENAMED_NOTICE)
        self._step_began = time.perf_counter()
        self._generators = GeneratorRates(generators, self._step_began)
        self._waiting.drain(self._step_began)

    def training_ended(self, replicas: Replicas, prompt_counts: Mapping[str, int]) -> None:
        """Keep the final stats of the services and the driver's counts of prompts for the summary."""
        self.replicas = replicas
        self.add_prompt_counts(prompt_counts)

    def add_prompt_counts(self, counts: Mapping[str, int]) -> None:
        """Add counts to `prompts` of the summary."""
        self._prompt_counts |= counts

    def group_finished(self, rollout: Rollout, dropped: str | None = None) -> None:
        """Record a finished group; `dropped` is the reason if it was dropped as a zero-variance group."""
        self._finished.add(rollout, filtered=dropped is not None)
        scores = rollout.scores
        if scores.texts:
            self.sinks.text(self.step, "rollouts", rollout_rows(rollout))
            question = rollout.group.prompt.problem.question
            self._display.sampled(Sample(self.step, question, scores.texts, scores.rewards, scores.transcripts))
            tokens = {"tokens": scores.tokens} if scores.tokens else {}
            self.run_dir.append("rollouts.jsonl", rollout_record(self.step, rollout, dropped), **tokens)

    def group_dropped(self, ticket: Ticket, error: GroupError | ZeroVarianceGroup) -> None:
        """Record a dropped group, before its ticket returns to the pacer."""
        self.run_dir.append("ledger.jsonl", {"dropped": self.pacer.ledger_entry(ticket), "reason": error.reason})
        if isinstance(error, ZeroVarianceGroup):
            self.group_finished(error.rollout, error.reason)
        else:
            self.warn(f"dropped a group: {error}")

    def groups_requeued(self, tickets: Sequence[Ticket], reason: str) -> None:
        """Record groups that were lost and will be generated again."""
        if tickets:
            entries = [self.pacer.ledger_entry(ticket) for ticket in tickets]
            self.run_dir.append("ledger.jsonl", {"requeued": entries, "reason": reason})

    def warn(self, message: str) -> None:
        """Log a warning and show it."""
        log.warning("%s", message)
        self._display.warn(message)

    @contextmanager
    def evaluation_wait(self) -> Iterator[None]:
        """Count the time in the block as `time/eval_s` of the next line of metrics, not as `time/step_s`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            waited_s = time.perf_counter() - started
            self._step_began += waited_s
            before_s = self._for_next_line.get("time/eval_s", 0.0)
            self._for_next_line["time/eval_s"] = before_s + waited_s

    def evaluated(self, report: EvaluationReport) -> None:
        """Put a finished evaluation into the next line of metrics, replacing an older one there."""
        self.history.add_evaluation(report)
        self.failures.progress.notify()
        self._for_next_line |= {f"eval/{name}": value for name, value in report.as_record().items()}
        self._display.evaluated(report)

    def evaluation_skipped(self, step: int, reason: str) -> None:
        self.history.evaluations_skipped += 1
        self._for_next_line["eval/skipped"] = self._for_next_line.get("eval/skipped", 0) + 1
        self.warn(f"skipped evaluation after step {step}: {reason}")

    def checkpoint_skipped(self, step: int) -> None:
        self.history.checkpoints["skipped"] += 1
        self.warn(f"skipped checkpoint at step {step}: the previous one is still being written; raise checkpoint.every")

    def checkpoint_taken(self, seconds: float) -> None:
        """Record how long training waited for a checkpoint's snapshot."""
        self._for_next_line["time/checkpoint_wait_s"] = seconds
        self._step_began += seconds

    def checkpoint_written(self, report: Mapping[str, float]) -> None:
        self.history.checkpoints["written"] += 1
        self._for_next_line |= {f"checkpoint/{name}": value for name, value in report.items()}

    def checkpoint_failed(self, step: int, error: Exception) -> None:
        self.history.checkpoints["failed"] += 1
        self.warn(f"checkpoint at step {step} failed: {error}; earlier checkpoints are intact, training continues")

    @contextmanager
    def metrics_line(self, trained: TrainedStep, generators: Sequence[GeneratorStats]) -> Iterator[None]:
        """Record a finished step; write and show its line of metrics when the block ends, even with an error.

        An evaluation that is due runs in the block, so that the last line contains the last evaluation.
        """
        step, batch = trained.number, trained.batch
        self.failures.step_trained()
        self.run_dir.append(
            "ledger.jsonl", {"step": step, "trained": [self.pacer.ledger_entry(t) for t in batch.tickets]}
        )

        # Rates and means cover the time since the previous line; the block below is not part of the step.
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

        # The driver's state moves on before the block: a checkpoint or an error there finds this step finished.
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
        """Write `summary.json`, also after a failure, and return its content."""
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
            "prompts": self._prompt_counts,
            "restarts": self.failures.restarts,
            "recovery": recovery_of(self.failures.deaths, self._run_s),
            "services": {name: each for replicas in self.replicas.values() for name, each in replicas.items()},
            "write_errors": self.run_dir.write_errors,
            "sinks": self.sinks.counts(),
            "error": None if error is None else f"{type(error).__name__}: {error}",
        }
        summary = with_old_names(summary)
        self.run_dir.write_json("summary.json", summary)
        self.sinks.summary({name: value for name, value in summary.items() if isinstance(value, (str, int, float))})
        return summary

    def state(self) -> dict[str, Any]:
        """Return the part of the records that a resumed run needs, JSON-serializable."""
        return {"wall_s": self.wall_s, **self.history.state(self.step)}

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """Continue from a `state`. The files in the run's folder were cut to that moment, or the folder is new."""
        self.step = step
        self.history.restore(step, state, self.run_dir.read("metrics.jsonl"))
        self._wall_s_before = state["wall_s"]
        self._events.resumed(step, state["wall_s"])

    def _send_histograms(self, step: int, batch: BatchReport) -> None:
        """Send the distributions within a batch to the sinks; metrics.jsonl contains numbers only."""
        trained_at = step - 1  # policy version before the step
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
