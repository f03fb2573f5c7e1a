import math
import pickle

import numpy as np
import pytest

from grpo.errors import ConfigError
from grpo.telemetry import metrics as metrics
from grpo.telemetry.metrics import REDUCERS, MetricSet, Percentiles

PERCENTILES = (50, 90, 99)


def by_numpy(reduce, values, weights):
    x, w = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    return {
        "mean": {"mean": np.average(x, weights=w)},
        "sum": {"sum": x @ w},
        "percentiles": {f"p{q}": np.percentile(x, q) for q in PERCENTILES},
    }[reduce]


def filled(reduce, values, weights):
    reducer = REDUCERS[reduce]()
    for value, weight in zip(values, weights, strict=True):
        reducer.add(value, weight)
    return reducer


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("reduce", REDUCERS)
def test_parts_merged_say_what_numpy_says_of_everything(reduce, seed):
    random = np.random.default_rng(seed)
    values = random.normal(1e4, 2.0, 500)  # far from zero, where a sum of squares would lose the spread
    weights = np.ones(500) if reduce == "percentiles" else random.uniform(0.1, 5, 500)
    cuts = np.sort(random.integers(0, 501, 6))  # some parts may be empty
    parts = [filled(reduce, v, w) for v, w in zip(np.split(values, cuts), np.split(weights, cuts), strict=True)]
    random.shuffle(parts)
    merged = REDUCERS[reduce]()
    for part in parts:
        merged.merge(pickle.loads(pickle.dumps(part)))
    expected = by_numpy(reduce, values, weights)
    assert merged.result() == pytest.approx(expected, rel=1e-10)
    assert filled(reduce, values, weights).result() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("reduce", REDUCERS)
def test_nothing_and_one_value(reduce):
    nothing, one = REDUCERS[reduce](), filled(reduce, [-3.5], [1])
    nothing.merge(REDUCERS[reduce]())
    assert nothing.result() == {}
    nothing.merge(one)
    one.merge(REDUCERS[reduce]())
    assert nothing.result() == one.result() == by_numpy(reduce, [-3.5], [1])


@pytest.mark.parametrize("reduce", REDUCERS)
def test_values_that_are_not_finite_are_left_out_and_counted(reduce):
    first, second = MetricSet(), MetricSet()
    for value in (1, math.nan, 2):
        first.record("a", value, reduce)
    for value in (math.inf, -math.inf):
        second.record("a", value, reduce)
    first.merge(second)
    assert second.drain() == {"a/nonfinite": 2}
    expected = by_numpy(reduce, [1, 2], [1, 1]) | {"nonfinite": 3}
    assert first.drain() == pytest.approx({f"a/{suffix}": figure for suffix, figure in expected.items()})


@pytest.mark.parametrize("reduce", REDUCERS)
def test_a_weight_of_zero_adds_nothing_and_others_must_make_sense(reduce):
    metrics = MetricSet()
    metrics.record("a", 7, reduce, 0)
    metrics.record("a", math.nan, reduce, 0)
    assert metrics.drain() == {}
    for weight in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="a weight must be finite and >= 0"):
            metrics.record("a", 1, reduce, weight)


def test_percentiles_take_no_weights():
    with pytest.raises(ValueError, match="percentiles take no weights"):
        Percentiles().add(1, 2)


def test_percentiles_of_many_values_are_those_of_a_fair_sample(monkeypatch):
    """One part has ten times the values of the other, and so ten times the say."""
    monkeypatch.setattr(metrics, "_EXACT_UP_TO", 2000)
    metrics._random.seed(1)
    many, few = (
        filled("percentiles", np.linspace(0, 1, 50_000), [1] * 50_000),
        filled("percentiles", [9] * 5000, [1] * 5000),
    )
    few.merge(many)
    assert len(pickle.dumps(few)) < 60_000
    assert few.result() == {
        "p50": pytest.approx(0.55, abs=0.05),
        "p90": pytest.approx(0.99, abs=0.02),
        "p99": 9,
    }


def test_what_is_measured_draws_none_of_the_runs_random_numbers():
    import random

    before = random.getstate()
    Percentiles().add(1.0, 1.0)
    assert random.getstate() == before


def test_a_set_is_drained_and_begins_again():
    metrics = MetricSet()
    metrics.record("length", 10)
    metrics.record("length", 20, weight=3)
    metrics.record("tokens", 5, "sum")
    assert metrics.drain() == {"length/mean": 17.5, "tokens/sum": 5}
    assert metrics.drain() == {}
    metrics.record("tokens", 1, "sum")
    assert metrics.drain() == {"tokens/sum": 1}


def test_sets_of_two_processes_merge():
    here, there = MetricSet(), MetricSet()
    here.record("a", 1)
    there.record("a", 3)
    there.record("b", 4, "sum")
    there.record("b", math.nan, "sum")
    here.merge(pickle.loads(pickle.dumps(there)))
    assert here.drain() == {"a/mean": 2, "b/sum": 4, "b/nonfinite": 1}
    assert there.drain() == {"a/mean": 3, "b/sum": 4, "b/nonfinite": 1}


def test_a_name_has_one_reducer():
    metrics, other = MetricSet(), MetricSet()
    metrics.record("a", 1)
    other.record("a", 1, "sum")
    metrics.drain()
    with pytest.raises(ConfigError, match="metric 'a' is reduced by mean and by percentiles"):
        metrics.record("a", 1, "percentiles")
    with pytest.raises(ConfigError, match="metric 'a' is reduced by mean and by sum"):
        metrics.merge(other)
    with pytest.raises(ConfigError, match="metric 'b': 'median' is not one of mean, sum"):
        metrics.record("b", 1, "median")
