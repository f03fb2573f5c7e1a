"""The actor that plays episodes, alone and as a service whose processes die."""

import asyncio
import json
from contextlib import asynccontextmanager

import numpy as np
import pytest

from grpo.actors.environment import EnvironmentHost
from grpo.config.algorithm import TaskConfig
from grpo.driver.rollout import sample_group
from grpo.errors import ActorDied, ConfigError, EnvironmentInvalid, EnvironmentTimeout, LeaseLost
from grpo.services.failures import Failures
from grpo.services.local import LocalEndpoint, launch_local
from grpo.telemetry.recording import Recording, record_in
from grpo.types import Problem, Prompt, SamplingParams
from tests.environments.games import RELEASE, TOKENIZER, Bisecting, CountedGuess
from tests.fakes import CountingTrainer

PROMPT = Prompt(7, Problem("23:", "17"), np.array(TOKENIZER.encode("23:")))
PARAMS = SamplingParams(n=2, max_tokens=32)
GAME = ["12", ">", "18", "<", "15", ">", "16", ">", "17"]


@pytest.fixture
def config(config):
    config.task = TaskConfig("tests.environments.games:CountedGuess")
    config.rollout.max_completion_tokens = 32
    config.recovery.health_interval_s = 0.05
    CountedGuess.made = CountedGuess.closed = 0
    return config


@asynccontextmanager
async def host_of(config):
    host = EnvironmentHost(config)
    await host.setup()
    try:
        yield host
    finally:
        RELEASE.set()
        await host.close()
        RELEASE.clear()


@asynccontextmanager
async def launched(config, *generators, failures=None):
    """The services with these generators, each the process that replaces the one before it."""
    left = list(generators)
    fakes = {"generator": lambda: left.pop(0), "trainer": CountingTrainer()}
    async with launch_local(config, failures or Failures(config.recovery), fakes) as services:
        try:
            yield services
        finally:
            RELEASE.set()
    RELEASE.clear()


async def until(condition):
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def text_of(completion):
    return TOKENIZER.decode(completion.token_ids, skip_special_tokens=True)


async def test_a_group_is_played_and_reported(config):
    async with host_of(config) as host:
        completions, report = await host.play(PROMPT, PARAMS, LocalEndpoint(Bisecting()))
    assert [text_of(completion) for completion in completions] == ["".join(GAME)] * 2
    assert [(turn.sampled, turn.given) for turn in completions[0].turns] == [(3, 1)] * 4 + [(3, 0)]
    assert report.opening.tolist() == TOKENIZER.encode("23:")
    assert (report.scores.rewards, report.scores.parts) == ((1.0, 1.0), {"environment": (1.0, 1.0)})
    assert (report.generation.lengths, report.generation.truncated) == ((15, 15), (False, False))
    assert [(e.turns, e.given, e.ended_by) for e in report.generation.episodes] == [(5, 4, "done")] * 2
    assert (CountedGuess.made, CountedGuess.closed) == (2, 2)


@pytest.mark.parametrize("detail", ["rewards", "texts", "tokens"])
async def test_texts_and_tokens_are_given_when_they_are_asked_for(config, detail):
    async with host_of(config) as host:
        _, report = await host.play(PROMPT, PARAMS, LocalEndpoint(Bisecting()), detail)
    texts, tokens = report.scores.texts, report.scores.tokens
    assert texts == (() if detail == "rewards" else ("12\n| >\n18\n| <\n15\n| >\n16\n| >\n17",) * 2)
    if detail != "tokens":
        assert tokens == ""
        return
    first, second = json.loads(tokens)
    assert first == second
    assert first[:5] == [["1", -0.5, 0], ["2", -0.5, 0], ["<eos>", -0.5, 0], [">", None, None], ["1", -0.5, 0]]


async def test_the_oldest_and_newest_version_are_over_all_turns(config):
    class Aging(Bisecting):
        async def sample(self, prompt_ids, params):
            self.version += 1
            return await super().sample(prompt_ids, params)

    async with host_of(config) as host:
        _, report = await host.play(PROMPT, SamplingParams(max_tokens=32), LocalEndpoint(Aging()))
    assert (report.generation.oldest_version, report.generation.newest_version) == (1, 5)


async def test_an_opening_that_is_too_long_names_the_key(config):
    config.task = TaskConfig("tests.environments.games:FailingGuess", {"failure": "too_long"})
    async with host_of(config) as host:
        with pytest.raises(EnvironmentInvalid, match=r"begins with 99 tokens.* rollout\.max_prompt_tokens=8$"):
            await host.play(PROMPT, PARAMS, LocalEndpoint(Bisecting()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "tests.fakes:Nothing"}, r"^task\.target: "),
        ({"template": "chat"}, r"^task\.template: the model has no chat template"),
        ({"args": {"colour": 1}}, r"^task\.args: "),
    ],
)
async def test_what_can_not_be_played_is_known_when_the_actor_starts(config, settings, message):
    for key, value in settings.items():
        setattr(config.task, key, value)
    with pytest.raises(ConfigError, match=message):
        await EnvironmentHost(config).setup()


async def test_tools_are_refused_beside_an_environment(config):
    config.environment.tools = ["tests.environments.tools:calculate"]
    with pytest.raises(ConfigError, match=r"^environment\.tools: .* has an environment of its own"):
        await EnvironmentHost(config).setup()


async def test_the_death_of_the_generator_is_not_the_death_of_the_actor(config):
    generator = Bisecting(stays_at=2)
    lease = LocalEndpoint(generator, "generator-1")
    async with host_of(config) as host:
        playing = asyncio.ensure_future(host.play(PROMPT, PARAMS, lease))
        await generator.waits.wait()
        lease.kill()
        with pytest.raises(LeaseLost, match="generator-1 died"):
            await playing
        assert (CountedGuess.made, CountedGuess.closed) == (2, 2)
        await host.ping()


async def test_a_thread_that_hangs_costs_the_process(config):
    config.task.target, config.environment.timeout_s = "tests.environments.games:HangingGuess", 0.5
    async with host_of(config) as host:
        with pytest.raises(EnvironmentTimeout):
            await host.play(PROMPT, PARAMS, LocalEndpoint(Bisecting()))
        await host.ping()  # the thread has some time to return
        await until(lambda: host._calls.hanging(0.5))
        with pytest.raises(ActorDied, match="user code hangs in a thread"):
            await host.ping()
        RELEASE.set()
        await until(lambda: not host._calls.hanging(0))
        await host.ping()


async def test_an_async_method_that_blocks_the_event_loop_is_named(config):
    config.task.target, config.driver.slow_callback_ms = "tests.environments.games:BlockingGuess", 50.0
    record_in(recording := Recording())
    async with host_of(config) as host:
        await host.play(PROMPT, PARAMS, LocalEndpoint(Bisecting()))
        await asyncio.sleep(0)
    batch = recording.drain(keep_recording=False)
    (warning,) = [each for each in batch.warnings if "in reply, games.py" in each]
    assert "blocked for more than 50 ms (driver.slow_callback_ms)" in warning
    metrics = batch.metrics.drain()
    assert metrics["environment/slow_callbacks/sum"] >= 1
    assert metrics["environment/loop_lag_ms/p99"] > 150


# --- as a service ---


async def test_a_group_whose_generator_dies_is_played_again_with_another_one(config):
    dying, next_one = Bisecting(stays_at=2), Bisecting()
    failures = Failures(config.recovery)
    async with launched(config, dying, next_one, failures=failures) as services:
        playing = asyncio.ensure_future(sample_group(PROMPT, PARAMS, services, "rewards"))
        await dying.waits.wait()
        services.generator.service.replicas[0].endpoint.kill()
        sampled = await playing
        stats = services.generator.replica_stats()["generator"], services.environment.replica_stats()["environment"]
    assert next_one.prompts[0] == "23:"  # from the beginning
    assert [text_of(completion) for completion in sampled.completions] == ["".join(GAME)] * 2
    assert sampled.scores.rewards == (1.0, 1.0)
    assert failures.restarts == {"generator": 1}
    assert [(each["failures"], each["in_flight"]) for each in stats] == [(1, 0), (0, 0)]


async def test_another_generator_that_is_up_takes_the_group_at_once(config):
    config.generator.replicas = 2
    generators = [Bisecting(stays_at=2), Bisecting(), Bisecting()]
    async with launched(config, *generators) as services:
        playing = asyncio.ensure_future(sample_group(PROMPT, PARAMS, services, "rewards"))
        await generators[0].waits.wait()
        assert [replica.in_flight for replica in services.generator.service.replicas] == [1, 0]
        services.generator.service.replicas[0].endpoint.kill()
        assert (await playing).scores.rewards == (1.0, 1.0)
    assert generators[1].prompts[0] == "23:"


async def test_a_group_whose_environment_actor_dies_is_played_again(config):
    class StaysOnce(Bisecting):
        async def sample(self, prompt_ids, params):
            if self.waits.is_set():
                self._stays_at = None
            return await super().sample(prompt_ids, params)

    generator, failures = StaysOnce(stays_at=2), Failures(config.recovery)
    async with launched(config, generator, failures=failures) as services:
        playing = asyncio.ensure_future(sample_group(PROMPT, PARAMS, services, "rewards"))
        await generator.waits.wait()
        services.environment.service.replicas[0].endpoint.kill()
        assert (await playing).scores.rewards == (1.0, 1.0)
        assert services.generator.replica_stats()["generator"]["failures"] == 0
    assert failures.restarts == {"environment": 1}
    assert CountedGuess.made == 4


async def test_an_actor_whose_thread_hangs_is_replaced(config):
    config.task.target, config.environment.timeout_s = "tests.environments.games:HangingGuess", 0.5
    failures = Failures(config.recovery)
    async with launched(config, Bisecting(), failures=failures) as services:
        with pytest.raises(EnvironmentTimeout):
            await sample_group(PROMPT, PARAMS, services, "rewards")
        await until(lambda: failures.deaths and failures.deaths[0].back_s is not None)
        assert failures.deaths[0].actor == "environment"
        assert "user code hangs in a thread" in failures.deaths[0].error
        RELEASE.set()
        services.environment.service.replicas[0].endpoint.actor._player.config.timeout_s = 600.0
        assert (await sample_group(PROMPT, PARAMS, services, "rewards")).scores.rewards == (1.0, 1.0)
