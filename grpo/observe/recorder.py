"""Collects what happens during a run into metrics, samples and the summary."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean, median
from typing import Any, NamedTuple

from grpo.failures import Death, Failures
from grpo.observe.display import Display
from grpo.observe.events import Events
from grpo.observe.loop_lag import LoopLag
from grpo.observe.run_dir import RunDirectory
from grpo.observe.sinks.fanout import Sinks
from grpo.observe.startup import Startup
from grpo.observe.timeline import Timeline
from grpo.observe.view import Glance, Sample
from grpo.pacing import Pacer
from grpo.structured import together
from grpo.telemetry.accumulators import MetricSet
from grpo.telemetry.recording import span
from grpo.types import (
    BatchReport,
    EvaluationReport,
    GenerationReport,
    GeneratorStats,
    RewardError,
    Rollout,
    Ticket,
    ZeroAdvantage,
    evaluation_report,
)
from grpo.waiting import MeanWaiting

log = logging.getLogger(__name__)

Metrics = dict[str, float]
Replicas = Mapping[str, Mapping[str, Mapping[str, Any]]]  # service -> replica -> its figures

_IN_SUMMARY = (
    "reward/mean", "policy_age/max", "time/step_s", "time/trainer_wait_s", "time/weight_sync_s",
    "generator/busy_fraction",
)  # fmt: skip


class _Finished(NamedTuple):
    """The numbers of a group: its tokens must not be held on to."""

    report: GenerationReport
    rewards: tuple[float, ...]
    shaped_rewards: tuple[float, ...]


class Stopwatch:
    """Named durations in seconds, spans of the timeline too: `with stopwatch("time/train_step_s"): ...`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: Metrics = {}
        self._clock = clock

    @contextmanager
    def __call__(self, name: str, **args: Any) -> Iterator[None]:
        started = self._clock()
        try:
            with span(name.removeprefix("time/").removesuffix("_s"), "stage", **args):
                yield
        finally:
            self.seconds[name] = self._clock() - started


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
        self.evaluations: list[EvaluationReport] = []
        self.prompts: dict[str, int] = {}
        self.run_dir = run_dir
        self.pacer, self._display = pacer, display
        self.startup = Startup()
        self.sinks = Sinks({}, self.warn)
        self.measured = MetricSet()  # by all actors, since the last line
        self.step = 0  # the last one that was trained
        self._steps: list[Metrics] = []  # what the summary needs of each line of this folder's metrics.jsonl
        self._finished: list[_Finished] = []  # groups since the last step, those dropped included
        self._filtered = 0  # of them, for having nothing to learn from
        self._generators: dict[str, GeneratorStats] = {}  # by process, as of the last step
        self._checkpoints = {"written": 0, "failed": 0, "skipped": 0}
        self._resumed_at: list[int] = []
        self._wall_s_before = 0.0  # of the run that this one goes on with
        self._for_next_line: Metrics = {}  # what evaluations and checkpoints have left since the last one
        self._evaluations_skipped = 0
        self._evaluating: int | None = None  # the step of an evaluation that runs beside the training
        self._events = Events(run_dir, self._run_s)
        failures.tell, failures.on_death, failures.on_return = self.warn, self._events.died, self._events.is_back
        self._waiting, self._waiting_seen = MeanWaiting(), MeanWaiting()  # for lines, and for the view
        self._started = self._step_began = self._generators_seen = time.perf_counter()

    async def watch(self, slow_callback_ms: float) -> None:
        """Measure the event loop and keep the view fresh, until cancelled.

        Whatever blocks the loop for longer than that is told, with its stack.
        """
        await together(self.loop_lag.watch(slow_callback_ms, self.warn), self._display.watch(self._look))

    def stopwatch(self) -> Stopwatch:
        return Stopwatch()

    @property
    def wall_s(self) -> float:
        return self._run_s(time.perf_counter())

    def _run_s(self, at: float) -> float:
        """A time of time.perf_counter on the run's clock."""
        return self._wall_s_before + at - self._started

    def go_on_after(self, wall_s: float) -> None:
        """The run has lasted so long before. To be said before anything is recorded: everything is on this clock."""
        self._wall_s_before = wall_s

    def timeline(self, most_mb: float) -> Timeline:
        """Its zero is that of `wall_s`."""
        return Timeline(self.run_dir, self._started - self._wall_s_before, most_mb, self.warn)

    def training_begins(self, generators: Sequence[GeneratorStats]) -> None:
        """Rates count from here; `wall_s` counts from the construction, the launch included."""
        self.startup.ended("weights")
        self._generators = {stats.process: stats for stats in generators}
        self._step_began = self._generators_seen = time.perf_counter()
        self._waiting.take(self._step_began)

    def group_finished(self, rollout: Rollout, dropped: str | None = None) -> None:
        """Also of one that is dropped, for the reason given."""
        group, scores = rollout.group, rollout.scores
        self._finished.append(_Finished(rollout.report, scores.rewards, rollout.shaped_rewards))
        if scores.texts:
            self.sinks.text(self.step, "rollouts", _samples(rollout))
            self._display.sampled(Sample(self.step, group.prompt.problem.question, scores.texts, scores.rewards))
            self.run_dir.append(
                "rollouts.jsonl",
                {
                    "step": self.step,
                    "prompt_serial": group.prompt.serial,
                    "prompt": group.prompt.problem.question,
                    "answer": group.prompt.problem.answer,
                    "completions": scores.texts,
                    "rewards": scores.rewards,
                    "reward_parts": dict(scores.parts),
                    "shaped_rewards": rollout.shaped_rewards,
                    "advantages": group.advantages,
                    "policy_version": group.oldest_version,
                    **({"dropped": dropped} if dropped else {}),
                },
                **({"tokens": scores.tokens} if scores.tokens else {}),
            )

    def group_dropped(self, ticket: Ticket, error: RewardError | ZeroAdvantage) -> None:
        """Called while its ticket is still out."""
        self.run_dir.append("ledger.jsonl", {"dropped": self.pacer.entry(ticket), "reason": error.reason})
        if isinstance(error, ZeroAdvantage):
            self._filtered += 1
            self.group_finished(error.rollout, error.reason)
        else:
            self.warn(f"dropped a group: {error}")

    def groups_begun_again(self, tickets: Sequence[Ticket], reason: str) -> None:
        """Groups that were lost, with a process or with the run."""
        if tickets:
            entries = [self.pacer.entry(ticket) for ticket in tickets]
            self.run_dir.append("ledger.jsonl", {"begun_again": entries, "reason": reason})

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
        self.evaluations.append(report)
        self._evaluating = None
        self.failures.progress.notify()
        self._for_next_line |= {f"eval/{name}": value for name, value in report.as_record().items()}
        self._display.evaluated(report)

    def evaluation_began(self, step: int) -> None:
        """One that runs beside the training."""
        self._evaluating = step

    def evaluation_skipped(self, step: int, why: str) -> None:
        self._evaluations_skipped += 1
        self._for_next_line["eval/skipped"] = self._for_next_line.get("eval/skipped", 0) + 1
        self.warn(f"no evaluation after step {step}: {why}")

    def checkpoint_skipped(self, step: int) -> None:
        self._checkpoints["skipped"] += 1
        self.warn(f"no checkpoint of step {step}: the one before it is still being written; raise checkpoint.every")

    def checkpoint_taken(self, seconds: float) -> None:
        """How long the training waited for it."""
        self._for_next_line["time/checkpoint_wait_s"] = seconds
        self._step_began += seconds

    def checkpoint_written(self, report: Mapping[str, float]) -> None:
        self._checkpoints["written"] += 1
        self._for_next_line |= {f"checkpoint/{name}": value for name, value in report.items()}

    def checkpoint_failed(self, step: int, error: Exception) -> None:
        self._checkpoints["failed"] += 1
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
            "reward/group_std": fmean(_spread(group) for group in batch.rewards),
            **trained.metrics,
            **trained.times.seconds,
            "time/step_s": step_s,
            **self._generator_metrics(generators, now),
            **self._rollout_metrics(),
            "recovery/restarts": len(self.failures.deaths),
            "recovery/groups_begun_again": self.pacer.reissued.total(),
            "buffer/groups_waiting": batch.groups_waiting,
            "rollout/outstanding": self.pacer.outstanding,
            "rollout/concurrency": self.pacer.concurrency.limit,
            **self.loop_lag.take(),
            **{f"driver/waiting/{group}/{what}": n for (group, what), n in self._waiting.take(now).items()},
        }
        self.step = step
        self.startup.ended("first_step")
        self._steps.append(_kept(metrics))
        try:
            yield
        finally:
            metrics |= self._for_next_line | self.measured.take()
            self._for_next_line = {}
            self.run_dir.append("metrics.jsonl", metrics)
            self._display.step(metrics)
            self.sinks.scalars(step, metrics)
            self._send_histograms(step, batch)

    def write_summary(self, status: str, error: BaseException | None = None) -> dict[str, Any]:
        """Leave `summary.json`; also after a failure."""
        steps, ledger = self._steps, self.pacer
        tenth = max(1, len(steps) // 10)
        total_s = sum(step["time/step_s"] for step in steps)
        summary = {
            "status": status,
            "steps": self.step,
            "wall_s": self.wall_s,
            "startup_s": self.startup.seconds,
            "reward_first": _mean(steps[:tenth], "reward/mean"),
            "reward_last": _mean(steps[-tenth:], "reward/mean"),
            "eval_first": self.evaluations[0].reward_mean if self.evaluations else None,
            "eval_last": self.evaluations[-1].reward_mean if len(self.evaluations) > 1 else None,
            "evaluations": [report.as_record() for report in self.evaluations],
            "evaluations_skipped": self._evaluations_skipped,
            "groups_admitted": ledger.admitted,
            "groups_trained": ledger.trained,
            "groups_dropped": dict(ledger.dropped),
            "groups_begun_again": dict(ledger.reissued),
            "groups_in_flight": ledger.outstanding,
            "prompts": self.prompts,
            "max_policy_age_seen": max((step["policy_age/max"] for step in steps), default=None),
            "trainer_wait_fraction": sum(s["time/trainer_wait_s"] for s in steps) / total_s if steps else None,
            "generator_busy_fraction": _mean(steps, "generator/busy_fraction"),
            "weight_sync_s_mean": _mean(steps, "time/weight_sync_s"),
            "restarts": self.failures.restarts,
            "recovery": self._recovery(),
            "checkpoints": self._checkpoints,
            "resumed_at": self._resumed_at,
            "services": {name: each for replicas in self.replicas().values() for name, each in replicas.items()},
            "write_errors": self.run_dir.write_errors,
            "sinks": self.sinks.counts(),
            "error": None if error is None else f"{type(error).__name__}: {error}",
        }
        self.run_dir.write_json("summary.json", summary)
        self.sinks.summary({name: value for name, value in summary.items() if isinstance(value, (str, int, float))})
        return summary

    def state(self) -> dict[str, Any]:
        """What a resumed run needs of the past, as JSON can hold it; the steps stand in metrics.jsonl.

        An evaluation of an earlier step that still runs is skipped there: its weights are gone.
        """
        lost = self._evaluating not in (None, self.step)
        return {
            "wall_s": self.wall_s,
            "evaluations": [dataclasses.asdict(report) for report in self.evaluations],
            "evaluations_skipped": self._evaluations_skipped + lost,
            "resumed_at": self._resumed_at,
        }

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """Go on from a `state`. The files of the run's folder were cut to that moment; in a new one there are none."""
        self.step = step
        self._steps = [_kept(line) for line in self.run_dir.read("metrics.jsonl") if line["step"] <= step]
        self.evaluations = [evaluation_report(record) for record in state["evaluations"]]
        self._evaluations_skipped = state["evaluations_skipped"]
        self._resumed_at = [*state["resumed_at"], step]
        self.go_on_after(state["wall_s"])
        self._events.resumed(step, state["wall_s"])

    def _look(self) -> Glance:
        return Glance(self.replicas(), self.failures.restarts, self._waiting_seen.take(time.perf_counter()))

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

    def _recovery(self) -> dict[str, Any]:
        """Seconds from the death of an actor until its replacement served, and until the next trained step."""
        deaths = self.failures.deaths
        summary: dict[str, Any] = {"deaths": [self._told(death) for death in deaths]}
        for name in ("back_s", "next_step_s"):
            values = [getattr(death, name) for death in deaths if getattr(death, name) is not None]
            summary |= {f"{name}_median": median(values), f"{name}_max": max(values)} if values else {}
        return summary

    def _told(self, death: Death) -> dict[str, Any]:
        told = dataclasses.asdict(death)
        return {"at_s": self._run_s(told.pop("at")), **told}

    def _generator_metrics(self, generators: Sequence[GeneratorStats], now: float) -> Metrics:
        """Rates since the last step, from counters that only grow; evaluations by these generators are part of it."""
        elapsed_s, self._generators_seen = now - self._generators_seen, now
        busy_s = tokens = 0.0
        for stats in generators:
            before = self._generators.get(stats.process, GeneratorStats(0.0, 0))  # a replacement counts from zero
            busy_s += stats.busy_s - before.busy_s
            tokens += stats.tokens - before.tokens
        self._generators = {stats.process: stats for stats in generators}
        return {
            "generator/busy_fraction": min(1.0, busy_s / elapsed_s / len(generators)),
            "generator/replicas": len(generators),
            "generator/tokens_per_s": tokens / elapsed_s,
        }

    def _rollout_metrics(self) -> Metrics:
        """Of all groups finished since the last step; `reward/mean` is of those that were trained on."""
        finished, self._finished = self._finished, []
        filtered, self._filtered = self._filtered, 0
        metrics: Metrics = {"rollout/zero_advantage_dropped": filtered}
        if finished:
            completions = sum(group.report.completion_count for group in finished)
            tokens = sum(group.report.token_count for group in finished)
            truncated = sum(group.report.truncated_count for group in finished)
            metrics["rollout/reward_mean"] = fmean(reward for group in finished for reward in group.rewards)
            metrics["rollout/shaped_reward_mean"] = fmean(r for group in finished for r in group.shaped_rewards)
            metrics["generator/completion_tokens_mean"] = tokens / completions
            metrics["generator/truncated_fraction"] = truncated / completions
        return metrics


def _kept(metrics: Metrics) -> Metrics:
    """A run may have a million steps: the lines themselves stay on disk."""
    return {name: metrics[name] for name in _IN_SUMMARY}


def _samples(rollout: Rollout) -> list[dict[str, Any]]:
    """A group as rows for people."""
    rows = zip(rollout.scores.texts, rollout.scores.rewards, rollout.group.advantages, strict=True)
    question = rollout.group.prompt.problem.question
    return [{"prompt": question, "completion": text, "reward": r, "advantage": a} for text, r, a in rows]


def _mean(steps: Sequence[Metrics], name: str) -> float | None:
    return fmean(step[name] for step in steps) if steps else None


def _spread(rewards: Sequence[float]) -> float:
    mean = fmean(rewards)
    return fmean((reward - mean) ** 2 for reward in rewards) ** 0.5
