import asyncio

import numpy as np
import pytest

from grpo.cluster.local import launch_local
from grpo.failures import Failures
from grpo.rollout import PromptQueue, rollout, sampling_params
from grpo.types import Problem, Prompt, RewardError


class CountingDataloader:
    def __init__(self):
        self.calls, self.serial = [], 0

    async def sample(self, count):
        self.calls.append(count)
        await asyncio.sleep(0)
        prompts = [Prompt(self.serial + i, Problem("q", "a"), np.array([1])) for i in range(count)]
        self.serial += count
        return prompts


class Bound:
    """Just enough of a handle for the queue."""

    def __init__(self, dataloader):
        self.sample = self
        self.call_one = dataloader.sample


async def test_prompts_come_in_bulk_and_in_order_however_many_wait():
    dataloader = CountingDataloader()
    queue = PromptQueue(Bound(dataloader), bulk=8)
    prompts = await asyncio.gather(*(queue.next() for _ in range(20)))
    assert [prompt.serial for prompt in prompts] == list(range(20))
    assert dataloader.calls == [8, 8, 8]


async def test_a_cancelled_waiter_costs_no_prompt():
    queue = PromptQueue(Bound(CountingDataloader()), bulk=4)
    waiters = [asyncio.ensure_future(queue.next()) for _ in range(3)]
    await asyncio.sleep(0)
    waiters[1].cancel()
    await asyncio.gather(*waiters, return_exceptions=True)
    assert [waiters[0].result().serial, waiters[2].result().serial] == [0, 1]
    assert (await queue.next()).serial == 2


def test_seeds_differ_by_run_and_prompt_only(tiny_config):
    def seed(run, serial):
        return sampling_params(tiny_config.rollout, run, Prompt(serial, Problem("q", "a"), np.array([1]))).seed

    assert len({seed(run, serial) for run in range(10) for serial in range(10)}) == 100
    assert seed(3, 4) == seed(3, 4)


async def test_a_group_has_rewards_advantages_and_the_oldest_version(tiny_config):
    async with launch_local(tiny_config, Failures(tiny_config.recovery)) as services:
        (prompt,) = await services.dataloader.sample.call_one(1)
        params = sampling_params(tiny_config.rollout, 0, prompt)
        group, scores, report = await rollout(prompt, params, services, tiny_config.loss)
    assert len(group.completions) == len(group.rewards) == len(group.advantages) == 4
    assert group.rewards == scores.rewards
    assert sum(group.advantages) == pytest.approx(0, abs=1e-5)
    assert group.oldest_version == report.oldest_version == 0
    assert report.token_count == sum(len(completion.token_ids) for completion in group.completions)
    assert group.reference_logprobs is None


async def test_the_reference_runs_side_by_side_with_the_reward(tiny_config):
    """Each waits for the other: one after another they would wait for ever."""
    tiny_config.loss.beta = 0.1
    asked = {"reward": asyncio.Event(), "reference": asyncio.Event()}

    class Reward:
        async def score(self, prompt, completions):
            asked["reward"].set()
            await asked["reference"].wait()
            raise RewardError("both were asked")

    class Reference:
        async def logprobs(self, prompt, completions):
            asked["reference"].set()
            await asked["reward"].wait()
            return [], None

    async with launch_local(
        tiny_config, Failures(tiny_config.recovery), {"reward": Reward(), "reference": Reference()}
    ) as services:
        (prompt,) = await services.dataloader.sample.call_one(1)
        params = sampling_params(tiny_config.rollout, 0, prompt)
        with pytest.raises(RewardError, match="both were asked"):
            async with asyncio.timeout(30):
                await rollout(prompt, params, services, tiny_config.loss)
