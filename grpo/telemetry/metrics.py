"""Numbers that arrive one by one, in many processes, as the few figures that are kept of them.

A state is small, can be pickled, and merges: states of parts, merged in any order, say what one state of everything
would. A value that is not finite is left out and counted: one of them would make a mean of thousands say nothing.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from typing import Protocol, Self

import numpy as np

from grpo.errors import ConfigError

_KEPT = 10_000  # values that percentiles are exact for
_PERCENTILES = (50, 90, 99)
_chance = random.Random()  # its own: the run's random numbers must not depend on what is measured


class Accumulator(Protocol):
    """One figure, or a few that belong together, of all values added."""

    def add(self, value: float, weight: float = 1.0) -> None:
        """Count a value `weight` times; with weight 0 not at all. Raises ValueError for a weight that can't be."""

    def merge(self, other: Self) -> None:
        """Add all that `other` has seen; it stays as it is. Raises TypeError when it is of another kind."""

    def result(self) -> dict[str, float]:
        """Suffix -> figure; none while nothing was added. `nonfinite`: how many values were left out, if any."""


class _Finite:
    """What all of them share: weights are checked, values that are not finite counted."""

    def __init__(self) -> None:
        self.nonfinite = 0

    def add(self, value: float, weight: float = 1.0) -> None:
        if not 0 <= weight < math.inf:
            raise ValueError(f"a weight is finite and not negative, this one is {weight}")
        if weight and math.isfinite(value):
            self._add(float(value), float(weight))
        elif weight:
            self.nonfinite += 1

    def merge(self, other: Self) -> None:
        if type(other) is not type(self):
            raise TypeError(f"can't merge {type(other).__name__} into {type(self).__name__}")
        self.nonfinite += other.nonfinite
        self._merge(other)

    def result(self) -> dict[str, float]:
        return self._result() | ({"nonfinite": float(self.nonfinite)} if self.nonfinite else {})

    def _add(self, value: float, weight: float) -> None:
        raise NotImplementedError

    def _merge(self, other: Self) -> None:
        raise NotImplementedError

    def _result(self) -> dict[str, float]:
        raise NotImplementedError


class Std(_Finite):
    """Mean and standard deviation (of the values, not an estimate from a sample): Welford's update, Chan's merge."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = self.mean = self.squares = 0.0  # squares: weighted sum of squared distances from the mean

    def _add(self, value: float, weight: float) -> None:
        self._combine(weight, value, 0.0)

    def _merge(self, other: Self) -> None:
        if other.weight:
            self._combine(other.weight, other.mean, other.squares)

    def _combine(self, weight: float, mean: float, squares: float) -> None:
        distance, before = mean - self.mean, self.weight
        self.weight += weight
        self.mean += distance * weight / self.weight
        self.squares += squares + distance**2 * before * weight / self.weight

    def _result(self) -> dict[str, float]:
        return {"mean": self.mean, "std": math.sqrt(self.squares / self.weight)} if self.weight else {}


class Mean(Std):
    """The weighted mean."""

    def _result(self) -> dict[str, float]:
        return {"mean": self.mean} if self.weight else {}


class Sum(_Finite):
    """The sum of value times weight."""

    def __init__(self) -> None:
        super().__init__()
        self.sum: float | None = None

    def _add(self, value: float, weight: float) -> None:
        self.sum = (self.sum or 0.0) + value * weight

    def _merge(self, other: Self) -> None:
        if other.sum is not None:
            self._add(other.sum, 1.0)

    def _result(self) -> dict[str, float]:
        return {} if self.sum is None else {"sum": self.sum}


class Max(_Finite):
    """The largest value, whatever its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.max = -math.inf

    def _add(self, value: float, weight: float) -> None:
        self.max = max(self.max, value)

    def _merge(self, other: Self) -> None:
        self.max = max(self.max, other.max)

    def _result(self) -> dict[str, float]:
        return {} if self.max == -math.inf else {"max": self.max}


class Min(_Finite):
    """The smallest value, whatever its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.min = math.inf

    def _add(self, value: float, weight: float) -> None:
        self.min = min(self.min, value)

    def _merge(self, other: Self) -> None:
        self.min = min(self.min, other.min)

    def _result(self) -> dict[str, float]:
        return {} if self.min == math.inf else {"min": self.min}


class Percentiles(_Finite):
    """The 50th, 90th and 99th percentile, as numpy interpolates them: exact up to 10,000 values.

    Beyond that of a sample: every value draws a random number, and those with the 10,000 smallest are kept. So each
    value has the same chance to be among them, however the states are merged. Weights other than 1 raise ValueError.
    """

    def __init__(self) -> None:
        super().__init__()
        self._drawn: list[tuple[float, float]] = []  # (random number, value)

    def _add(self, value: float, weight: float) -> None:
        if weight != 1:
            raise ValueError(f"percentiles take no weights, this one is {weight}")
        self._drawn.append((_chance.random(), value))
        if len(self._drawn) >= 2 * _KEPT:  # not with every value: choosing takes milliseconds
            self._choose()

    def _merge(self, other: Self) -> None:
        self._drawn += other._drawn
        self._choose()

    def _result(self) -> dict[str, float]:
        self._choose()
        if not self._drawn:
            return {}
        found = np.percentile([value for _, value in self._drawn], _PERCENTILES)
        return {f"p{q}": float(value) for q, value in zip(_PERCENTILES, found, strict=True)}

    def _choose(self) -> None:
        if len(self._drawn) > _KEPT:
            self._drawn = heapq.nsmallest(_KEPT, self._drawn)


REDUCERS: dict[str, Callable[[], Accumulator]] = {
    "mean": Mean,
    "sum": Sum,
    "max": Max,
    "min": Min,
    "std": Std,
    "percentiles": Percentiles,
}


class MetricSet:
    """Named metrics, each with its accumulator. Can be pickled: sent from process to process and merged there."""

    def __init__(self) -> None:
        self._metrics: dict[str, tuple[str, Accumulator]] = {}  # name -> reducer and state

    def record(self, name: str, value: float, reduce: str = "mean", weight: float = 1.0) -> None:
        """Add a value. Raises ConfigError for an unknown reducer, or another one than this name had before."""
        self._accumulator(name, reduce).add(value, weight)

    def merge(self, other: MetricSet) -> None:
        """Add all that `other` has seen; it stays as it is. Raises ConfigError when a name's reducers differ."""
        for name, (reduce, accumulator) in other._metrics.items():
            self._accumulator(name, reduce).merge(accumulator)

    def take(self) -> dict[str, float]:
        """`name/suffix` -> figure of everything since the last call; names keep their reducers."""
        taken, self._metrics = (
            self._metrics,
            {n: (reduce, REDUCERS[reduce]()) for n, (reduce, _) in self._metrics.items()},
        )
        return {
            f"{name}/{suffix}": figure
            for name, (_, accumulator) in taken.items()
            for suffix, figure in accumulator.result().items()
        }

    def _accumulator(self, name: str, reduce: str) -> Accumulator:
        if reduce not in REDUCERS:
            raise ConfigError(f"metric {name!r}: {reduce!r} is not one of {', '.join(REDUCERS)}")
        known, accumulator = self._metrics.setdefault(name, (reduce, REDUCERS[reduce]()))
        if known != reduce:
            raise ConfigError(f"metric {name!r} is reduced by {known} and by {reduce}: take two names")
        return accumulator
