"""A clock that jumps."""

import asyncio

import pytest

from grpo.tuning.simulation import run_in_virtual_time


def test_hours_pass_at_once_and_in_order():
    async def sleeps():
        loop, woken = asyncio.get_running_loop(), []

        async def sleep(hours):
            await asyncio.sleep(hours * 3600)
            woken.append((hours, loop.time()))

        await asyncio.gather(*(sleep(hours) for hours in (3, 1, 2)))
        return woken

    assert run_in_virtual_time(sleeps()) == [(hours, pytest.approx(hours * 3600)) for hours in (1, 2, 3)]


def test_time_outs_are_in_virtual_time():
    async def waits():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1e6):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run_in_virtual_time(waits()) == pytest.approx(1e6)


def test_who_waits_for_a_thread_is_woken_by_it():
    assert run_in_virtual_time(asyncio.to_thread(lambda: "done")) == "done"


def test_a_deadlock_is_an_error(monkeypatch):
    monkeypatch.setattr("grpo.tuning.simulation._PATIENCE_S", 0.01)

    async def waits_for_ever():
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="waits for another"):
        run_in_virtual_time(waits_for_ever())
