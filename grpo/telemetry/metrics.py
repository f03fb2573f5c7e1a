"""Metrics whose values arrive one by one in many processes, reduced to a few figures.

A reducer is small and can be pickled. Reducers of parts, merged in any order, give the figures of one reducer that saw
every value.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass, field

import numpy as np

from grpo.errors import ConfigError

_EXACT_UP_TO = 10_000  # values that percentiles are exact for
_PERCENTILES = (50, 90, 99)
_random = random.Random()  # separate: the run's random numbers must not depend on what is measured


@dataclass
class Mean:
    """The weighted mean."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float) -> None:
        self.total += value * weight
        self.weight += weight

    def merge(self, other: Mean) -> None:
        self.total += other.total
        self.weight += other.weight

    def result(self) -> dict[str, float]:
        return {"mean": self.total / self.weight} if self.weight else {}


@dataclass
class Sum:
    """The sum of value times weight; None before the first value."""

    total: float | None = None

    def add(self, value: float, weight: float) -> None:
        self.total = (self.total or 0.0) + value * weight

    def merge(self, other: Sum) -> None:
        if other.total is not None:
            self.add(other.total, 1.0)

    def result(self) -> dict[str, float]:
        return {} if self.total is None else {"sum": self.total}


@dataclass
class Percentiles:
    """The 50th, 90th and 99th percentile, as numpy interpolates them; exact up to 10,000 values.

    Beyond 10,000 values they are computed from a sample: each value draws a random number, and the values with the
    10,000 smallest numbers are kept. Every value has the same chance to be kept, however reducers are merged. Weights
    other than 1 raise ValueError.
    """

    sample: list[tuple[float, float]] = field(default_factory=list)  # (random number, value)

    def add(self, value: float, weight: float) -> None:
        if weight != 1:
            raise ValueError(f"percentiles take no weights ({weight}). Leave the weight out.")
        self.sample.append((_random.random(), value))
        if len(self.sample) >= 2 * _EXACT_UP_TO:  # not at every value: trimming takes milliseconds
            self._trim()

    def merge(self, other: Percentiles) -> None:
        self.sample += other.sample
        self._trim()

    def result(self) -> dict[str, float]:
        self._trim()
        if not self.sample:
            return {}
        figures = np.percentile([value for _, value in self.sample], _PERCENTILES)
        return {f"p{q}": float(figure) for q, figure in zip(_PERCENTILES, figures, strict=True)}

    def _trim(self) -> None:
        if len(self.sample) > _EXACT_UP_TO:
            self.sample = heapq.nsmallest(_EXACT_UP_TO, self.sample)


REDUCERS: dict[str, type[Mean | Sum | Percentiles]] = {"mean": Mean, "sum": Sum, "percentiles": Percentiles}


@dataclass
class _Metric:
    reduce: str
    reducer: Mean | Sum | Percentiles
    nonfinite: int = 0


class MetricSet:
    """Named metrics, each with its reducer. Can be pickled, sent to another process and merged there.

    A value that is not finite is left out and counted as `<name>/nonfinite`: a single NaN would spoil a mean of
    thousands.

    Example:
        metrics = MetricSet()
        metrics.record("reward/score_s", 0.2, "percentiles")
        metrics.record("generator/batch_size", 12)
        metrics.merge(metrics_of_another_process)
        metrics.drain()     # {"reward/score_s/p50": 0.2, ..., "generator/batch_size/mean": 12.0}
    """

    def __init__(self) -> None:
        self._metrics: dict[str, _Metric] = {}

    def record(self, name: str, value: float, reduce: str = "mean", weight: float = 1.0) -> None:
        """Add a value; a weight of 0 adds nothing.

        Raises ConfigError for an unknown reducer, or one that differs from the name's earlier reducer. Raises
        ValueError for a weight that is negative or not finite.
        """
        metric = self._metric(name, reduce)
        if not 0 <= weight < math.inf:
            raise ValueError(f"a weight must be finite and >= 0 ({weight})")
        if weight and math.isfinite(value):
            metric.reducer.add(float(value), float(weight))
        elif weight:
            metric.nonfinite += 1

    def merge(self, other: MetricSet) -> None:
        """Add everything that `other` has recorded; `other` is left unchanged. Raises ConfigError as `record`."""
        for name, theirs in other._metrics.items():
            ours = self._metric(name, theirs.reduce)
            ours.reducer.merge(theirs.reducer)  # type: ignore[arg-type]  # the names of the reducers are equal
            ours.nonfinite += theirs.nonfinite

    def drain(self) -> dict[str, float]:
        """Return `<name>/<figure>` of everything recorded since the last call. Names keep their reducers."""
        figures: dict[str, float] = {}
        for name, metric in self._metrics.items():
            figures |= {f"{name}/{suffix}": figure for suffix, figure in metric.reducer.result().items()}
            if metric.nonfinite:
                figures[f"{name}/nonfinite"] = float(metric.nonfinite)
        self._metrics = {name: _Metric(m.reduce, REDUCERS[m.reduce]()) for name, m in self._metrics.items()}
        return figures

    def _metric(self, name: str, reduce: str) -> _Metric:
        if reduce not in REDUCERS:
            raise ConfigError(f"metric {name!r}: {reduce!r} is not one of {', '.join(REDUCERS)}")
        metric = self._metrics.setdefault(name, _Metric(reduce, REDUCERS[reduce]()))
        if metric.reduce != reduce:
            raise ConfigError(f"metric {name!r} is reduced by {metric.reduce} and by {reduce}. Use two names.")
        return metric
