"""Two ranks of the real trainer on real Ray, against the loop in one process, which has one rank."""

import asyncio
import os
import signal

import pytest

from grpo.cluster.launch import launch
from grpo.cluster.local import launch_local
from grpo.loop import run

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def config(tiny_config):
    """What is sampled depends on the weights alone."""
    tiny_config.buffer.max_policy_age = 0
    tiny_config.rollout.concurrency = 1
    tiny_config.loss.beta = 0.05
    tiny_config.correction.weights, tiny_config.correction.high = "mask", 5.0
    tiny_config.trainer.updates_per_batch = 2
    tiny_config.trainer.max_steps = 4
    tiny_config.trainer.ranks, tiny_config.trainer.num_cpus = 2, 0.5
    return tiny_config


async def train(launched, config, make_recorder, *, kill=()):
    """The lines of the steps. Behind each of the first steps the next rank of `kill` is killed."""
    recorder = make_recorder(config)
    async with launched(config, recorder.failures) as services:

        async def killing():
            for rank in kill:
                await recorder.failures.progress.wait()
                replica = await services.trainer.service.available()
                os.kill(replica.endpoint.processes()[rank].pid, signal.SIGKILL)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(run(services, config, recorder, asyncio.Event()))
            tasks.create_task(killing())
    recorder.run_dir.close()
    assert recorder.failures.restarts == ({"trainer": len(kill)} if kill else {})
    return recorder.run_dir.read("metrics.jsonl")


async def test_two_ranks_learn_what_one_does_though_one_of_them_is_killed(config, make_recorder):
    alone = await train(launch_local, config, make_recorder)
    together = await train(launch, config, make_recorder, kill=(1,))
    assert any(step["loss"] for step in alone)
    for name in ("loss", "reward/mean", "trainer/grad_norm", "trainer/entropy", "trainer/tokens"):
        assert [step[name] for step in together] == pytest.approx([step[name] for step in alone], abs=1e-4), name
