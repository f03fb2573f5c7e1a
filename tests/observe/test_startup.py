"""Stages of the start."""

from grpo.observe.metrics import Startup, process_age_s


def test_stages_follow_one_another_from_the_begin_of_the_process(monkeypatch):
    ages = iter((3.0, 3.5, 6.0))
    monkeypatch.setattr("grpo.observe.metrics.process_age_s", lambda: next(ages))
    startup = Startup()
    for stage in ("imports", "checks", "ray", "ray"):
        startup.ended(stage)
    assert startup.seconds == {"imports": 3.0, "checks": 0.5, "ray": 2.5}


def test_a_process_gets_older():
    assert 0 < process_age_s() <= process_age_s() < 24 * 3600
