"""What is done beside the next step, on a transport that a test drives."""

import asyncio

import pytest

from grpo.driver.weight_sync import WeightSync
from grpo.utils.aio import Interrupted


class Gated:
    """Spreads when the gate is opened."""

    def __init__(self):
        self.gate, self.taken = asyncio.Event(), 0

    async def snapshot(self):
        self.taken += 1

    async def broadcast(self):
        await self.gate.wait()
        return ["acknowledged"]


@pytest.fixture
def make_sync(tiny_config):
    def make(tasks, max_policy_age=1):
        class Services:
            trainer = generator = None

        tiny_config.buffer.max_policy_age = max_policy_age
        sync = WeightSync(Services, tiny_config, print, tasks)
        sync._transport = Gated()
        return sync, sync._transport

    return make


async def test_the_next_version_is_not_taken_before_the_work_on_this_one_is_over(make_sync):
    async with asyncio.TaskGroup() as tasks:
        sync, transport = make_sync(tasks)
        await sync.publish()
        await sync.overlap_with_next_step(sync.wait_loaded())
        following = tasks.create_task(sync.publish())
        await asyncio.sleep(0.01)
        assert transport.taken == 1
        transport.gate.set()
        await following
        assert transport.taken == 2


@pytest.mark.parametrize(("max_policy_age", "wait"), [(0, False), (3, True)])
async def test_who_has_to_wait_does(make_sync, max_policy_age, wait):
    async with asyncio.TaskGroup() as tasks:
        sync, transport = make_sync(tasks, max_policy_age)
        publishing = tasks.create_task(sync.publish(wait=wait))
        await asyncio.sleep(0.01)
        assert not publishing.done()
        transport.gate.set()
        await publishing


async def test_a_shutdown_in_what_is_beside_is_no_error(make_sync):
    """An evaluation that was to be skipped may find the one before ended, and be interrupted itself."""

    async def interrupted(sync):
        await sync.wait_loaded()
        raise Interrupted

    async with asyncio.TaskGroup() as tasks:
        sync, transport = make_sync(tasks)
        await sync.publish()
        await sync.overlap_with_next_step(interrupted(sync))
        transport.gate.set()
        await sync.wait_overlapped()
