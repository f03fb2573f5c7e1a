from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from grpo.actors.replay_buffer import ReplayBuffer
from grpo.types import Ticket


@pytest.fixture
def add(make_group):
    """Put a group into the buffer whose reward is its ticket's serial."""

    async def add(buffer, *serials, version=0):
        for serial in serials:
            await buffer.add(Ticket(serial), replace(make_group(version=version), rewards=(float(serial),)))

    return add


async def settle():
    """Let every other task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def result_now(task):
    await settle()
    assert task.done(), "nobody woke it"
    return task.result()


async def sample(buffer, count):
    """A sample that would park for ever fails instead."""
    async with asyncio.timeout(60):
        return await buffer.sample(count)


async def taken(buffer, count, version=0):
    batch, report = await sample(buffer, count)
    serials = [ticket.serial for ticket in report.tickets]
    assert [group.rewards for group in batch.groups] == list(report.rewards) == [(float(s),) for s in serials]
    return serials


async def test_a_batch_is_parked_for_until_it_is_complete(add):
    buffer = ReplayBuffer(window=1)
    waiting = asyncio.create_task(taken(buffer, 2))
    await settle()
    await add(buffer, 0)
    await settle()
    assert not waiting.done()
    await add(buffer, 1)
    assert await result_now(waiting) == [0, 1]


async def test_a_skip_wakes_the_one_that_waits(add):
    buffer = ReplayBuffer(window=1)
    waiting = asyncio.create_task(taken(buffer, 2))
    await add(buffer, 1, 2)
    await settle()
    assert not waiting.done()
    await buffer.skip(Ticket(0))
    assert await result_now(waiting) == [1, 2]


async def test_groups_leave_in_the_order_of_admission_however_they_came(add):
    buffer = ReplayBuffer(window=1)
    await add(buffer, 3, 0, 2, 5, 1, 4)
    assert await taken(buffer, 2) == [0, 1]
    assert await taken(buffer, 4) == [2, 3, 4, 5]


async def test_the_report_tells_lengths_and_versions(add):
    buffer = ReplayBuffer(window=1)
    await add(buffer, 0, version=3)
    await add(buffer, 1, version=4)
    _, report = await sample(buffer, 2)
    assert report.lengths == ((4, 4), (4, 4))  # three letters and the end
    assert report.oldest_versions == (3, 4)


async def test_the_report_counts_what_is_left(add):
    buffer = ReplayBuffer(window=1)
    await add(buffer, 0, 1, 2, 4)
    _, report = await sample(buffer, 2)
    assert report.groups_waiting == 2


async def test_with_window_one_a_batch_waits_for_its_slowest_group(add):
    buffer = ReplayBuffer(window=1)
    await add(buffer, 1, 2, 3, 4)
    waiting = asyncio.create_task(taken(buffer, 2))
    await settle()
    assert not waiting.done()
    await add(buffer, 0)
    assert await result_now(waiting) == [0, 1]


async def test_a_window_lets_finished_groups_overtake(add):
    buffer = ReplayBuffer(window=3)
    await add(buffer, 1, 2, 3)
    assert await taken(buffer, 2) == [1, 2]
    waiting = asyncio.create_task(taken(buffer, 1))
    await settle()
    assert not waiting.done(), "group 0 has been overtaken twice, and window 3 allows no more"
    await add(buffer, 0)
    assert await result_now(waiting) == [0]
    assert await taken(buffer, 1) == [3]


async def test_the_window_moves_on_within_a_batch(add):
    buffer = ReplayBuffer(window=2)
    await add(buffer, 0, 1, 3)  # once 0 and 1 are taken, 3 is next to the open 2
    assert await taken(buffer, 3) == [0, 1, 3]


async def test_a_skip_in_the_middle_moves_the_window(add):
    buffer = ReplayBuffer(window=2)
    await add(buffer, 2, 3)
    await buffer.skip(Ticket(1))
    waiting = asyncio.create_task(taken(buffer, 1))
    await settle()
    assert not waiting.done(), "the window holds tickets 0 and 1"
    await buffer.skip(Ticket(0))
    assert await result_now(waiting) == [2]
    assert await taken(buffer, 1) == [3]


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(8))
async def test_no_group_is_overtaken_too_often_and_each_comes_out_once(make_group, window, seed):
    """Groups arrive in random order, some are dropped, batches of random size are asked for all the while."""
    rng = random.Random(seed)
    total = 60
    arrivals = sorted(range(total), key=lambda serial: serial + rng.uniform(0, 12))
    dropped = set(rng.sample(range(total), 6))
    buffer, left, out = ReplayBuffer(window), total - len(dropped), []

    async def arrive():
        for serial in arrivals:
            await (buffer.skip(Ticket(serial)) if serial in dropped else buffer.add(Ticket(serial), make_group()))
            if rng.random() < 0.5:
                await settle()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(arrive())
        while left:
            count = min(left, rng.randint(1, 4))
            _, report = await sample(buffer, count)
            out += [ticket.serial for ticket in report.tickets]
            left -= count

    assert sorted(out) == sorted(set(range(total)) - dropped)
    place = {serial: i for i, serial in enumerate(out)}
    overtaken = [sum(place[later] < place[serial] for later in out if later > serial) for serial in out]
    assert max(overtaken) <= window - 1


async def test_a_sample_that_is_cancelled_takes_nothing(add):
    buffer = ReplayBuffer(window=1)
    waiting = asyncio.create_task(sample(buffer, 2))
    await add(buffer, 0)
    await settle()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await add(buffer, 1)
    assert await taken(buffer, 2) == [0, 1]


async def test_a_new_process_waits_for_the_groups_that_are_still_to_come(add):
    """Of ten tickets handed out, 0 to 2 and 5 were trained on; the group of 4 was saved."""
    old = ReplayBuffer(window=1)
    await add(old, 4)
    groups, _ = await old.state()
    assert [serial for serial, _ in groups] == [4]
    new = ReplayBuffer(window=1)
    await new.restore([Ticket(3), Ticket(6)], next_serial=7, groups=groups)
    waiting = asyncio.ensure_future(new.sample(4))
    await add(new, 6, 7)
    await settle()
    assert not waiting.done()
    await add(new, 3)
    _, report = await result_now(waiting)
    assert [ticket.serial for ticket in report.tickets] == [3, 4, 6, 7]


async def test_a_new_process_with_nothing_to_wait_for_goes_on_with_the_next_ticket(add):
    buffer = ReplayBuffer(window=1)
    await buffer.restore([], next_serial=7)
    await add(buffer, 7)
    _, report = await sample(buffer, 1)
    assert report.tickets == (Ticket(7),)


async def test_a_group_that_a_batch_took_out_of_the_process_before_is_not_kept_twice(add):
    buffer = ReplayBuffer(window=1)
    await buffer.restore([Ticket(5)], next_serial=6)
    await add(buffer, 3, 5)  # the answer to the first `add` of 3 was lost with the old process
    assert [serial for serial, _ in (await buffer.state())[0]] == [5]
    await buffer.skip(Ticket(3))
    _, report = await sample(buffer, 1)
    assert report.tickets == (Ticket(5),)
    await add(buffer, 5)
    assert (await buffer.state())[0] == []
