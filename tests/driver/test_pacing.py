"""The ledger of tickets; turns, and how the controller finds the number of rollouts that is enough."""

import asyncio
import json

import pytest

from grpo.config.schema import age_bound, ticket_capacity
from grpo.driver.pacing import AutoConcurrency, Concurrency, Pacer
from grpo.types import Ticket


async def test_admits_up_to_capacity_and_then_waits_for_a_release():
    pacer = Pacer(capacity=2)
    first, _ = await pacer.admit(), await pacer.admit()
    third = asyncio.ensure_future(pacer.admit())
    await asyncio.sleep(0)
    assert not third.done()
    pacer.release([first])
    assert (await third).serial == 2
    assert pacer.outstanding == 2


async def test_waiters_are_served_in_order_with_rising_serials():
    pacer = Pacer(capacity=1)
    ticket = await pacer.admit()
    order = []

    async def wait(name):
        order.append((name, await pacer.admit()))

    async with asyncio.TaskGroup() as tasks:
        for name in "abc":
            tasks.create_task(wait(name))
        for _ in range(3):
            pacer.release([ticket])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            ticket = order[-1][1]
    assert [(name, ticket.serial) for name, ticket in order] == [("a", 1), ("b", 2), ("c", 3)]


async def test_a_cancelled_waiter_takes_no_ticket():
    pacer = Pacer(capacity=1)
    ticket = await pacer.admit()
    waiter = asyncio.ensure_future(pacer.admit())
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.gather(waiter, return_exceptions=True)
    pacer.release([ticket])
    assert (await pacer.admit()).serial == 1
    assert pacer.outstanding == 1


async def test_the_ledger_adds_up():
    pacer = Pacer(capacity=5)
    tickets = [await pacer.admit() for _ in range(5)]
    pacer.release(tickets[:2])
    pacer.drop(tickets[2], "reward_error")
    assert pacer.admitted == pacer.trained + pacer.dropped.total() + pacer.outstanding == 5
    assert pacer.dropped == {"reward_error": 1}


async def test_a_ticket_cannot_come_back_twice():
    pacer = Pacer(capacity=1)
    ticket = await pacer.admit()
    pacer.release([ticket])
    with pytest.raises(KeyError):
        pacer.drop(ticket, "again")
    with pytest.raises(KeyError):
        pacer.release([Ticket(99)])


async def test_lost_groups_come_before_new_ones_the_oldest_first_and_keep_their_prompts():
    pacer = Pacer(capacity=3)
    tickets = [await pacer.admit() for _ in range(3)]
    for ticket in tickets:
        pacer.assign_prompt(ticket, 10 + ticket.serial)
        pacer.mark_buffered(ticket)
    waiter = asyncio.ensure_future(pacer.admit())
    await asyncio.sleep(0)
    pacer.requeue([tickets[2], tickets[0]], "lost")
    assert await waiter == tickets[0]
    assert await pacer.admit() == tickets[2]
    assert [pacer.prompt_of(ticket) for ticket in tickets] == [10, 11, 12]
    assert (pacer.admitted, pacer.outstanding, pacer.requeued) == (3, 3, {"lost": 2})
    pacer.release(tickets[:1])
    assert (await pacer.admit()).serial == 3


async def test_a_ledger_goes_on_from_its_state_and_begins_again_what_was_under_way():
    pacer = Pacer(capacity=4)
    tickets = [await pacer.admit() for _ in range(4)]
    for ticket in tickets[:3]:
        pacer.assign_prompt(ticket, 10 + ticket.serial)
    pacer.release(tickets[:1])
    pacer.drop(await pacer.admit(), "reward_error")
    state = json.loads(json.dumps(pacer.state()))

    resumed = Pacer(capacity=4)
    resumed.restore(state)
    resumed.mark_buffered(Ticket(1))
    resumed.requeue(resumed.in_stage("rollout"), "resumed")
    assert (resumed.admitted, resumed.trained, resumed.dropped) == (5, 1, {"reward_error": 1})
    assert resumed.in_stage("buffered") == [Ticket(1)]
    assert resumed.requeued == {"resumed": 2}
    again = [await resumed.admit() for _ in range(2)]
    assert [(ticket.serial, resumed.prompt_of(ticket)) for ticket in again] == [(2, 12), (3, None)]
    assert (await resumed.admit()).serial == 5
    assert resumed.admitted == resumed.trained + resumed.dropped.total() + resumed.outstanding


async def test_a_batch_that_is_faster_than_the_answer_of_the_buffer_keeps_its_tickets():
    pacer = Pacer(capacity=2)
    ticket, other = await pacer.admit(), await pacer.admit()
    pacer.mark_training([ticket, other])
    pacer.mark_buffered(ticket)
    pacer.release([other])
    pacer.mark_buffered(other)
    assert pacer.in_stage("buffered") == []
    assert pacer.in_stage("training") == [ticket]


@pytest.mark.parametrize(("age", "window", "bound"), [(0, 1, 0), (1, 1, 1), (1, 2, 2), (1, 5, 2), (1, 6, 3), (4, 4, 5)])
def test_age_bound_is_s_plus_the_steps_that_a_window_adds(age, window, bound):
    assert age_bound(groups_per_step=4, max_policy_age=age, reorder_window=window) == bound


def test_capacity_is_s_plus_one_batches():
    assert ticket_capacity(groups_per_step=16, max_policy_age=0) == 16
    assert ticket_capacity(groups_per_step=16, max_policy_age=3) == 64


def stages(wait):
    return {"time/trainer_wait_s": wait, "time/train_step_s": 0.9 * (1 - wait), "time/weight_sync_s": 0.1 * (1 - wait)}


def train(concurrency, wait_with, decisions):
    """The limits after each decision, the trainer's wait being `wait_with(limit)`."""
    limits = []
    for _ in range(decisions):
        for _ in range(5):
            concurrency.step_trained(stages(wait_with(concurrency.limit)))
        limits.append(concurrency.limit)
    return limits


async def test_a_number_is_kept_and_everybody_has_a_turn():
    concurrency = Concurrency(4)
    assert train(concurrency, lambda limit: 0.9, 3) == [4, 4, 4]
    for number in range(4):
        await concurrency.turn(number)


async def test_who_has_no_turn_is_woken_when_the_limit_grows():
    concurrency = AutoConcurrency(most=16, start=4, target=0.1)
    turn = asyncio.create_task(concurrency.turn(4))
    await asyncio.sleep(0)
    assert not turn.done()
    train(concurrency, lambda limit: 0.5, 1)
    await asyncio.wait_for(turn, 60)


def latency_bound(enough):
    """Every group takes its time: the trainer waits for 10% of its time with `enough` rollouts, for 55% with half."""
    return lambda limit: max(0.0, 1 - 0.9 * limit / enough)


@pytest.mark.parametrize("enough", [3, 7, 20, 31])
@pytest.mark.parametrize("start", [1, 16, 32])
def test_it_settles_at_the_smallest_that_is_enough(enough, start):
    limits = train(AutoConcurrency(most=32, start=start, target=0.1), latency_bound(enough), 40)[20:]
    assert all(enough <= limit <= 1.25 * enough + 1 for limit in limits[:-1]), limits


def test_it_goes_no_further_where_more_does_not_help():
    """From 8 on the generators have enough to do."""
    concurrency = AutoConcurrency(most=64, start=4, target=0.1)
    limits = train(concurrency, lambda limit: 1 - 0.5 * min(limit, 8) / 8, 20)
    assert set(limits[5:]) == {8}


def test_it_stays_between_1_and_the_most():
    assert train(AutoConcurrency(most=6, start=16, target=0.1), latency_bound(100), 20)[-1] == 6
    assert train(AutoConcurrency(most=64, start=16, target=0.1), lambda limit: 0.0, 40)[-1] == 1


def test_what_was_too_few_is_tried_again_after_a_while():
    """Answers get shorter as the policy learns: first it takes 16, then 2."""
    concurrency = AutoConcurrency(most=64, start=8, target=0.1)
    assert 16 <= train(concurrency, latency_bound(16), 30)[-1] <= 20
    assert 2 <= train(concurrency, latency_bound(2), 60)[-1] <= 4
