"""What every engine promises of episodes of several turns, as test_engine_contract.py does of single ones."""

import asyncio
import itertools
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio
from contract_helpers import EOS, opened, tied_llama
from engine_helpers import begin, greedy, greedy_tokens, prompt_of
from episode_helpers import assert_same, logprobs_in_flight, logprobs_recomputed, play, play_on

from grpo.config.algorithm import EnvironmentConfig
from grpo.engines.base import Limits
from grpo.environments import Message, Opening, Reply
from grpo.environments.calls import UserCalls
from grpo.environments.player import Player
from grpo.environments.renderers import PlainRenderer
from grpo.learner.batch import make_sample
from grpo.learner.logprobs import TokenLogprobs
from grpo.models.tiny import character_tokenizer
from grpo.types import Problem, Prompt, SamplingParams

LIMITS = Limits(max_prompt_tokens=64, max_completion_tokens=440, max_sequences=16, several_turns=True)
SAMPLED = SamplingParams(n=3, max_tokens=24, seed=3, keep_prefix=True)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["in_flight", "in_flight_recompute", "drain"])
async def served(request, tmp_path_factory):
    kind = request.config.getoption("--engine")
    async with opened(kind, tied_llama, request.param, LIMITS, tmp_path_factory.mktemp("served")) as bench:
        yield bench


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def anew(request, tmp_path_factory):
    """An engine that reads every prompt from its beginning, with the weights of seed 1 unless a test loads others."""
    kind, folder = request.config.getoption("--engine"), tmp_path_factory.mktemp("anew")
    async with opened(kind, tied_llama, "drain", LIMITS, folder, reuse=False) as bench:
        yield bench


@pytest_asyncio.fixture(loop_scope="module")
async def bench(served, anew):
    async with asyncio.timeout(600):
        await served.load(seed=1)
        await anew.load(seed=1)
        yield served


# --- what is reused changes nothing ---


@pytest.mark.parametrize(
    "params",
    [SAMPLED, replace(SAMPLED, temperature=0.7, top_k=20), replace(SAMPLED, temperature=0.0)],
    ids=["sampled", "filtered", "greedy"],  # not by top_p: rounding may let one more token pass it
)
async def test_episodes_are_as_if_every_turn_read_its_prompt_anew(bench, anew, params):
    groups = [(prompt_of(length), replace(params, seed=length)) for length in (3, 64)]
    together = await asyncio.gather(*(play(bench.engine, *group, turns=8) for group in groups))
    for group, episodes in zip(groups, together, strict=True):
        assert [len(episode.turns) for episode in episodes] == [8] * 3
        assert_same(episodes, await play(anew.engine, *group, turns=8), atol=1e-4)


async def test_a_greedy_turn_says_the_likeliest_after_all_that_was_said(bench):
    [episode] = await play(bench.engine, prompt_of(40), greedy(24, keep_prefix=True), turns=4)
    for start in episode.turns:
        said = [token for place, token in enumerate(episode.tokens) if place in episode.sampled and place >= start]
        prompt = [*episode.opening, *episode.tokens[:start]]
        expected = greedy_tokens(bench.model(seed=1), prompt, 8)
        assert said[:8] == expected[: len(said[:8])]


# --- sampling noise ---


async def tokens_of(bench, params, prompt=None):
    group = await bench.engine.generate(prompt_of(50) if prompt is None else prompt, params)
    return [completion.token_ids.tolist() for completion in group]


LATER = replace(SAMPLED, n=1, first_sample=2, first_token=17)


@pytest.mark.parametrize("change", [{"keep_prefix": False}, {"max_tokens": 12}, {"first_sample": 1, "n": 3}], ids=str)
async def test_nothing_else_about_a_turn_changes_what_is_said(bench, change):
    [said] = await tokens_of(bench, LATER)
    other = await tokens_of(bench, replace(LATER, **change))
    same = other[LATER.first_sample - change.get("first_sample", LATER.first_sample)]
    assert same == said[: change.get("max_tokens", len(said))]


async def test_whoever_else_plays_changes_nothing_of_what_is_said(bench):
    alone = await tokens_of(bench, LATER)
    others = [tokens_of(bench, replace(SAMPLED, seed=seed), prompt_of(60, seed)) for seed in range(6)]
    *_, in_company = await asyncio.gather(*others, tokens_of(bench, LATER))
    assert in_company == alone


@pytest.mark.parametrize("change", [{"seed": 4}, {"first_sample": 1}, {"first_token": 16}], ids=str)
async def test_every_turn_of_every_episode_has_noise_of_its_own(bench, change):
    assert await tokens_of(bench, LATER) != await tokens_of(bench, replace(LATER, **change))


# --- new weights ---


def assert_of_their_versions(bench, episode, atol=1e-4):
    """The log-probabilities of all tokens, by the weights that they name."""
    if bench.weight_update == "in_flight":
        expected = logprobs_in_flight(bench.used, episode, bench.block)
    else:
        expected = logprobs_recomputed(bench.used, episode)
    np.testing.assert_allclose(episode.logprobs, expected, rtol=0, atol=atol)
    assert bench.weight_update != "drain" or all(len(runs) == 1 for runs in episode.versions_by_turn)
    assert episode.versions == sorted(episode.versions)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
async def test_after_an_update_the_prefix_is_that_of_the_old_weights_in_flight_alone(bench, anew, temperature):
    opening, old = prompt_of(50), bench.engine.version
    params = replace(SAMPLED, max_tokens=40, temperature=temperature)
    episodes = await play(bench.engine, opening, params, turns=1)
    await bench.load(seed=2)
    await anew.load(seed=2)
    for sample, episode in enumerate(episodes):
        later = replace(params, first_sample=sample)
        first = len(episode.sampled)
        await play_on(bench.engine, episode, later, turns=1)
        assert [[version for version, _ in runs] for runs in episode.versions_by_turn] == [[old], [old + 1]]
        assert_of_their_versions(bench, episode)
        if bench.weight_update == "in_flight":
            assert np.abs(np.subtract(episode.logprobs, logprobs_recomputed(bench.used, episode))).max() > 0.01
            continue
        prompt = [*opening, *episode.tokens[: episode.turns[1]]]
        [fresh] = await anew.engine.generate(np.array(prompt), replace(later, n=1, first_token=first))
        assert fresh.token_ids.tolist() == episode.tokens[episode.turns[1] :]
        np.testing.assert_allclose(episode.logprobs[first:], fresh.logprobs, rtol=0, atol=1e-4)


async def test_turns_and_updates_go_on_side_by_side(bench):
    """Neither waits for more than what the other has begun: updates come all the time, and so do turns."""
    updates, mixed, seeds = 0, bench.weight_update == "drain", itertools.count()

    async def play_all_the_time():
        nonlocal mixed
        played = []
        while updates < 6 or not mixed:
            seed = next(seeds)
            params = replace(SAMPLED, n=1, seed=seed, max_tokens=60)
            # Replies of one length: where turns join together, the torch engine reads as many tokens for each of them.
            [episode] = await play(bench.engine, prompt_of(40, seed), params, longest_reply=1)
            mixed = mixed or any(len(runs) > 1 for runs in episode.versions_by_turn)
            played.append(episode)
        return played

    playing = asyncio.gather(*(play_all_the_time() for _ in range(6)))
    while not playing.done():
        await bench.load(seed=updates % 3 + 1)
        updates += 1
    for episode in itertools.chain(*await playing):
        assert_of_their_versions(bench, episode)


async def test_a_turn_that_an_update_meets_ends_with_the_old_weights_when_it_drains(bench):
    old, params = bench.engine.version, replace(SAMPLED, n=1, first_token=24)
    weights = bench.prepare(seed=2)
    running = await begin(bench.engine.generate(prompt_of(60), replace(params, max_tokens=300)))
    await bench.engine.update_weights(weights)
    [later] = await bench.engine.generate(prompt_of(60), params)
    [met] = await running
    assert later.versions == ((old + 1, later.sampled_count),)
    assert {version for version, _ in met.versions} <= {old, old + 1}
    assert bench.weight_update != "drain" or met.versions == ((old, met.sampled_count),)


# --- limits ---


@pytest.mark.parametrize("room", [1, 20])
async def test_a_turn_may_fill_the_context_and_no_more(bench, room):
    prompt = prompt_of(LIMITS.context - room)
    [turn] = await bench.engine.generate(prompt, greedy(room, first_token=100))
    assert turn.token_ids.tolist() == greedy_tokens(bench.model(seed=1), prompt, room)
    assert turn.finish_reason == "length"
    with pytest.raises(ValueError, match=f"max_tokens={room + 1} must be 1 to {room}"):
        await bench.engine.generate(prompt, greedy(room + 1, first_token=100))


# --- the player ---


class Talk:
    """Says a few words to whatever it is told, `turns` times."""

    def __init__(self, opening, turns):
        self._opening, self._turns, self._said = opening, turns, 0

    async def begin(self):
        return Opening((Message("user", self._opening),))

    async def reply(self, said):
        self._said += 1
        return Reply((Message("user", "go on" * (self._said % 3)),), done=self._said == self._turns)


async def play_group(bench, opening, turns, params, **settings):
    """Have the player play a group, and compare all of its log-probabilities with those that the trainer computes."""
    tokenizer, calls = character_tokenizer(), UserCalls(threads=1)
    renderer, config = PlainRenderer(tokenizer, (EOS,)), EnvironmentConfig(**settings)
    player = Player(lambda problem, seed: Talk(opening, turns), renderer, config, calls, max_prompt_tokens=64)
    prompt = Prompt(3, Problem(opening, "!"), np.array(tokenizer.encode(opening)))
    opening_ids, episodes = await player.play(prompt, params, bench.engine.generate)
    calls.close()
    assert opening_ids.tolist() == prompt.token_ids.tolist()
    samples = [make_sample(opening_ids, episode.completion) for episode in episodes]
    expected = TokenLogprobs(bench.model(seed=1), params.temperature).of_samples(samples, max_tokens=2000)
    for episode, logprobs in zip(episodes, expected, strict=True):
        np.testing.assert_allclose(episode.completion.logprobs, logprobs, rtol=0, atol=1e-4)
    return episodes


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_the_trainer_finds_the_log_probabilities_of_eight_turns(bench, temperature):
    params = SamplingParams(n=4, temperature=temperature, max_tokens=440, seed=3)
    episodes = await play_group(bench, "begin:", 8, params, max_turn_tokens=20)
    assert all((episode.report.turns, episode.report.ended_by) == (8, "done") for episode in episodes)
    assert sum(episode.completion.sampled_count for episode in episodes) > 400
    assert len({tuple(episode.completion.token_ids.tolist()) for episode in episodes}) == 4


async def test_an_episode_may_fill_the_context_in_the_middle_of_a_turn(bench):
    params = SamplingParams(n=4, max_tokens=LIMITS.max_completion_tokens, seed=5)
    episodes = await play_group(bench, "begin:" + 58 * "-", 100, params, max_turns=100, max_turn_tokens=50)
    assert {(episode.report.ended_by, episode.completion.finish_reason) for episode in episodes} == {
        ("tokens", "length")
    }
    lengths = [len(episode.completion.token_ids) for episode in episodes]  # some end where no reply would fit
    assert max(lengths) == params.max_tokens
    assert min(lengths) > params.max_tokens - len("go on" * 2) - 1
