"""Calls of user code: async functions on the loop, others in threads."""

import asyncio
import threading
from contextvars import ContextVar
from functools import partial

import pytest

from grpo.environments.calls import UserCalls

SETTING = ContextVar("SETTING", default="none")


@pytest.fixture
def calls():
    calls = UserCalls(threads=2)
    yield calls
    calls.close()


async def until(condition):
    """Wait for what another thread brings about."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_plain_function_runs_in_a_thread_and_an_async_one_here(calls):
    def plain(x, *, y=0):
        return x + y, threading.current_thread()

    async def asynchronous(x, *, y=0):
        return x + y, threading.current_thread()

    total, thread = await calls.run(plain, 1, y=2)
    assert (total, thread.name.startswith("environment")) == (3, True)
    assert await calls.run(asynchronous, 1, y=2) == (3, threading.main_thread())
    assert await calls.run(partial(asynchronous, 1), y=2) == (3, threading.main_thread())


async def test_what_a_plain_function_returns_is_awaited(calls):
    async def later():
        return 5

    assert await calls.run(lambda: later()) == 5


async def test_context_reaches_the_thread(calls):
    SETTING.set("mine")
    assert await calls.run(SETTING.get) == "mine"
    await calls.run(SETTING.set, "theirs")
    assert SETTING.get() == "mine"


async def test_arguments_may_have_any_name(calls):
    def plain(self, function, args, call):
        return self, function, args, call

    async def asynchronous(self, function, args, call):
        return self, function, args, call

    for function in (plain, asynchronous):
        assert await calls.run(function, self=1, function=2, args=3, call=4) == (1, 2, 3, 4)


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(3)])
async def test_what_a_thread_raises_is_raised_here(calls, error):
    def fail():
        raise error

    with pytest.raises(type(error)) as caught:
        await calls.run(fail)
    assert caught.value is error


async def test_an_iterator_that_is_used_up_in_a_thread_is_an_error_and_no_endless_wait(calls):
    with pytest.raises(RuntimeError, match="StopIteration"):
        async with asyncio.timeout(60):
            await calls.run(next, iter(()))


async def test_a_cancelled_call_hangs_until_its_thread_returns(calls):
    started, release = threading.Event(), threading.Event()

    def hang():
        started.set()
        release.wait()

    call = asyncio.ensure_future(calls.run(hang))
    await until(started.is_set)
    assert calls.hanging(0) == 0  # it is waited for
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.sleep(0.01)
    assert (calls.hanging(0), calls.hanging(3600)) == (1, 0)
    release.set()
    await until(lambda: calls.hanging(0) == 0)


async def test_calls_of_one_object_can_be_waited_for(calls):
    mine, theirs = threading.Event(), threading.Event()
    for event in (mine, theirs):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await calls.run(event.wait)
    waiting = asyncio.ensure_future(calls.returned(mine))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    mine.set()
    await waiting
    assert calls.hanging(0) == 1
    theirs.set()
    await calls.returned(theirs)
    assert calls.hanging(0) == 0


async def test_more_calls_than_threads_wait_and_those_that_are_cancelled_meanwhile_never_run(calls):
    release, ran = threading.Event(), []
    busy = [asyncio.ensure_future(calls.run(release.wait)) for _ in range(2)]
    waiting = [asyncio.ensure_future(calls.run(ran.append, i)) for i in range(3)]
    await asyncio.sleep(0.01)
    waiting[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting[1]
    assert (ran, calls.hanging(0)) == ([], 0)
    release.set()
    await asyncio.gather(*busy, waiting[0], waiting[2])
    assert sorted(ran) == [0, 2]


async def test_a_thread_is_free_again_after_a_cancelled_call_has_returned(calls):
    release = threading.Event()
    for _ in range(2):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await calls.run(release.wait)
    release.set()
    async with asyncio.timeout(60):
        assert await calls.run(len, "four") == 4
