"""Who waits for what, on average over time."""

import asyncio
import time

import pytest

from grpo.structured import together
from grpo.waiting import begin_activity, mean_waiting, waiting_for


async def test_coroutines_are_counted_by_what_they_wait_for():
    begin_activity("training")
    began = time.perf_counter()
    mean_waiting(began)

    async def rollout():
        begin_activity("rollouts")
        with waiting_for("generator.generate"):
            await asyncio.sleep(0.05)
        with waiting_for("reward.score"):
            await asyncio.sleep(0.02)

    with waiting_for("replay_buffer.sample"):
        await together(rollout(), rollout())
    ended = time.perf_counter()
    means = mean_waiting(ended)
    assert means["driver/waiting/training/replay_buffer.sample"] == pytest.approx(1.0, abs=0.05)
    assert sum(means.values()) == pytest.approx(3.0, abs=0.1)
    assert means["driver/waiting/rollouts/generator.generate"] > means["driver/waiting/rollouts/reward.score"] > 0


async def test_a_wait_that_goes_on_counts_in_every_interval_and_only_there():
    begin_activity("training")
    mean_waiting(0.0)  # a clock of the test's own: the wait began long after

    with waiting_for("trainer.train_step"):
        now = time.perf_counter()
        mean_waiting(now)
        assert mean_waiting(now + 10) == {"driver/waiting/training/trainer.train_step": pytest.approx(1.0, abs=0.01)}


async def test_outside_of_any_activity_nothing_is_counted():
    assert mean_waiting(1.0) == {}
