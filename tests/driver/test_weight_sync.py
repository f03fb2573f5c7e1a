"""Publication beside the next step on a transport that a test drives; the transports on actors that only take notes."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest

from grpo.actors.marks import rank_zero_only, returns_payload
from grpo.driver.weight_sync import Collective, ObjectStore, WeightSync, make_transport
from grpo.errors import ActorDied, PayloadLost, TransferError
from grpo.services.failures import Failures
from grpo.services.local import launch_local
from grpo.types import GeneratorStats
from grpo.utils.aio import Interrupted
from grpo.weights.payload import Weights


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


class NotingTrainer:
    def __init__(self):
        self.version, self.written, self.sent, self.asked = 0, None, [], []

    async def push_weights(self):
        return await self.write_weights(), self.version

    async def write_weights(self):
        self.version += 1
        self.written = Weights(self.version, (), np.zeros(0, dtype=np.uint8))
        return self.written

    @rank_zero_only
    async def send_weights(self, header, group):
        assert header is self.written
        self.sent.append((self.version, group))

    @rank_zero_only
    @returns_payload
    async def written_weights(self):
        self.asked.append(self.version)
        return self.written, None if self.written is None else self.version

    async def leave_group(self, number):
        """Nothing is under way."""


class NotingGenerator:
    """Notes versions by how they came; `fails` makes transfers fail, `waits` makes them wait for ever."""

    def __init__(self, lost=(), loses=0):
        self.received, self.loaded, self.left = [], [], 0
        self.fails, self.waits, self.loses, self.asked = False, False, loses, asyncio.Event()
        self._lost = lost

    async def receive_weights(self, header, group):
        self.asked.set()
        if self.waits:
            await asyncio.get_running_loop().create_future()
        if self.fails:
            raise TransferError("connection reset")
        self.received.append((header.version, group))
        return GeneratorStats(0.0, header.version)

    async def update_weights(self, weights):
        if self.loses or weights.version in self._lost:
            self.loses = max(0, self.loses - 1)
            raise PayloadLost("with its node")
        self.loaded.append(weights.version)
        return GeneratorStats(0.0, weights.version)

    async def leave_group(self, number):
        self.left += 1


class Stage:
    """A broadcast to generators, all that were started, and what was told."""

    def __init__(self, services, config, failures, trainers, generators, lost):
        self.lost = lost  # versions that no generator can load
        self.services, self.trainers, self.generators, self.told = services, trainers, generators, []
        self.warnings = []  # of the services
        failures.warn = self.warnings.append
        self.transport = make_transport(services, config, self.told.append)

    async def publish(self):
        await self.transport.snapshot()
        return await self.broadcast()

    async def broadcast(self):
        return [stats.tokens for stats in await self.transport.broadcast()]

    async def grow_to(self, replicas):
        """Returns when so many serve."""
        service = self.services.generator.service
        service.scale(replicas)
        async with asyncio.timeout(60):
            await service.context.changed.wait_for(lambda: len(service.healthy()) == replicas)

    @property
    def process(self):
        """Of every replica, the one that serves."""
        return [replica.endpoint for replica in self.services.generator.service.replicas]


@pytest.fixture
def open_stage(tiny_config):
    @asynccontextmanager
    async def open_stage(replicas=2, losing=None, transport="collective"):
        tiny_config.weight_sync.transport, tiny_config.generator.replicas = transport, replicas
        trainers, generators, lost = [], [], []

        def trainer():
            trainers.append(NotingTrainer())
            return trainers[-1]

        def generator():
            generators.append(NotingGenerator(lost, loses=1 if len(generators) == losing else 0))
            return generators[-1]

        fakes, failures = {"trainer": trainer, "generator": generator}, Failures(tiny_config.recovery)
        async with launch_local(tiny_config, failures, fakes) as services:
            services.trainer.on_restart(nothing)
            yield Stage(services, tiny_config, failures, trainers, generators, lost)

    async def nothing(replica):
        """There is no state to bring back."""

    return open_stage


def test_the_config_chooses(tiny_config):
    class Services:
        trainer = generator = None

    assert isinstance(make_transport(Services, tiny_config, print), ObjectStore)
    tiny_config.weight_sync.transport = "collective"
    assert isinstance(make_transport(Services, tiny_config, print), Collective)


async def test_every_generator_receives_what_the_trainer_sends_to_a_group_of_all(open_stage):
    async with open_stage(3) as stage:
        assert await stage.publish() == [1, 1, 1]
        assert await stage.publish() == [2, 2, 2]
        (first, group), (second, same) = stage.trainers[0].sent
        assert (first, second, group.receivers) == (1, 2, 3)
        assert group is same
        assert all(each.received == [(1, group), (2, group)] for each in stage.generators)
        assert not any(each.loaded for each in stage.generators)
        assert not stage.trainers[0].asked  # nothing was put into the store
        assert not stage.told


async def test_a_transfer_that_fails_is_told_and_made_up_for_by_the_store(open_stage):
    async with open_stage() as stage:
        stage.generators[1].fails = True
        assert await stage.publish() == [1, 1]
        assert [each.loaded for each in stage.generators] == [[1], [1]]
        assert [each.left for each in stage.generators] == [1, 1]
        assert stage.told == ["connection reset; sending weights through the object store"]
        stage.generators[1].fails = False
        assert await stage.publish() == [2, 2]
        assert [each.loaded for each in stage.generators] == [[1], [1]]
        (_, before), (_, after) = stage.trainers[0].sent
        assert before != after  # they meet anew


async def test_after_three_failures_in_a_row_the_store_is_what_is_left(open_stage):
    async with open_stage() as stage:
        stage.generators[0].fails = True
        for version in range(1, 6):
            assert await stage.publish() == [version, version]
        assert len(stage.trainers[0].sent) == 3
        assert len(stage.told) == 3
        assert stage.told[-1].endswith("from now on, after 3 failures in a row")


async def test_a_success_in_between_forgives(open_stage):
    async with open_stage() as stage:
        for i in range(6):
            stage.generators[0].fails = i % 3 != 2
            await stage.publish()
        assert [version for version, _ in stage.generators[0].received] == [3, 6]


async def test_when_a_receiver_dies_the_others_do_not_wait_and_the_newcomer_has_the_weights_too(open_stage):
    async with open_stage() as stage:
        await stage.publish()
        for each in stage.generators:
            each.waits = True
        publishing = asyncio.ensure_future(stage.publish())
        await stage.generators[1].asked.wait()
        for each in stage.generators:
            each.asked.clear()
        await stage.generators[0].asked.wait()
        stage.process[1].kill()
        assert set(await publishing) == {2}
        assert stage.generators[0].loaded == [2]
        assert "left; sending weights through the object store" in stage.told[0]
        await stage.services.generator.service.ready()
        assert stage.generators[2].loaded[-1] == 2
        for each in stage.generators:
            each.waits = False
        assert await stage.publish() == [3, 3]
        assert stage.trainers[0].sent[-1][1].receivers == 2
        assert stage.generators[2].received[-1][0] == 3


async def test_when_the_trainer_dies_the_new_one_gives_its_present_weights(open_stage):
    async with open_stage() as stage:
        await stage.publish()
        stage.generators[0].waits = True
        publishing = asyncio.ensure_future(stage.publish())
        stage.generators[0].asked.clear()
        await stage.generators[0].asked.wait()
        (replica,) = stage.services.trainer.service.replicas
        replica.endpoint.kill()
        assert await publishing == [1, 1]  # the new trainer begins to count anew
        assert stage.trainers[1].asked == [0]


async def test_newcomers_get_the_weights_of_the_moment_and_the_group_grows(open_stage):
    async with open_stage(1) as stage:
        await stage.publish()
        await stage.publish()
        await stage.grow_to(2)
        assert stage.generators[1].loaded == [2]
        assert await stage.publish() == [3, 3]
        assert stage.trainers[0].sent[-1][1].receivers == 2


async def test_a_new_trainer_makes_a_new_group(open_stage):
    async with open_stage() as stage:
        await stage.publish()
        (replica,) = stage.services.trainer.service.replicas
        replica.endpoint.kill()
        assert await stage.publish() == [1, 1]
        assert len(stage.trainers) == 2
        assert stage.trainers[1].sent[0][1] != stage.trainers[0].sent[0][1]
        assert not stage.told


async def test_a_newcomer_whose_weights_were_lost_with_a_node_has_them_put_into_the_store_again(open_stage):
    async with open_stage(1, losing=1) as stage:
        await stage.publish()
        await stage.grow_to(2)
        assert stage.generators[1].loaded == [1]
        assert stage.trainers[0].asked == [1, 1]


async def test_others_find_the_weights_in_the_store_where_they_are_put_once(open_stage):
    async with open_stage() as stage:
        await stage.publish()
        assert [(await stage.transport.stored().value()).version for _ in range(2)] == [1, 1]
        assert stage.trainers[0].asked == [1]


async def test_weights_that_are_lost_on_their_way_through_the_store_are_published_again(open_stage):
    async with open_stage(losing=1, transport="object_store") as stage:
        assert set(await stage.publish()) == {2}
        assert stage.generators[1].loaded == [2]
        assert stage.warnings == ["with its node; fetching it again"]


async def test_so_are_those_that_made_up_for_a_broadcast(open_stage):
    async with open_stage(losing=1) as stage:
        stage.generators[0].fails = True
        assert await stage.publish() == [1, 1]
        assert stage.generators[1].loaded == [1]
        assert stage.warnings == ["with its node; fetching it again"]


async def test_when_all_generators_die_with_the_weights_their_replacements_have_them_published_again(open_stage):
    """As when the trainer and all of them share the node that is lost."""
    async with open_stage(transport="object_store") as stage:
        await stage.publish()
        await stage.transport.snapshot()
        for process in stage.process:
            process.kill()
        stage.lost.append(2)
        assert {3} <= set(await stage.broadcast()) <= {3, 4}
        await stage.services.generator.service.ready()
        assert [each.loaded[0] >= 3 for each in stage.generators[2:]] == [True, True]


async def test_a_trainer_that_is_gone_for_good_ends_it(open_stage):
    async with open_stage() as stage:
        await stage.publish()
        await stage.services.trainer.service.close(0.0)
        with pytest.raises(ActorDied, match="was closed"):
            await stage.publish()
