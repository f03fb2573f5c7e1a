"""Who waits for what, on average over time."""

import asyncio

import pytest

import grpo.telemetry.activity
from grpo.telemetry.activity import MeanWaiting, begin_activity, waiting_for
from grpo.utils.aio import cancel_and_wait


class Clock:
    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    async def passes(self, seconds):
        """When everybody has begun to wait."""
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(grpo.telemetry.activity, "time", clock)
    return clock


async def test_coroutines_are_counted_by_what_they_wait_for(clock):
    begin_activity("training")
    waiting, generated = MeanWaiting(), asyncio.Event()

    async def rollout():
        begin_activity("rollouts")
        with waiting_for("generator.generate"):
            await generated.wait()
        with waiting_for("reward.score"):
            await asyncio.Event().wait()

    with waiting_for("replay_buffer.sample"):
        rollouts = [asyncio.create_task(rollout()) for _ in range(2)]
        await clock.passes(3.0)
        generated.set()
        await clock.passes(1.0)
        assert waiting.drain(clock.now) == {
            ("training", "replay_buffer.sample"): 1.0,
            ("rollouts", "generator.generate"): 1.5,
            ("rollouts", "reward.score"): 0.5,
        }
        await cancel_and_wait(rollouts)


async def test_a_wait_that_goes_on_counts_in_every_interval_and_only_there(clock):
    begin_activity("training")
    waiting = MeanWaiting()
    with waiting_for("trainer.train_step"):
        waiting.drain(clock.now + 1)
        other = MeanWaiting()
        other.drain(clock.now + 2)  # one that looks at other times
        assert waiting.drain(clock.now + 10) == {("training", "trainer.train_step"): 1.0}
        assert other.drain(clock.now + 10) == {("training", "trainer.train_step"): 1.0}


async def test_outside_of_any_activity_nothing_is_counted():
    assert MeanWaiting().drain(1.0) == {}
