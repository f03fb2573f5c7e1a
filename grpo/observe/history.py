"""What is remembered of a whole run: for its summary, and for the run that goes on with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from grpo.failures import Death
from grpo.types import EvaluationReport, evaluation_report

_OF_A_STEP = (
    "reward/mean", "policy_age/max", "time/step_s", "time/trainer_wait_s", "time/weight_sync_s",
    "generator/busy_fraction",
)  # fmt: skip


class History:
    """Grows with the run. Of a step it keeps what `totals` needs: a run may have a million, whose lines are on disk."""

    def __init__(self) -> None:
        self.evaluations: list[EvaluationReport] = []
        self.evaluations_skipped = 0
        self.evaluating: int | None = None  # the step of an evaluation that runs beside the training
        self.checkpoints = {"written": 0, "failed": 0, "skipped": 0}
        self._steps: list[dict[str, float]] = []
        self._resumed_at: list[int] = []

    def add_step(self, line: Mapping[str, float]) -> None:
        """`line` is that of metrics.jsonl."""
        self._steps.append({name: line[name] for name in _OF_A_STEP})

    def add_evaluation(self, report: EvaluationReport) -> None:
        self.evaluations.append(report)
        self.evaluating = None

    def totals(self) -> dict[str, Any]:
        """Rewards at the start and the end are means over a tenth of the steps."""
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
        """What a run that is resumed after `step` needs, as JSON can hold it; the steps stand in metrics.jsonl.

        An evaluation of an earlier step that still runs is skipped there: its weights are gone.
        """
        lost = self.evaluating not in (None, step)
        return {
            "evaluations": [dataclasses.asdict(report) for report in self.evaluations],
            "evaluations_skipped": self.evaluations_skipped + lost,
            "resumed_at": self._resumed_at,
        }

    def restore(self, step: int, state: Mapping[str, Any], lines: Iterable[Mapping[str, float]]) -> None:
        """Go on after `step` from a `state`; `lines` are those of metrics.jsonl."""
        self._steps = []
        for line in lines:
            if line["step"] <= step:
                self.add_step(line)
        self.evaluations = [evaluation_report(record) for record in state["evaluations"]]
        self.evaluations_skipped = state["evaluations_skipped"]
        self._resumed_at = [*state["resumed_at"], step]


def recovery_of(deaths: Sequence[Death], run_s: Callable[[float], float]) -> dict[str, Any]:
    """The deaths of actors, and the seconds until their replacements served and until the next trained step.

    `run_s` makes a time on the run's clock of one of time.perf_counter.
    """
    records = [dataclasses.asdict(death) for death in deaths]
    summary: dict[str, Any] = {"deaths": [{"at_s": run_s(record.pop("at")), **record} for record in records]}
    for name in ("back_s", "next_step_s"):
        values = [getattr(death, name) for death in deaths if getattr(death, name) is not None]
        summary |= {f"{name}_median": median(values), f"{name}_max": max(values)} if values else {}
    return summary


def _mean(steps: Sequence[Mapping[str, float]], name: str) -> float | None:
    return fmean(step[name] for step in steps) if steps else None
