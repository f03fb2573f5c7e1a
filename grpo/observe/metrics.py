"""The driver's own numbers: of a step (durations, generator rates, finished groups) and of a whole run (totals)."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from grpo.services.failures import Death
from grpo.telemetry.recording import span
from grpo.types import (
    EPISODE_LIMITS,
    EpisodeReport,
    EvaluationReport,
    GenerationReport,
    GeneratorStats,
    Rollout,
    evaluation_report,
)

_IMPORTED_S = time.perf_counter()
_KEPT_OF_A_STEP = (
    "reward/mean", "policy_age/max", "time/step_s", "time/trainer_wait_s", "time/weight_sync_s",
    "generator/busy_fraction",
)  # fmt: skip


class Stopwatch:
    """Measure named durations in seconds; each is a span of the timeline too.

    Example:
        times = Stopwatch()
        with times("time/train_step_s", step=3):
            metrics = await trainer.train_step(batch)
        times.seconds  # {"time/train_step_s": 0.41}
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock

    @contextmanager
    def __call__(self, name: str, **args: Any) -> Iterator[None]:
        started = self._clock()
        try:
            with span(name.removeprefix("time/").removesuffix("_s"), "stage", **args):
                yield
        finally:
            self.seconds[name] = self._clock() - started


class GeneratorRates:
    """Rates of the generators between two train steps, from counters that only grow. Evaluations count too."""

    def __init__(self, generators: Sequence[GeneratorStats], now_s: float) -> None:
        self._before = {stats.process: stats for stats in generators}
        self._before_s = now_s

    def update(self, generators: Sequence[GeneratorStats], now_s: float) -> dict[str, float]:
        """Return the rates since the last call."""
        elapsed_s, self._before_s = now_s - self._before_s, now_s
        busy_s = tokens = 0.0
        for stats in generators:
            before = self._before.get(stats.process, GeneratorStats(0.0, 0))  # a replacement counts from zero
            busy_s += stats.busy_s - before.busy_s
            tokens += stats.tokens - before.tokens
        self._before = {stats.process: stats for stats in generators}
        return {
            "generator/busy_fraction": min(1.0, busy_s / elapsed_s / len(generators)),
            "generator/replicas": len(generators),
            "generator/tokens_per_s": tokens / elapsed_s,
        }


class FinishedGroups:
    """Statistics of all groups that finished since the last step, dropped ones included.

    `reward/mean`, in contrast, covers only the groups trained on.
    """

    def __init__(self) -> None:
        self._groups: list[_GroupNumbers] = []
        self._filtered = 0

    def add(self, rollout: Rollout, *, filtered: bool) -> None:
        """Count a group; a `filtered` one is dropped because its rewards have no variance."""
        self._groups.append(_GroupNumbers(rollout.report, rollout.scores.rewards, rollout.shaped_rewards))
        self._filtered += filtered

    def drain(self) -> dict[str, float]:
        """Return the metrics since the last call, and start over."""
        groups, self._groups = self._groups, []
        filtered, self._filtered = self._filtered, 0
        metrics: dict[str, float] = {"rollout/zero_variance_dropped": filtered}
        if groups:
            completions = sum(group.report.completion_count for group in groups)
            tokens = sum(group.report.token_count for group in groups)
            truncated = sum(group.report.truncated_count for group in groups)
            metrics["rollout/reward_mean"] = fmean(reward for group in groups for reward in group.rewards)
            metrics["rollout/shaped_reward_mean"] = fmean(r for group in groups for r in group.shaped_rewards)
            metrics["generator/completion_tokens_mean"] = tokens / completions
            metrics["generator/truncated_fraction"] = truncated / completions
            metrics |= episode_metrics([episode for group in groups for episode in group.report.episodes])
        return metrics


def episode_metrics(episodes: Sequence[EpisodeReport]) -> dict[str, float]:
    """Return means over episodes as `episode/<name>`; empty if there are none.

    `ended_by_<limit>` are the fractions that a limit ended.
    """
    if not episodes:
        return {}
    values: dict[str, list[float]] = {
        "turns": [episode.turns for episode in episodes],
        "given_tokens": [episode.given for episode in episodes],
        "environment_s": [episode.environment_s for episode in episodes],
        "generator_s": [episode.generator_s for episode in episodes],
        **{f"ended_by_{limit}": [episode.ended_by == limit for episode in episodes] for limit in EPISODE_LIMITS},
    }
    for name in dict.fromkeys(name for episode in episodes for name in episode.metrics):
        values[name] = [episode.metrics.get(name, 0.0) for episode in episodes]
    return {f"episode/{name}": fmean(each) for name, each in values.items()}


class _GroupNumbers(NamedTuple):
    """The numbers of one group, without its tokens: they would stay in memory."""

    report: GenerationReport
    rewards: tuple[float, ...]
    shaped_rewards: tuple[float, ...]


class Startup:
    """Seconds of each stage between the start of the process and the first trained step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._before_s = 0.0

    def ended(self, stage: str) -> None:
        """Note the end of a stage; a stage that ended before is ignored."""
        if stage not in self.seconds:
            now_s = process_age_s()
            self.seconds[stage] = now_s - self._before_s
            self._before_s = now_s


def process_age_s() -> float:
    """Return seconds since this process started; on systems without /proc, since this module was imported."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), counted from the boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
    except (OSError, AttributeError):
        return time.perf_counter() - _IMPORTED_S


class History:
    """Totals of a run, for its summary and its checkpoints.

    It grows with the run. Of a step it keeps only what `totals` needs: a run may have a million steps, whose lines are
    on disk.
    """

    def __init__(self) -> None:
        self.evaluations: list[EvaluationReport] = []
        self.evaluations_skipped = 0
        self.evaluating: int | None = None  # the step of an evaluation that runs beside the training
        self.checkpoints = {"written": 0, "failed": 0, "skipped": 0}
        self._steps: list[dict[str, float]] = []
        self._resumed_at: list[int] = []

    def add_step(self, line: Mapping[str, float]) -> None:
        """Add a step by its line of metrics.jsonl."""
        self._steps.append({name: line[name] for name in _KEPT_OF_A_STEP})

    def add_evaluation(self, report: EvaluationReport) -> None:
        self.evaluations.append(report)
        self.evaluating = None

    def totals(self) -> dict[str, Any]:
        """Return the run's totals; the first and last reward are means over a tenth of the steps."""
        steps = self._steps
        tenth = max(1, len(steps) // 10)
        total_s = sum(step["time/step_s"] for step in steps)
        return {
            "reward_first": _mean(steps[:tenth], "reward/mean"),
            "reward_last": _mean(steps[-tenth:], "reward/mean"),
            "eval_first": self.evaluations[0].reward_mean if self.evaluations else None,
            "eval_last": self.evaluations[-1].reward_mean if len(self.evaluations) > 1 else None,
            "evaluations": [report.as_record() for report in self.evaluations],
            "evaluations_skipped": self.evaluations_skipped,
            "max_policy_age_seen": max((step["policy_age/max"] for step in steps), default=None),
            "trainer_wait_fraction": sum(s["time/trainer_wait_s"] for s in steps) / total_s if steps else None,
            "generator_busy_fraction": _mean(steps, "generator/busy_fraction"),
            "weight_sync_s_mean": _mean(steps, "time/weight_sync_s"),
            "checkpoints": self.checkpoints,
            "resumed_at": self._resumed_at,
        }

    def state(self, step: int) -> dict[str, Any]:
        """Return, as JSON can hold it, the part that a run resumed after `step` can't read from metrics.jsonl.

        An evaluation of an earlier step that still runs counts as skipped there: its weights are gone by then.
        """
        lost = self.evaluating not in (None, step)
        return {
            "evaluations": [dataclasses.asdict(report) for report in self.evaluations],
            "evaluations_skipped": self.evaluations_skipped + lost,
            "resumed_at": self._resumed_at,
        }

    def restore(self, step: int, state: Mapping[str, Any], lines: Iterable[Mapping[str, float]]) -> None:
        """Resume after `step` from a `state` and the `lines` of metrics.jsonl."""
        self._steps = []
        for line in lines:
            if line["step"] <= step:
                self.add_step(line)
        self.evaluations = [evaluation_report(record) for record in state["evaluations"]]
        self.evaluations_skipped = state["evaluations_skipped"]
        self._resumed_at = [*state["resumed_at"], step]


def recovery_of(deaths: Sequence[Death], run_s: Callable[[float], float]) -> dict[str, Any]:
    """Summarize the deaths of actors: seconds until the replacement served, and until the next trained step.

    `run_s` converts a time of time.perf_counter to the run's clock.
    """
    records = [dataclasses.asdict(death) for death in deaths]
    summary: dict[str, Any] = {"deaths": [{"at_s": run_s(record.pop("at")), **record} for record in records]}
    for name in ("back_s", "next_step_s"):
        values = [getattr(death, name) for death in deaths if getattr(death, name) is not None]
        summary |= {f"{name}_median": median(values), f"{name}_max": max(values)} if values else {}
    return summary


def _mean(steps: Sequence[Mapping[str, float]], name: str) -> float | None:
    return fmean(step[name] for step in steps) if steps else None
