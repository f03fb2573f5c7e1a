import asyncio

import pytest

from grpo.utils.aio import (
    Interrupted,
    Signal,
    being_cancelled,
    gather_or_cancel,
    race,
    raise_first,
    run_until_set,
    timeout_as,
)


async def test_together_gives_results_in_order():
    async def work(value, turns):
        for _ in range(turns):
            await asyncio.sleep(0)
        return value

    assert await gather_or_cancel(work("a", 3), work("b", 1)) == ["a", "b"]
    assert await gather_or_cancel() == []


async def test_together_raises_the_first_error_bare_and_cancels_the_rest():
    ended = asyncio.Event()

    async def waiting():
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def failing():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await gather_or_cancel(waiting(), failing())
    assert ended.is_set()


async def test_a_cancellation_is_not_hidden_by_an_error_at_the_same_time():
    async def failing_when_cancelled():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("on the way out") from None

    task = asyncio.ensure_future(gather_or_cancel(failing_when_cancelled()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_together_keeps_the_cause_where_the_remote_traceback_is():
    async def failing():
        raise ValueError("here") from KeyError("over there")

    with pytest.raises(ValueError, match="here") as caught:
        await gather_or_cancel(failing())
    assert isinstance(caught.value.__cause__, KeyError)


async def test_unless_gives_the_result_of_the_work():
    async def work():
        await asyncio.sleep(0)
        return 7

    assert await run_until_set(asyncio.Event(), work()) == 7


async def test_unless_cancels_the_work_when_the_shutdown_comes_first():
    shutdown, cancelled = asyncio.Event(), asyncio.Event()

    async def work():
        shutdown.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(Interrupted):
        await run_until_set(shutdown, work())
    assert cancelled.is_set()


async def test_unless_raises_what_the_work_raises():
    async def work():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await run_until_set(asyncio.Event(), work())


async def test_unless_passes_a_cancellation_on_and_leaves_no_task():
    task = asyncio.ensure_future(run_until_set(asyncio.Event(), asyncio.Event().wait()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_unless_raised_gives_the_result_of_the_work_and_ends_the_watches():
    async def work():
        await asyncio.sleep(0)
        return "done"

    async def watch():
        await asyncio.get_running_loop().create_future()

    assert await race(work(), watch(), watch()) == "done"
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_unless_raised_cancels_the_work_when_a_watch_raises():
    ended = []

    async def work():
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append("work")

    async def watch():
        await asyncio.sleep(0)
        raise ValueError("gone")

    with pytest.raises(ValueError, match="gone"):
        await race(work(), watch())
    assert ended == ["work"]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_signal_wakes_everybody_whose_condition_has_become_true():
    signal, there = Signal(), []
    waiting = [asyncio.ensure_future(signal.wait_for(lambda n=n: len(there) >= n and there)) for n in (1, 1, 2)]
    await asyncio.sleep(0)
    there.append("a")
    signal.notify()
    await asyncio.wait_for(asyncio.gather(*waiting[:2]), 60)
    assert not waiting[2].done()
    there.append("b")
    signal.notify()
    assert await asyncio.wait_for(waiting[2], 60) == ["a", "b"]
    assert await signal.wait_for(lambda: "at once") == "at once"


async def test_a_block_that_is_late_raises_the_error_made_for_it_and_leaves_other_timeouts_alone():
    with pytest.raises(KeyError, match="late"):
        async with timeout_as(0.01, lambda: KeyError("late")):
            await asyncio.Event().wait()
    with pytest.raises(TimeoutError, match="theirs"):
        async with timeout_as(60, lambda: KeyError("late")):
            raise TimeoutError("theirs")
    async with timeout_as(None, lambda: KeyError("late")):
        await asyncio.sleep(0)


def test_the_first_error_of_a_group_is_raised_bare_with_the_others_as_notes():
    group = BaseExceptionGroup("outer", [ExceptionGroup("inner", [ValueError("a"), KeyError("b")]), OSError("c")])
    with pytest.raises(ValueError, match="a") as raised:
        raise_first(group)
    assert len(raised.value.__notes__) == 2


def test_an_error_that_reached_several_tasks_is_not_a_note_of_itself():
    error = ValueError("a")
    with pytest.raises(ValueError, match="a"):
        raise_first(ExceptionGroup("outer", [error, error, KeyError("b")]))
    assert error.__notes__ == ["at the same time: KeyError: 'b'"]


async def test_what_is_awaited_may_be_cancelled_without_the_task_that_awaits_it():
    found = []

    async def waits(future):
        try:
            await future
        except asyncio.CancelledError:
            found.append(being_cancelled())

    theirs = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(waits(theirs))
    await asyncio.sleep(0)
    theirs.cancel()
    await task
    task = asyncio.ensure_future(waits(asyncio.get_running_loop().create_future()))
    await asyncio.sleep(0)
    task.cancel()
    await task
    assert found == [False, True]
    assert not being_cancelled()
