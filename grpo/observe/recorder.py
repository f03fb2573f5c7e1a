"""Collects what happens during a run into metrics, samples and the summary."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from grpo.observe.display import Display
from grpo.observe.loop_lag import LoopLag
from grpo.observe.run_dir import RunDirectory
from grpo.pacing import Pacer
from grpo.types import BatchReport, EvaluationReport, GenerationReport, GeneratorStats, Group, Scores

log = logging.getLogger(__name__)

Metrics = dict[str, float]


class Stopwatch:
    """Named durations in seconds: `with stopwatch("time/train_step_s"): ...`."""

    def __init__(self) -> None:
        self.seconds: Metrics = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - started


class Recorder:
    """The driver's memory. All methods are quick and called on the event loop; files are written in a thread."""

    def __init__(self, run_dir: RunDirectory, display: Display, pacer: Pacer) -> None:
        self.loop_lag = LoopLag()
        self.evaluations: list[EvaluationReport] = []
        self.prompts: dict[str, int] = {}
        self.run_dir = run_dir
        self._display, self._pacer = display, pacer
        self._steps: list[Metrics] = []
        self._reports: list[GenerationReport] = []  # of groups finished since the last step
        self._generators: list[GeneratorStats] = []
        self._evaluation_metrics: Metrics = {}  # since the last line
        self._evaluations_skipped = 0
        self._started = self._step_began = self._generators_seen = time.perf_counter()

    def stopwatch(self) -> Stopwatch:
        return Stopwatch()

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._started

    def training_begins(self, generators: Sequence[GeneratorStats]) -> None:
        """Rates count from here; `wall_s` counts from the construction, the launch included."""
        self._generators = list(generators)
        self._step_began = self._generators_seen = time.perf_counter()

    def group_finished(self, group: Group, scores: Scores, report: GenerationReport) -> None:
        self._reports.append(report)
        if scores.texts:
            self.run_dir.append(
                "rollouts.jsonl",
                {
                    "step": len(self._steps),
                    "prompt_serial": group.prompt.serial,
                    "prompt": group.prompt.problem.question,
                    "answer": group.prompt.problem.answer,
                    "completions": scores.texts,
                    "rewards": scores.rewards,
                    "reward_parts": dict(scores.parts),
                    "advantages": group.advantages,
                    "policy_version": group.oldest_version,
                },
            )

    def group_dropped(self, error: Exception) -> None:
        log.warning("dropped a group: %s", error)
        self._display.warn(f"dropped a group: {error}")

    @contextmanager
    def evaluation_wait(self) -> Iterator[None]:
        """Time in which the training waits for an evaluation: `time/eval_s` of the next line, not `time/step_s`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            waited_s = time.perf_counter() - started
            self._step_began += waited_s
            before_s = self._evaluation_metrics.get("time/eval_s", 0.0)
            self._evaluation_metrics["time/eval_s"] = before_s + waited_s

    def evaluated(self, report: EvaluationReport) -> None:
        """Its numbers go into the next line of metrics; where there are two by then, those of the newer one."""
        self.evaluations.append(report)
        self._evaluation_metrics |= {f"eval/{name}": value for name, value in report.as_record().items()}
        self._display.evaluated(report)

    def evaluation_skipped(self, step: int) -> None:
        self._evaluations_skipped += 1
        self._evaluation_metrics["eval/skipped"] = self._evaluation_metrics.get("eval/skipped", 0) + 1
        log.warning("no evaluation after step %d: the one before it still runs", step)
        self._display.warn(
            f"no evaluation after step {step}: the one before it still runs; "
            "raise eval.every, or speed it up with fewer eval.prompts or more eval.replicas"
        )

    @contextmanager
    def metrics_line(
        self,
        step: int,
        trained: Metrics,
        batch: BatchReport,
        generators: Sequence[GeneratorStats],
        times: Stopwatch,
    ) -> Iterator[None]:
        """A step has finished: its line of metrics is written and shown when the block ends, however it ends.

        In the block the step is evaluated if that is due, so the last line carries the last evaluation.
        """
        now = time.perf_counter()
        step_s, self._step_began = now - self._step_began, now
        rewards = [reward for group in batch.rewards for reward in group]
        metrics: Metrics = {
            "step": step,
            "wall_s": self.wall_s,
            "reward/mean": fmean(rewards),
            "reward/group_std": fmean(_spread(group) for group in batch.rewards),
            **trained,
            **times.seconds,
            "time/step_s": step_s,
            **self._generator_metrics(generators, now),
            "buffer/groups_waiting": batch.groups_waiting,
            "rollout/outstanding": self._pacer.outstanding,
            "driver/loop_lag_p99_ms": self.loop_lag.take_p99_ms(),
        }
        self._steps.append(metrics)
        try:
            yield
        finally:
            metrics |= self._evaluation_metrics
            self._evaluation_metrics = {}
            self.run_dir.append("metrics.jsonl", metrics)
            self._display.step(metrics)

    def write_summary(self, status: str, error: BaseException | None = None) -> dict[str, Any]:
        """Leave `summary.json`; also after a failure."""
        steps, ledger = self._steps, self._pacer
        tenth = max(1, len(steps) // 10)
        total_s = sum(step["time/step_s"] for step in steps)
        summary = {
            "status": status,
            "steps": len(steps),
            "wall_s": self.wall_s,
            "reward_first": _mean(steps[:tenth], "reward/mean"),
            "reward_last": _mean(steps[-tenth:], "reward/mean"),
            "eval_first": self.evaluations[0].reward_mean if self.evaluations else None,
            "eval_last": self.evaluations[-1].reward_mean if len(self.evaluations) > 1 else None,
            "evaluations": [report.as_record() for report in self.evaluations],
            "evaluations_skipped": self._evaluations_skipped,
            "groups_admitted": ledger.admitted,
            "groups_trained": ledger.trained,
            "groups_dropped": dict(ledger.dropped),
            "groups_in_flight": ledger.outstanding,
            "prompts": self.prompts,
            "max_policy_age_seen": max((step["policy_age/max"] for step in steps), default=None),
            "trainer_wait_fraction": sum(s["time/trainer_wait_s"] for s in steps) / total_s if steps else None,
            "generator_busy_fraction": _mean(steps, "generator/busy_fraction"),
            "weight_sync_s_mean": _mean(steps, "time/weight_sync_s"),
            "restarts": {},
            "write_errors": self.run_dir.write_errors,
            "error": None if error is None else f"{type(error).__name__}: {error}",
        }
        self.run_dir.write_json("summary.json", summary)
        return summary

    def _generator_metrics(self, generators: Sequence[GeneratorStats], now: float) -> Metrics:
        """Rates since the last step, from counters that only grow; evaluations by these generators are part of it."""
        elapsed_s, self._generators_seen = now - self._generators_seen, now
        busy_s = sum(stats.busy_s for stats in generators) - sum(stats.busy_s for stats in self._generators)
        tokens = sum(stats.tokens for stats in generators) - sum(stats.tokens for stats in self._generators)
        self._generators = list(generators)
        reports, self._reports = self._reports, []
        metrics = {
            "generator/busy_fraction": min(1.0, busy_s / elapsed_s / len(generators)),
            "generator/tokens_per_s": tokens / elapsed_s,
        }
        completions = sum(report.completion_count for report in reports)
        if completions:
            metrics["generator/completion_tokens_mean"] = sum(r.token_count for r in reports) / completions
            metrics["generator/truncated_fraction"] = sum(r.truncated_count for r in reports) / completions
        return metrics


def _mean(steps: Sequence[Metrics], name: str) -> float | None:
    return fmean(step[name] for step in steps) if steps else None


def _spread(rewards: Sequence[float]) -> float:
    mean = fmean(rewards)
    return fmean((reward - mean) ** 2 for reward in rewards) ** 0.5
