"""What the generators did since the last step, and what the groups were like that they finished."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from grpo.types import GenerationReport, GeneratorStats, Rollout


class GeneratorRates:
    """Made of counters that only grow. Evaluations by these generators are part of it."""

    def __init__(self, generators: Sequence[GeneratorStats], now_s: float) -> None:
        self._before = {stats.process: stats for stats in generators}
        self._before_s = now_s

    def take(self, generators: Sequence[GeneratorStats], now_s: float) -> dict[str, float]:
        """Since the last call."""
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
    """All that finished, those dropped included; `reward/mean` is of those that were trained on."""

    def __init__(self) -> None:
        self._groups: list[_Numbers] = []
        self._filtered = 0

    def add(self, rollout: Rollout, *, filtered: bool) -> None:
        """`filtered`: it is dropped for having nothing to learn from."""
        self._groups.append(_Numbers(rollout.report, rollout.scores.rewards, rollout.shaped_rewards))
        self._filtered += filtered

    def take(self) -> dict[str, float]:
        """Since the last call."""
        groups, self._groups = self._groups, []
        filtered, self._filtered = self._filtered, 0
        metrics: dict[str, float] = {"rollout/zero_advantage_dropped": filtered}
        if groups:
            completions = sum(group.report.completion_count for group in groups)
            tokens = sum(group.report.token_count for group in groups)
            truncated = sum(group.report.truncated_count for group in groups)
            metrics["rollout/reward_mean"] = fmean(reward for group in groups for reward in group.rewards)
            metrics["rollout/shaped_reward_mean"] = fmean(r for group in groups for r in group.shaped_rewards)
            metrics["generator/completion_tokens_mean"] = tokens / completions
            metrics["generator/truncated_fraction"] = truncated / completions
        return metrics


class _Numbers(NamedTuple):
    """Of a group: its tokens must not be held on to."""

    report: GenerationReport
    rewards: tuple[float, ...]
    shaped_rewards: tuple[float, ...]
