"""Who waits for what, on average over time."""

import asyncio
import time

import pytest

from grpo.structured import together
from grpo.waiting import MeanWaiting, begin_activity, waiting_for


async def test_coroutines_are_counted_by_what_they_wait_for():
    begin_activity("training")
    waiting = MeanWaiting()
    waiting.take(time.perf_counter())

    async def rollout():
        begin_activity("rollouts")
        with waiting_for("generator.generate"):
            await asyncio.sleep(0.05)
        with waiting_for("reward.score"):
            await asyncio.sleep(0.02)

    with waiting_for("replay_buffer.sample"):
        await together(rollout(), rollout())
    means = waiting.take(time.perf_counter())
    assert means["training", "replay_buffer.sample"] == pytest.approx(1.0, abs=0.05)
    assert sum(means.values()) == pytest.approx(3.0, abs=0.1)
    assert means["rollouts", "generator.generate"] > means["rollouts", "reward.score"] > 0


async def test_a_wait_that_goes_on_counts_in_every_interval_and_only_there():
    begin_activity("training")
    waiting = MeanWaiting()
    with waiting_for("trainer.train_step"):
        now = time.perf_counter()
        waiting.take(now)
        other = MeanWaiting()
        other.take(now + 2)  # one that looks at other times
        assert waiting.take(now + 10) == {("training", "trainer.train_step"): pytest.approx(1.0, abs=0.01)}
        assert other.take(now + 10) == {("training", "trainer.train_step"): pytest.approx(1.0, abs=0.01)}


async def test_outside_of_any_activity_nothing_is_counted():
    assert MeanWaiting().take(1.0) == {}
