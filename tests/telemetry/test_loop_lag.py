"""The driver's pulse: how late the loop is, and what held it up."""

import asyncio
import time

import pytest

from grpo.telemetry.loop_lag import LoopLag, SlowCallbacks
from grpo.utils.aio import cancel_and_wait


@pytest.fixture
async def watched():
    """A lag that is measured, and what was told."""
    lag, told = LoopLag(), []
    watching = asyncio.ensure_future(lag.watch(50.0, told.append))
    await asyncio.sleep(0.03)
    yield lag, told
    await cancel_and_wait([watching])


def hold_up(seconds):
    time.sleep(seconds)


async def test_a_blocked_loop_is_measured(watched):
    lag, _ = watched
    hold_up(0.3)
    await asyncio.sleep(0.03)
    figures = lag.drain()
    assert figures["driver/loop_lag_max_ms"] > 200
    assert figures["driver/loop_lag_max_ms"] >= figures["driver/loop_lag_p99_ms"] >= figures["driver/loop_lag_p50_ms"]
    assert lag.drain()["driver/loop_lag_max_ms"] < figures["driver/loop_lag_max_ms"]


async def test_what_blocked_it_is_told_with_its_stack(watched, caplog):
    lag, told = watched
    hold_up(0.3)
    await asyncio.sleep(0.03)
    (message,) = [line for line in told if "hold_up" in line]  # a crowded machine may hold it up elsewhere, too
    assert "blocked for more than 50 ms (driver.slow_callback_ms) in hold_up, test_loop_lag.py:" in message
    assert "time.sleep(seconds)" in caplog.text
    assert lag.drain()["driver/slow_callbacks"] >= 1


async def test_the_same_place_is_told_once_and_counted_every_time(watched):
    lag, told = watched
    for _ in range(2):
        hold_up(0.3)
        await asyncio.sleep(0.03)
    assert len([line for line in told if "hold_up" in line]) == 1
    assert lag.drain()["driver/slow_callbacks"] >= 2
    assert lag.drain()["driver/slow_callbacks"] == 0


async def test_a_loop_that_only_waits_is_not_blocked():
    told = []
    watcher = SlowCallbacks(100.0, told.append)
    watcher.expect_beat(0.0)  # late, and yet nothing runs
    await asyncio.sleep(0.4)
    watcher.close()
    assert not told
