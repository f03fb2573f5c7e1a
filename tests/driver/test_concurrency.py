"""Whose turn it is, and how the controller finds out how many it takes."""

import asyncio

import pytest

from grpo.driver.pacing import AutoConcurrency, Concurrency


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
    await asyncio.wait_for(turn, 1)


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
