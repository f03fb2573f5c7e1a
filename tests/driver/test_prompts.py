import asyncio

import numpy as np

from grpo.driver.pacing import Pacer
from grpo.driver.prompts import PromptQueue
from grpo.services.handle import ActorHandle
from grpo.services.local import LocalEndpoint
from grpo.telemetry.activity import begin_activity, describe_blocked
from grpo.types import Problem, Prompt, PromptBatch
from tests.fakes import service_of


class CountingDataloader:
    """A stream in which every prompt whose serial is divisible by `skips` is too long."""

    def __init__(self, skips=1_000_000):
        self.calls, self._skips = [], skips

    async def sample(self, start, count, left_out=()):
        self.calls.append((start, count))
        await asyncio.sleep(0)
        serials = [serial for serial in range(start, start + 2 * count + 2) if serial == 0 or serial % self._skips][
            :count
        ]
        return PromptBatch(tuple(self._prompt(serial) for serial in serials), serials[-1] + 1)

    async def prompt(self, serial):
        return self._prompt(serial)

    def _prompt(self, serial):
        return Prompt(serial, Problem("q", "a"), np.array([1]))


def make_queue(dataloader, pacer, bulk):
    return PromptQueue(ActorHandle(service_of(LocalEndpoint(dataloader))), pacer, bulk)


async def test_prompts_come_in_bulk_and_in_order_however_many_wait():
    dataloader, pacer = CountingDataloader(), Pacer(30)
    queue = make_queue(dataloader, pacer, bulk=8)
    tickets = [await pacer.admit() for _ in range(20)]
    prompts = await asyncio.gather(*map(queue.prompt_for, tickets))
    assert [prompt.serial for prompt in prompts] == list(range(20))
    assert dataloader.calls == [(0, 8), (8, 8), (16, 8)]


async def test_a_cancelled_waiter_costs_no_prompt():
    pacer = Pacer(30)
    queue = make_queue(CountingDataloader(), pacer, bulk=4)
    tickets = [await pacer.admit() for _ in range(4)]
    waiters = [asyncio.ensure_future(queue.prompt_for(ticket)) for ticket in tickets[:3]]
    await asyncio.sleep(0)
    waiters[1].cancel()
    await asyncio.gather(*waiters, return_exceptions=True)
    assert [waiters[0].result().serial, waiters[2].result().serial] == [0, 1]
    assert (await queue.prompt_for(tickets[3])).serial == 2


async def test_a_group_that_is_made_again_gets_the_same_prompt_and_counts_once():
    pacer = Pacer(30)
    queue = make_queue(CountingDataloader(), pacer, bulk=4)
    tickets = [await pacer.admit() for _ in range(3)]
    before = [(await queue.prompt_for(ticket)).serial for ticket in tickets]
    pacer.requeue(tickets[1:], "lost")
    again = [await pacer.admit() for _ in range(2)]
    assert again == tickets[1:]
    assert [(await queue.prompt_for(ticket)).serial for ticket in again] == before[1:]
    assert queue.counts() == {"handed_out": 3, "skipped_length": 0, "left_out_difficulty": 0}


async def test_a_queue_goes_on_from_the_first_prompt_that_nobody_has():
    pacer = Pacer(30)
    queue = make_queue(CountingDataloader(skips=3), pacer, bulk=8)
    assert [(await queue.prompt_for(await pacer.admit())).serial for _ in range(4)] == [0, 1, 2, 4]
    assert queue.counts() == {"handed_out": 4, "skipped_length": 1, "left_out_difficulty": 0}
    other = make_queue(CountingDataloader(skips=3), pacer, bulk=8)
    await other.restore(queue.state())
    assert [(await other.prompt_for(await pacer.admit())).serial for _ in range(3)] == [5, 7, 8]
    # with 9, which was fetched ahead of 10
    assert other.counts() == {"handed_out": 7, "skipped_length": 3, "left_out_difficulty": 0}


async def test_who_waits_while_another_fetches_is_said_to_wait():
    begin_activity("rollouts")
    pacer, gate = Pacer(30), asyncio.Event()

    class SlowDataloader(CountingDataloader):
        async def sample(self, *place):
            await gate.wait()
            return await super().sample(*place)

    queue = make_queue(SlowDataloader(), pacer, bulk=4)
    tickets = [await pacer.admit() for _ in range(3)]
    waiters = [asyncio.ensure_future(queue.prompt_for(ticket)) for ticket in tickets[:2]]
    await asyncio.sleep(0)
    assert "prompts" in describe_blocked()
    gate.set()
    await asyncio.gather(*waiters)
    await queue.prompt_for(tickets[2])
    assert describe_blocked() == "nothing is blocked on an actor"
