"""Work, contention and calls in virtual time."""

import asyncio

import pytest

from grpo.tuning.machine import Calls, Servers, Worker
from grpo.tuning.simulation import run_in_virtual_time


def now():
    return asyncio.get_running_loop().time()


def test_two_that_share_cores_slow_each_other_while_both_work():
    async def both():
        first = Worker(lambda: 0.5 if second.busy else 1.0)
        second = Worker(lambda: 0.5 if first.busy else 1.0)
        first.slows, second.slows = [second], [first]
        ends = {}

        async def work(name, worker, begin, seconds):
            await asyncio.sleep(begin)
            await worker.work(seconds)
            ends[name] = now()

        await asyncio.gather(work("first", first, 0, 4), work("second", second, 1, 1))
        return ends

    # From second 1 on both go half as fast, until `second` has done its one second.
    assert run_in_virtual_time(both()) == {"second": pytest.approx(3), "first": pytest.approx(5)}


def test_work_that_is_interrupted_says_how_much_was_done():
    async def interrupted():
        worker, came = Worker(lambda: 0.5), []

        async def come():
            await asyncio.sleep(3)
            came.append(True)
            worker.changed.notify()

        coming = asyncio.create_task(come())
        done_s = await worker.work(10, lambda: bool(came))
        await coming
        return done_s, worker.busy

    assert run_in_virtual_time(interrupted()) == (pytest.approx(1.5), False)


def test_a_line_serves_in_order():
    async def all_served():
        servers, ends = Servers(2), []

        async def serve(seconds):
            await servers.serve(seconds)
            ends.append(now())

        await asyncio.gather(serve(2), serve(3), serve(2))
        return ends

    assert run_in_virtual_time(all_served()) == [2, 3, 4]


def test_calls_side_by_side_share_the_way_but_not_the_driver():
    async def ends():
        calls, found = Calls(0.010, 0.002), []

        async def call():
            async with calls.overhead():
                pass
            found.append(now())

        await asyncio.gather(*(call() for _ in range(3)))
        return found

    assert run_in_virtual_time(ends()) == [pytest.approx(s) for s in (0.010, 0.011, 0.012)]
