"""The real loop on episodes of several turns: scripted generators, or tiny torch models."""

import asyncio
import json

import pytest

from grpo.config.algorithm import TaskConfig
from grpo.driver.loop import train_loop
from grpo.errors import DataError, EnvironmentFailed, EnvironmentInvalid, EnvironmentTimeout
from grpo.services.local import launch_local
from tests.environments.games import Bisecting
from tests.fakes import CountingTrainer

ERRORS = {error.reason: error for error in (EnvironmentFailed, EnvironmentTimeout, EnvironmentInvalid)}


@pytest.fixture(autouse=True)
async def without_debugging():
    """Debug mode notes the stack of every future: most of the time of whole runs."""
    asyncio.get_running_loop().set_debug(False)


@pytest.fixture
def config(tiny_config):
    """Guessing games, 8 steps of four groups of two."""
    tiny_config.task = TaskConfig("grpo.tasks.guess:Guess", {"min_numbers": 3, "max_numbers": 9})
    tiny_config.rollout.max_prompt_tokens = 8
    tiny_config.rollout.max_completion_tokens = 32
    tiny_config.environment.max_turn_tokens = 4
    tiny_config.rollout.group_size = 2
    tiny_config.rollout.concurrency = 16
    tiny_config.trainer.groups_per_step = 4
    tiny_config.trainer.max_steps = 8
    return tiny_config


def failing(config, failure, every=1):
    config.task = TaskConfig("tests.environments.games:FailingGuess", {"failure": failure, "every": every})


async def run_loop(config, make_recorder, trainer=None, generator=Bisecting):
    """Run to the end with a counting trainer and generators that win; returns the recorder."""
    recorder = make_recorder(config)
    fakes = {"trainer": trainer or CountingTrainer(), "generator": generator, "evaluator": generator}
    async with launch_local(config, recorder.failures, fakes) as services:
        await train_loop(services, config, recorder, asyncio.Event())
    recorder.run_dir.close()
    return recorder


def lines(recorder, name):
    return [json.loads(line) for line in (recorder.run_dir.path / name).read_text().splitlines()]


def games(recorder):
    """Completions by the serial of their prompt."""
    return {line["prompt_serial"]: line["completions"] for line in lines(recorder, "rollouts.jsonl")}


async def test_episodes_are_trained_on_and_reported(config, make_recorder):
    trainer = CountingTrainer()
    recorder = await run_loop(config, make_recorder, trainer)
    assert recorder.pacer.trained == 32
    steps = lines(recorder, "metrics.jsonl")
    steps = [step for step in steps if "rollout/reward_mean" in step]  # groups were finished since the last one
    assert {step["rollout/reward_mean"] for step in steps} == {1.0}
    assert all(1 <= step["episode/turns"] <= 4 for step in steps)
    assert all(step["episode/given_tokens"] == pytest.approx(step["episode/turns"] - 1) for step in steps)
    assert {step[f"episode/ended_by_{limit}"] for step in steps for limit in ("tokens", "timeout", "turns")} == {0.0}
    for group in (group for batch in trainer.batches for group in batch.groups):
        assert all(sum(turn.sampled for turn in c.turns) == c.sampled_count for c in group.completions)


@pytest.mark.parametrize("max_policy_age", [0, 1, 3])
async def test_the_age_of_the_oldest_token_stays_within_the_bound(config, make_recorder, max_policy_age):
    config.buffer.max_policy_age = max_policy_age
    trainer = CountingTrainer()
    await run_loop(config, make_recorder, trainer)
    assert max(trainer.ages) <= max_policy_age
    for group in (group for batch in trainer.batches for group in batch.groups):
        assert group.oldest_version == min(version for c in group.completions for version, _ in c.versions)


@pytest.mark.parametrize("failure", ERRORS)
async def test_whatever_an_environment_does_the_run_ends_with_the_kind_of_it_or_counts_it(
    config, make_recorder, failure
):
    failing(config, failure)
    config.rollout.concurrency = 2
    with pytest.raises(ERRORS[failure]) as caught:
        await run_loop(config, make_recorder)
    assert type(caught.value) is ERRORS[failure]

    config.environment.on_error, config.recovery.max_dropped_groups = "drop", 3
    recorder = make_recorder(config)
    fakes = {"trainer": CountingTrainer(), "generator": Bisecting}
    async with launch_local(config, recorder.failures, fakes) as services:
        with pytest.raises(DataError, match=r"recovery.max_dropped_groups=3 between two train steps"):
            await train_loop(services, config, recorder, asyncio.Event())
    assert set(recorder.pacer.dropped) == {failure}


@pytest.mark.parametrize("failure", ERRORS)
async def test_groups_whose_environment_fails_are_dropped_and_the_run_goes_on(config, make_recorder, failure):
    failing(config, failure, every=4)
    config.environment.on_error = "drop"
    recorder = await run_loop(config, make_recorder)
    pacer = recorder.pacer
    assert pacer.trained == 32
    assert pacer.dropped[failure] >= 8
    assert pacer.admitted == pacer.trained + pacer.dropped.total() + pacer.outstanding
    assert {line["reason"] for line in lines(recorder, "ledger.jsonl") if "dropped" in line} == {failure}
    assert recorder.failures.restarts == {}


async def test_the_setting_of_rewards_says_nothing_about_environments(config, make_recorder):
    failing(config, "environment_error")
    config.reward.on_error = "drop"
    with pytest.raises(EnvironmentFailed):
        await run_loop(config, make_recorder)


@pytest.mark.parametrize("replicas", [1, 0], ids=["evaluator", "borrowed"])
async def test_an_evaluation_plays_its_episodes_with_one_version(config, make_recorder, replicas):
    """Else it would raise MixedVersionsError."""
    config.eval.prompts, config.eval.every, config.eval.samples, config.eval.replicas = 6, 4, 2, replicas
    recorder = await run_loop(config, make_recorder)
    reports = recorder.history.evaluations
    assert (reports[0].step, reports[-1].step) == (0, 8)
    assert {(report.prompts, report.prompts_left_out, report.reward_mean) for report in reports} == {(6, 0, 1.0)}


async def test_prompts_whose_environment_fails_are_left_out_of_an_evaluation(config, make_recorder):
    failing(config, "environment_error", every=2)
    config.environment.on_error = "drop"
    config.eval.prompts, config.eval.every, config.eval.samples = 6, 0, 2
    recorder = await run_loop(config, make_recorder)
    assert {(each.prompts, each.prompts_left_out) for each in recorder.history.evaluations} == {(3, 3)}


@pytest.fixture
def trained(config):
    """A real model, engine and trainer."""
    config.task = TaskConfig("tests.fake_environments:Words")
    config.environment.max_turn_tokens = 2  # a random model rarely ends its turns
    config.rollout.group_size = 8  # whose rewards are never all equal
    config.trainer.groups_per_step, config.trainer.max_steps = 2, 3
    config.buffer.max_policy_age = 0
    return config


async def run_real(config, make_recorder):
    recorder = make_recorder(config)
    async with launch_local(config, recorder.failures) as services:
        await train_loop(services, config, recorder, asyncio.Event())
    recorder.run_dir.close()
    return recorder


async def test_the_trainer_finds_the_logprobs_of_the_sampler_in_every_turn(trained, make_recorder):
    steps = lines(await run_real(trained, make_recorder), "metrics.jsonl")
    assert all(step["mismatch/logprob_abs_diff_same_version"] < 1e-4 for step in steps)
    assert all(step["episode/turns"] > 1 for step in steps)


async def test_what_is_sampled_depends_on_the_seed_alone_and_not_on_who_else_plays(trained, make_recorder):
    trained.trainer.groups_per_step, trained.trainer.max_steps = 8, 1
    found = []
    for concurrency in (1, 32):
        trained.rollout.concurrency = concurrency
        recorder = await run_real(trained, make_recorder)
        found.append({serial: game for serial, game in games(recorder).items() if serial < 8})
    assert len(found[0]) == 8
    assert found[0] == found[1]
    texts = [text for game in found[0].values() for text in game]
    assert len(set(texts)) > len(texts) / 2
