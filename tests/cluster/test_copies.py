import asyncio

import pytest

from grpo.cluster.actor import LatestCopy


class Payloads:
    """Made by number; each arrives when the test says so."""

    def __init__(self):
        self.asked, self._arrivals = [], {}

    async def make(self, number):
        self.asked.append(number)
        self._arrivals[number] = asyncio.get_running_loop().create_future()
        return await self._arrivals[number]

    async def arrive(self, number, error=None):
        arrival = self._arrivals[number]
        arrival.set_exception(error) if error else arrival.set_result(f"copy {number}")
        for _ in range(5):
            await asyncio.sleep(0)


class Later:
    """What starts only when it is awaited, as a reference does, and may be let go before."""

    def __init__(self, payloads, number):
        self._payloads, self._number = payloads, number

    def __await__(self):
        return self._payloads.make(self._number).__await__()


@pytest.fixture
def payloads():
    return Payloads()


@pytest.fixture
def errors():
    return []


@pytest.fixture
def bring(payloads, errors):
    """Brings payloads by their numbers, through one copy that `bring.copy` is."""

    async def bring(*numbers):
        for number in numbers:
            bring.copy.bring(Later(payloads, number))
        await asyncio.sleep(0)

    bring.copy = LatestCopy(errors.append)
    return bring


async def test_a_copy_is_held_until_the_next_is_here(bring, payloads):
    await bring(1)
    assert bring.copy.held is None
    await payloads.arrive(1)
    assert bring.copy.held == "copy 1"
    await bring(2)
    assert bring.copy.held == "copy 1"
    await payloads.arrive(2)
    assert bring.copy.held == "copy 2"


async def test_one_copy_is_under_way_and_the_newest_of_those_that_wait_is_the_next(bring, payloads):
    await bring(1, 2, 3, 4)
    assert payloads.asked == [1]
    await payloads.arrive(1)
    assert payloads.asked == [1, 4]
    await bring(5)
    await payloads.arrive(4)
    await payloads.arrive(5)
    assert (payloads.asked, bring.copy.held) == ([1, 4, 5], "copy 5")


async def test_a_payload_that_does_not_arrive_is_told_of_and_the_next_one_comes(bring, payloads, errors):
    await bring(1)
    await payloads.arrive(1)
    await bring(2, 3)
    await payloads.arrive(2, OSError("gone"))
    assert (bring.copy.held, list(map(str, errors))) == ("copy 1", ["gone"])
    await payloads.arrive(3)
    assert bring.copy.held == "copy 3"


async def test_the_end_of_the_event_loop_is_no_failure(bring, payloads, errors):
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    others = asyncio.all_tasks()
    await bring(1, 2)
    for task in asyncio.all_tasks() - others:
        task.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert (payloads.asked, errors) == ([1], [])
