import asyncio

import numpy as np
import pytest
import torch

from grpo.algorithms.advantages import group_norm
from grpo.driver.rollout import advantage_function, rollout, sampling_params
from grpo.errors import ConfigError, RewardError, ZeroVarianceGroup
from grpo.services.failures import Failures
from grpo.services.handle import ActorHandle, Services
from grpo.services.local import LocalEndpoint, launch_local
from grpo.types import Group, Problem, Prompt
from tests.fakes import AnswersOf, RewardBy, service_of


def test_seeds_differ_by_run_and_prompt_only(tiny_config):
    def seed(run, serial):
        return sampling_params(tiny_config.rollout, run, Prompt(serial, Problem("q", "a"), np.array([1]))).seed

    assert len({seed(run, serial) for run in range(10) for serial in range(10)}) == 100
    assert seed(3, 4) == seed(3, 4)


async def test_a_group_has_rewards_advantages_and_the_oldest_version(tiny_config):
    async with launch_local(tiny_config, Failures(tiny_config.recovery)) as services:
        (prompt,) = (await services.dataloader.sample.call_one(0, 1)).prompts
        params = sampling_params(tiny_config.rollout, 0, prompt)
        finished = await rollout(prompt, params, services, tiny_config)
    group, scores, report = finished.group, finished.scores, finished.report
    assert len(group.completions) == len(group.rewards) == len(group.advantages) == 4
    assert group.rewards == scores.rewards == finished.shaped_rewards
    assert sum(group.advantages) == pytest.approx(0, abs=1e-5)
    assert group.oldest_version == report.oldest_version == 0
    assert report.token_count == sum(len(completion.token_ids) for completion in group.completions)
    assert group.reference_logprobs is None


async def test_the_reference_runs_side_by_side_with_the_reward(tiny_config):
    """Each waits for the other: one after another they would wait for ever."""
    tiny_config.loss.beta = 0.1
    asked = {"reward": asyncio.Event(), "reference": asyncio.Event()}

    class Reward:
        async def score(self, prompt, completions, detail):
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
        (prompt,) = (await services.dataloader.sample.call_one(0, 1)).prompts
        params = sampling_params(tiny_config.rollout, 0, prompt)
        with pytest.raises(RewardError, match="both were asked"):
            async with asyncio.timeout(120):
                await rollout(prompt, params, services, tiny_config)


PROMPT = Prompt(7, Problem("q", "a"), np.array([1]))


async def rolled_out(config, rewards, lengths=None, cut=(), reward=RewardBy):
    """The group of these rewards and lengths; the completions at the places `cut` have become too long."""
    actors = {
        "generator": AnswersOf(lengths or [1] * len(rewards), cut),
        "reward": reward(lambda serial, count: rewards),
        **dict.fromkeys(("dataloader", "replay_buffer", "trainer")),
    }
    services = {name: ActorHandle(service_of(LocalEndpoint(actor))) for name, actor in actors.items()}
    return await rollout(PROMPT, sampling_params(config.rollout, 0, PROMPT), Services(**services), config)


def advantages_of(rewards):
    return tuple(group_norm(torch.tensor(rewards, dtype=torch.float64)).tolist())


async def test_advantages_are_of_the_shaped_rewards_and_the_rewards_stay_raw(tiny_config):
    tiny_config.shaping.scale, tiny_config.shaping.clip_high, tiny_config.shaping.length_penalty = 2.0, 1.0, 0.5
    finished = await rolled_out(tiny_config, (0.1, 0.4, 0.9, 0.9), lengths=(8, 4, 2, 2))
    assert finished.group.rewards == finished.scores.rewards == (0.1, 0.4, 0.9, 0.9)
    assert finished.shaped_rewards == (2 * 0.1 - 0.5, 2 * 0.4 - 0.25, 1.0 - 0.125, 1.0 - 0.125)
    assert finished.group.advantages == advantages_of(finished.shaped_rewards)


async def test_rewards_that_differ_only_beyond_a_bound_are_equal(tiny_config):
    tiny_config.shaping.clip_low = 0.5
    finished = await rolled_out(tiny_config, (0.1, 0.4, 0.3, 0.5))
    assert finished.group.advantages == (0.0,) * 4
    assert finished.group.is_zero_variance


async def test_answers_that_were_cut_off_are_masked_and_no_others(tiny_config):
    tiny_config.shaping.overlong = "mask"
    finished = await rolled_out(tiny_config, (1, 0, 0, 1), lengths=(8, 8, 3, 8), cut=(1, 3))
    assert finished.group.masked == (1, 3)
    assert finished.shaped_rewards == (1, 0, 0, 1)
    assert finished.group.advantages == advantages_of((1, 0, 0, 1))  # they still say how good the others are


async def test_long_answers_are_penalized_more_and_more_before_the_limit(tiny_config):
    shaping = tiny_config.shaping
    shaping.overlong, shaping.overlong_buffer, shaping.overlong_penalty = "penalize", 0.5, 0.5
    finished = await rolled_out(tiny_config, (1, 1, 1, 1), lengths=(4, 5, 8, 8), cut=(3,))
    assert finished.shaped_rewards == (1.0, 0.875, 0.5, 0.5)
    assert finished.group.rewards == (1, 1, 1, 1)
    assert finished.group.masked == ()
    assert not finished.group.is_zero_variance


@pytest.mark.parametrize("overlong", ["keep", "mask"])
async def test_the_zone_costs_nothing_unless_it_is_asked_for(tiny_config, overlong):
    tiny_config.shaping.overlong, tiny_config.shaping.overlong_buffer = overlong, 0.5
    finished = await rolled_out(tiny_config, (1, 0, 1, 0), lengths=(8, 8, 8, 8), cut=(0,))
    assert finished.shaped_rewards == (1, 0, 1, 0)


@pytest.mark.parametrize("rewards", [(1, 1, 1, 1), (0, 0, 0, 0), (0.7,) * 4])
async def test_a_group_with_nothing_to_learn_from_is_kept_unless_the_filter_is_set(tiny_config, rewards):
    finished = await rolled_out(tiny_config, rewards)
    assert finished.group.advantages == (0.0,) * 4
    tiny_config.filter.zero_variance = True
    with pytest.raises(ZeroVarianceGroup) as caught:
        await rolled_out(tiny_config, rewards)
    assert caught.value.rollout == finished
    assert caught.value.reason == "zero_variance"


async def test_the_filter_lets_groups_pass_from_which_something_can_be_learned(tiny_config):
    tiny_config.filter.zero_variance = True
    assert not (await rolled_out(tiny_config, (1, 1, 1, 0.999))).group.is_zero_variance


async def test_the_filter_looks_at_the_shaped_rewards(tiny_config):
    """Lengths may tell answers of one reward apart."""
    tiny_config.filter.zero_variance, tiny_config.shaping.length_penalty = True, 0.1
    assert not (await rolled_out(tiny_config, (1, 1, 1, 1), lengths=(2, 2, 2, 3))).group.is_zero_variance
    with pytest.raises(ZeroVarianceGroup):
        await rolled_out(tiny_config, (1, 1, 1, 1), lengths=(2, 2, 2, 2))


async def test_a_group_whose_only_advantages_are_masked_has_nothing_to_learn_from(tiny_config):
    tiny_config.filter.zero_variance, tiny_config.shaping.overlong = True, "mask"
    with pytest.raises(ZeroVarianceGroup) as caught:
        await rolled_out(tiny_config, (1, 0, 1, 0), lengths=(8,) * 4, cut=(0, 1, 2, 3))
    assert any(caught.value.rollout.group.advantages)
    assert not (await rolled_out(tiny_config, (1, 0, 1, 0), lengths=(8,) * 4, cut=(0, 1, 2))).group.is_zero_variance


@pytest.mark.parametrize(
    ("advantages", "masked", "signal"),
    [
        ((1.5, 0.0, -1.5), (), True),
        ((1.5, 0.0, -1.5), (0,), True),
        ((1.5, 0.0, -1.5), (0, 2), False),
        ((1.5, 0.0, -1.5), (1,), True),
        ((0.0, 0.0, 0.0), (), False),
    ],
)
def test_a_group_is_zero_variance_unless_an_advantage_is_neither_zero_nor_masked(advantages, masked, signal):
    assert Group(PROMPT, [], None, (0.0,) * 3, advantages, 0, masked).is_zero_variance is not signal


async def test_advantages_of_ones_own_are_named_by_module_and_function(tiny_config):
    tiny_config.loss.advantages = "tests.fakes:above_half"
    finished = await rolled_out(tiny_config, (1, 0, 0.5, 1))
    assert finished.group.advantages == (0.5, -0.5, 0.0, 0.5)
    tiny_config.filter.zero_variance = True
    assert (await rolled_out(tiny_config, (1, 1, 1, 1))).group.advantages == (0.5,) * 4  # theirs to say what is none
    with pytest.raises(ZeroVarianceGroup):
        await rolled_out(tiny_config, (0.5, 0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("magic", r"^loss\.advantages: 'magic' is not one of group_norm, .*, nor of the form module:function$"),
        ("tests.fakes:magic", r"^loss\.advantages: can't import 'tests\.fakes:magic'"),
    ],
)
def test_advantages_that_are_not_there_name_the_key(tiny_config, name, message):
    tiny_config.loss.advantages = name
    with pytest.raises(ConfigError, match=message):
        advantage_function(tiny_config.loss)


@pytest.mark.parametrize(
    ("every", "tokens", "detail"), [(7, True, "tokens"), (7, False, "texts"), (2, True, "rewards"), (1, True, "tokens")]
)
async def test_texts_and_tokens_are_asked_for_only_of_sampled_groups(tiny_config, every, tokens, detail):
    tiny_config.observe.rollouts_every, tiny_config.observe.rollouts_tokens = every, tokens
    asked = []

    class Reward(RewardBy):
        async def score(self, prompt, completions, detail):
            asked.append(detail)
            return await super().score(prompt, completions, detail)

    await rolled_out(tiny_config, [1.0, 0.0], reward=Reward)
    assert asked == [detail]  # of the prompt of serial 7
