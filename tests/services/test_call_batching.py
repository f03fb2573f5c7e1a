import asyncio

import pytest

from grpo.errors import ActorDied, PayloadLost, RewardError
from grpo.services.call_batching import BatchRunner, CallBatcher, Wire


class Process:
    """Takes gathered calls of `double`; `held` numbers are not answered before they are let go."""

    def __init__(self, *, lost=(), dead=False):
        self.sent, self.asked_late = [], 0
        self.lost, self.dead = lost, dead
        self.reached, self.let_go = asyncio.Event(), asyncio.Event()
        self._work = BatchRunner()

    async def send(self, caller, calls):
        numbers = [number for (number,), _ in calls.values()]
        self.sent.append(numbers)
        self.reached.set()
        await asyncio.sleep(0)
        if self.dead:
            raise ActorDied("it is gone")
        if set(self.lost) & set(numbers):
            raise PayloadLost("it is gone")
        return await self._work.run(caller, {at: self.double(*args, **kwargs) for at, (args, kwargs) in calls.items()})

    async def late(self, caller):
        self.asked_late += 1
        answers = await self._work.late_answers(caller)
        if self.dead:
            raise ActorDied("it is gone")
        return answers

    async def double(self, number, held=False):
        if number < 0:
            raise RewardError(f"{number} is negative")
        if held:
            await self.let_go.wait()
        return 2 * number


def side_by_side(gathering, numbers):
    return asyncio.gather(*(gathering.call((n,), {}) for n in numbers), return_exceptions=True)


def gathering_of(process):
    return CallBatcher(Wire(process.send, process.late, process._work.error))


async def test_every_caller_gets_the_answer_to_its_own_call():
    assert await side_by_side(gathering_of(Process()), range(9)) == [2 * n for n in range(9)]


async def test_calls_made_at_once_travel_together_the_first_one_too():
    process = Process()
    await side_by_side(gathering_of(process), range(9))
    assert process.sent == [list(range(9))]


async def test_calls_made_while_one_is_under_way_travel_together():
    process = Process()
    gathering = gathering_of(process)
    first = asyncio.ensure_future(gathering.call((1,), {}))
    await process.reached.wait()
    assert await side_by_side(gathering, (2, 3, 4)) == [4, 6, 8]
    assert await first == 2
    assert process.sent == [[1], [2, 3, 4]]
    assert await gathering.call((5,), {}) == 10
    assert process.sent[2:] == [[5]]


async def test_what_takes_long_holds_up_nobody():
    process = Process()
    gathering = gathering_of(process)
    slow = asyncio.ensure_future(gathering.call((1,), {"held": True}))
    assert await side_by_side(gathering, (2, 3)) == [4, 6]
    assert await gathering.call((4,), {}) == 8
    assert not slow.done()
    process.let_go.set()
    assert await slow == 2
    assert process.asked_late == 1


async def test_answers_that_are_late_together_are_fetched_together():
    process = Process()
    gathering = gathering_of(process)
    slow = [asyncio.ensure_future(gathering.call((number,), {"held": True})) for number in (1, 2, -3, 4)]
    assert await gathering.call((5,), {}) == 10
    slow += [asyncio.ensure_future(gathering.call((6,), {"held": True}))]
    await gathering.call((7,), {})
    process.let_go.set()
    answers = await asyncio.gather(*slow, return_exceptions=True)
    assert [type(each) if isinstance(each, Exception) else each for each in answers] == [2, 4, RewardError, 8, 12]
    assert process.asked_late == 1


async def test_a_process_that_dies_with_calls_under_way_is_an_error_for_all_of_them():
    process = Process()
    gathering = gathering_of(process)
    slow = [asyncio.ensure_future(gathering.call((number,), {"held": True})) for number in (1, 2)]
    await gathering.call((3,), {})
    process.dead = True
    process.let_go.set()
    assert {type(error) for error in await asyncio.gather(*slow, return_exceptions=True)} == {ActorDied}


async def test_several_callers_of_a_process_get_their_own_answers():
    process = Process()
    callers = [gathering_of(process) for _ in range(3)]
    slow = [asyncio.ensure_future(caller.call((i,), {"held": True})) for i, caller in enumerate(callers)]
    assert [await caller.call((10,), {}) for caller in callers] == [20, 20, 20]
    process.let_go.set()
    assert await asyncio.gather(*slow) == [0, 2, 4]


async def test_a_caller_that_was_cancelled_while_it_waited_for_a_late_answer_leaves_the_others_alone():
    process = Process()
    gathering = gathering_of(process)
    gone, stays = (asyncio.ensure_future(gathering.call((number,), {"held": True})) for number in (1, 2))
    await gathering.call((3,), {})
    gone.cancel()
    process.let_go.set()
    assert await stays == 4
    assert await gathering.call((5,), {"held": True}) == 10


async def test_an_error_is_that_of_one_caller():
    two, error, six = await side_by_side(gathering_of(Process()), (1, -1, 3))
    assert (two, six) == (2, 6)
    assert type(error) is RewardError
    assert "-1 is negative" in str(error)


async def test_a_lost_payload_is_that_of_one_caller():
    process = Process(lost=[2])
    two, error, six = await side_by_side(gathering_of(process), (1, 2, 3))
    assert (two, six) == (2, 6)
    assert type(error) is PayloadLost


async def test_a_dead_process_is_an_error_for_all_of_them():
    process = Process(dead=True)
    gathering = gathering_of(process)
    assert {type(error) for error in await side_by_side(gathering, (1, 2))} == {ActorDied}
    with pytest.raises(ActorDied):
        await gathering.call((3,), {})


async def test_a_caller_that_is_cancelled_leaves_the_others_alone():
    gathering = gathering_of(Process())
    gone = asyncio.ensure_future(gathering.call((1,), {}))
    stays = asyncio.ensure_future(gathering.call((2,), {}))
    await asyncio.sleep(0)
    gone.cancel()
    assert await stays == 4
    assert gone.cancelled()
