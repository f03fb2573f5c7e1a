"""Weights by broadcast between real processes, one of which is stopped, and killed, in the middle."""

import asyncio
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from grpo.actors.specs import actor_specs
from grpo.cluster.launch import launch, launch_actors
from grpo.driver.loop import train_loop
from grpo.driver.weight_sync import Collective
from grpo.services.failures import Failures

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.long]


@pytest.fixture
def config(tiny_config):
    tiny_config.weight_sync.transport, tiny_config.weight_sync.bucket_mb = "collective", 0.01
    tiny_config.generator.replicas = 2
    tiny_config.generator.num_cpus = tiny_config.trainer.num_cpus = 0.5
    return tiny_config


class Publisher:
    """Takes and spreads weights once more, and says how many generators have acknowledged them."""

    def __init__(self, services, config):
        self.told = []
        self.transport = Collective(services, config, self.told.append)

    async def publish(self):
        await self.transport.snapshot()
        return len(await self.transport.broadcast())


async def test_a_run_trains_and_a_replica_killed_in_the_middle_of_a_transfer_holds_nobody_up(config, make_recorder):
    """It is stopped first, so the others are in the middle for certain; their time-out is an hour."""
    config.weight_sync.timeout_s = 3600.0
    recorder = make_recorder(config)
    async with launch(config, recorder.failures) as services:
        await train_loop(services, config, recorder, asyncio.Event())
        assert (recorder.pacer.trained, recorder.failures.restarts) == (6, {})
        publisher = Publisher(services, config)
        assert await publisher.publish() == 2
        victim = services.generator.service.replicas[1].endpoint
        os.kill(victim.pid, signal.SIGSTOP)
        publishing = asyncio.ensure_future(publisher.publish())
        done, _ = await asyncio.wait([publishing], timeout=1.0)
        assert not done
        os.kill(victim.pid, signal.SIGKILL)
        async with asyncio.timeout(300):
            assert await publishing >= 1
            await services.generator.service.ready()
        assert len(publisher.told) == 1
        async with asyncio.timeout(300):
            assert await publisher.publish() == 2  # a new group of both
        assert len(publisher.told) == 1
        assert recorder.failures.restarts == {"generator-1": 1}
    recorder.run_dir.close()
    assert all(line["generator/replicas"] == 2 for line in recorder.run_dir.read("metrics.jsonl"))


async def test_a_replica_that_hangs_in_a_transfer_costs_one_time_out(config):
    config.weight_sync.timeout_s, config.recovery.health_interval_s, config.recovery.health_timeout_s = 1.0, 0.5, 15.0
    specs = [spec for spec in actor_specs(config) if spec.name in ("generator", "trainer")]
    async with launch_actors(specs, config, Failures(config.recovery)) as handles:
        services = SimpleNamespace(**handles)
        publisher = Publisher(services, config)
        await publisher.publish()
        os.kill(services.generator.service.replicas[0].endpoint.pid, signal.SIGSTOP)
        async with asyncio.timeout(300):
            assert await publisher.publish() >= 1
        assert len(publisher.told) == 1
        weights, _ = await services.trainer.push_weights.call_one()
        reference = await publisher.transport.stored().value()
        np.testing.assert_array_equal((await reference).buffer, (await weights).buffer)
