import math
from pathlib import Path

import pytest

from grpo.cluster.ray_metrics import RaySink, gauge_name


@pytest.fixture
def gauges(monkeypatch):
    """All that was set, by name; no Ray is needed."""
    seen = {}

    class Gauge:
        def __init__(self, name, description, tag_keys):
            self._name = name

        def set_default_tags(self, tags):
            self._tags = tags
            return self

        def set(self, value):
            seen.setdefault(self._name, []).append((self._tags["run"], value))

    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    monkeypatch.setattr("grpo.cluster.ray_metrics._check_agent", lambda: None)
    return seen


def test_the_last_line_becomes_gauges_under_names_that_prometheus_takes(gauges):
    sink = RaySink(Path("/runs/2026-01-31/12-00-00"), {})
    sink.scalars(1, {"step": 1, "eval/pass@4": 0.5, "loss": math.nan})
    sink.scalars(2, {"step": 2, "loss": 0.25})
    sink.histogram(2, "batch/rewards", [1.0])
    sink.text(2, "rollouts", [])
    sink.summary({"status": "completed"})
    sink.close()
    run = "2026-01-31/12-00-00"
    assert gauges["grpo_step"] == [(run, 1), (run, 2)]
    assert gauges["grpo_eval_pass_4"] == [(run, 0.5), (run, 0.5)]
    assert gauges["grpo_loss"] == [(run, 0.25)]
    assert gauge_name("driver/waiting/rollouts/generator.generate") == "grpo_driver_waiting_rollouts_generator_generate"


def test_they_are_set_again_until_the_end_or_ray_would_forget_them(gauges, monkeypatch):
    monkeypatch.setattr("grpo.cluster.ray_metrics._REPEAT_S", 0.01)
    sink = RaySink(Path("/runs/a"), {}, run="mine")
    sink.scalars(1, {"step": 1})
    sink._repeats.join(0.2)
    sink.close()
    assert len(gauges["grpo_step"]) > 1
    assert set(gauges["grpo_step"]) == {("mine", 1)}
    assert not sink._repeats.is_alive()


def test_one_that_never_got_a_step_closes():
    RaySink(Path("/runs/a"), {}).close()


@pytest.mark.usefixtures("ray_session")
def test_an_agent_that_exports_nothing_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr("ray.nodes", lambda: [])
    with pytest.raises(RuntimeError, match=r"exports no metrics .* pip install 'ray\[default\]'"):
        RaySink(Path("/runs/a"), {}).scalars(1, {"step": 1})
