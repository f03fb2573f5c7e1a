"""Weights by broadcast between real processes, one of which is stopped and killed in the middle."""

import asyncio
import os
import signal

import numpy as np
import pytest

from grpo.cluster.launch import launch
from grpo.failures import Failures
from grpo.loop import run
from grpo.transport import Collective

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def config(tiny_config):
    tiny_config.weights.transport, tiny_config.weights.bucket_mb = "collective", 0.01
    tiny_config.generator.replicas = 2
    tiny_config.generator.num_cpus = tiny_config.trainer.num_cpus = 0.5
    return tiny_config


async def test_a_run_by_broadcast_trains_and_puts_nothing_into_the_store(config, make_recorder):
    recorder = make_recorder(config)
    async with launch(config, recorder.failures) as services:
        await run(services, config, recorder, asyncio.Event())
    recorder.run_dir.close()
    assert recorder.pacer.trained == 6
    assert recorder.failures.restarts == {}
    assert all(line["generator/replicas"] == 2 for line in recorder.run_dir.read("metrics.jsonl"))


async def test_a_replica_killed_in_the_middle_of_a_transfer_holds_nobody_up(config):
    """It is stopped first, so the others are in the middle for certain; their time-out is an hour."""
    config.weights.timeout_s = 3600.0
    failures, told = Failures(config.recovery), []
    async with launch(config, failures) as services:
        transport = Collective(services, config, told.append)
        await transport.take()
        assert len(await transport.spread()) == 2
        victim = services.generator.service.replicas[1].endpoint
        os.kill(victim.pid, signal.SIGSTOP)
        await transport.take()
        spreading = asyncio.ensure_future(transport.spread())
        done, _ = await asyncio.wait([spreading], timeout=1.0)
        assert not done
        os.kill(victim.pid, signal.SIGKILL)
        async with asyncio.timeout(30):
            assert len(await spreading) >= 1
            await services.generator.service.ready()
        assert len(told) == 1
        assert services.generator.service.replicas[1].endpoint is not victim
        await transport.take()
        async with asyncio.timeout(30):
            assert len(await transport.spread()) == 2  # a new group of both
        assert len(told) == 1
        assert failures.restarts == {"generator-1": 1}


async def test_a_replica_that_hangs_in_a_transfer_costs_one_time_out(config):
    config.weights.timeout_s, config.recovery.health_every_s, config.recovery.health_timeout_s = 1.0, 0.5, 3.0
    told = []
    async with launch(config, Failures(config.recovery)) as services:
        transport = Collective(services, config, told.append)
        await transport.take()
        await transport.spread()
        os.kill(services.generator.service.replicas[0].endpoint.pid, signal.SIGSTOP)
        await transport.take()
        async with asyncio.timeout(60):
            assert len(await transport.spread()) >= 1
        assert len(told) == 1
        weights, _ = await services.trainer.push_weights.call_one()
        reference = await transport.reference()
        np.testing.assert_array_equal((await reference).buffer, (await weights).buffer)
