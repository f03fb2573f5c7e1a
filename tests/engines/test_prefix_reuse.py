"""Turns of an episode: the same tokens as if it had been sampled in one go, whether its prefix was kept or not."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_helpers import (
    VOCABULARY,
    at_forward,
    begin,
    begin_update,
    forward_shapes,
    full_logits,
    full_logprobs,
    greedy,
    greedy_tokens,
    grouped_query_llama,
    llama,
    logprobs_over_kept_cache,
    prompt_of,
    serving,
    sliding_mistral,
    weights_of,
)
from episode_helpers import (
    CONTEXT,
    EVERY_MODEL,
    LIMITS,
    PARAMS,
    assert_as_if_sampled_in_one_go,
    assert_same,
    play,
    reply_of,
)

from grpo.config.algorithm import EnvironmentConfig
from grpo.engines.torch import batch as batch_module
from grpo.engines.torch import kv_cache
from grpo.engines.torch.kv_cache import KVGrid, prefill
from grpo.engines.torch.prefix_cache import PrefixCache
from grpo.environments.base import Message, Opening, Reply
from grpo.environments.calls import UserCalls
from grpo.environments.player import Player
from grpo.environments.renderers import PlainRenderer
from grpo.models.tiny import character_tokenizer
from grpo.telemetry.recording import Recording, record_in
from grpo.types import Problem, Prompt, SamplingParams

# --- the contract ---


@EVERY_MODEL
@pytest.mark.parametrize("prefix_cache_mb", [0, 64])
async def test_turns_are_sampled_as_one_long_completion_into_which_tokens_are_given(make_model, prefix_cache_mb):
    model, params = make_model(), replace(PARAMS, n=4, max_tokens=5)
    async with serving(model, **LIMITS, prefix_cache_mb=prefix_cache_mb) as engine:
        episodes = await play(engine, prompt_of(11), params)
    assert [len(episode.sampled) for episode in episodes] == [20, 23, 26, 29]
    assert_as_if_sampled_in_one_go(model, episodes, params)


@EVERY_MODEL
async def test_reuse_changes_no_token_and_no_logprob(make_model):
    model, params = make_model(), replace(PARAMS, n=4, max_tokens=5)
    async with serving(model, **LIMITS, prefix_cache_mb=0) as engine:
        without = await play(engine, prompt_of(11), params)
    async with serving(model, **LIMITS) as engine:
        assert_same(await play(engine, prompt_of(11), params), without)


async def test_a_turn_reads_only_what_is_new():
    model = llama()
    async with serving(model, **LIMITS) as engine:
        [episode] = await play(engine, prompt_of(11), replace(PARAMS, max_tokens=5), turns=1)
        shapes = forward_shapes(model)
        reply = reply_of(episode, 0)
        await engine.generate(episode.give(reply), replace(PARAMS, max_tokens=3, first_token=5))
    assert shapes == [(1, 1 + len(reply)), (1, 1), (1, 1)]  # the last sampled token had not been read yet


@pytest.mark.parametrize("prefix_cache_mb", [64, 0])
async def test_tokens_of_prompts_are_counted_as_read_or_kept(prefix_cache_mb):
    recording = Recording()
    record_in(recording)
    async with serving(llama(), **LIMITS, prefix_cache_mb=prefix_cache_mb) as engine:
        episodes = await play(engine, prompt_of(11), replace(PARAMS, n=4, max_tokens=5), turns=1)
        counts = recording.metrics.drain()
        assert counts["generator/prompt_tokens_read/sum"] == 11  # once for the group
        assert counts["generator/prompt_tokens_kept/sum"] == 0
        replies = [reply_of(episode, i) for i, episode in enumerate(episodes)]
        turns = [replace(PARAMS, max_tokens=3, first_token=5, first_sample=i) for i in range(4)]
        await asyncio.gather(
            *(
                engine.generate(episode.give(reply), turn)
                for episode, reply, turn in zip(episodes, replies, turns, strict=True)
            )
        )
    kept = 4 * (11 + 4) if prefix_cache_mb else 0  # the last sampled token had not been read yet
    counts = recording.metrics.drain()
    assert counts["generator/prompt_tokens_kept/sum"] == kept
    assert counts["generator/prompt_tokens_read/sum"] == 4 * 16 + sum(map(len, replies)) - kept


# --- in company ---


@pytest.mark.parametrize("make_model", [grouped_query_llama, sliding_mistral])
async def test_episodes_of_many_lengths_join_in_one_step_while_rows_move_and_the_grid_does(make_model, monkeypatch):
    monkeypatch.setattr(batch_module, "_SLACK_COLUMNS", 2)
    monkeypatch.setattr(batch_module, "_SMALL_PREFILL", 4)
    monkeypatch.setattr(kv_cache, "_PREFILL_TOKENS", 150)  # so that some steps need several passes
    model = make_model()
    groups = [(prompt_of(2 + 3 * i, i), replace(PARAMS, seed=i, n=3, max_tokens=3 + 2 * i)) for i in range(4)]

    async def played(**settings):
        together = asyncio.Barrier(12)
        async with serving(model, **LIMITS, **settings) as engine:
            return await asyncio.gather(*(play(engine, *group, between=together.wait) for group in groups))

    without = await played(max_rows=12, prefix_cache_mb=0)
    shapes = forward_shapes(model)
    for episodes, others in zip(await played(max_rows=5), without, strict=True):
        assert_same(episodes, others)
    assert any(rows > 1 and 1 < new < 16 for rows, new in shapes)
    assert sum(rows * new for rows, new in shapes) < sum(len(e.tokens) + 60 for group in without for e in group)


def test_sequences_with_fewer_new_tokens_than_others_are_computed_right(monkeypatch):
    """Also one that is shorter than the new tokens of another."""
    model = sliding_mistral()
    sequences = [torch.tensor(prompt_of(length)) for length in (3, 9, 20, 14)]
    whole = [prefix.logits_V for prefix in prefill(model, sequences, version=0)]
    grid, kept = KVGrid(max_rows=1, max_columns=20), []
    for sequence, known in zip(sequences, (2, 8, 11, 12), strict=True):
        grid.rows, grid.end = 1, 20
        [prefix] = prefill(model, [sequence[:known]], version=0)
        grid.store(prefix, slice(0, 1))
        kept.append(grid.copy(0, 20 - known))
    for prefix, logits_V in zip(prefill(model, sequences, 0, kept), whole, strict=True):
        torch.testing.assert_close(prefix.logits_V, logits_V, rtol=0, atol=1e-5)


async def test_an_episode_as_long_as_the_context_joins_short_rows():
    model, running = llama(), []
    async with serving(model, **LIMITS, max_rows=4) as engine:

        async def join():
            running.append(await begin(engine.generate(prompt_of(CONTEXT - 1), greedy(1, first_token=50))))
            running.append(await begin(engine.generate(prompt_of(CONTEXT - 9), greedy(9, first_token=50))))

        at_forward(model, 5, join)
        early = await asyncio.gather(
            *(engine.generate(prompt_of(n), greedy(count)) for n, count in ((4, 60), (16, 104)))
        )
        completions = [*early, *await asyncio.gather(*running)]
        assert engine._batch._kv.max_columns == CONTEXT + batch_module._SLACK_COLUMNS
    for length, [completion] in zip((4, 16, CONTEXT - 1, CONTEXT - 9), completions, strict=True):
        expected = greedy_tokens(model, prompt_of(length), len(completion.token_ids))
        assert completion.token_ids.tolist() == expected


# --- bounds ---


@pytest.mark.parametrize("prefixes_that_fit", [0, 2.5])
async def test_prefixes_that_do_not_fit_are_read_again(prefixes_that_fit, monkeypatch):
    model, params = llama(), replace(PARAMS, n=6, max_tokens=5)
    async with serving(model, **LIMITS, prefix_cache_mb=0) as engine:
        without = await play(engine, prompt_of(11), params)
    most = 40 * 2 * 2 * 32 * 4 * prefixes_that_fit  # of 40 tokens: 2 layers of keys and values, 32 floats wide
    sizes, keep = [], PrefixCache.keep

    def spy(self, *args):
        keep(self, *args)
        sizes.append(held(self))

    monkeypatch.setattr(PrefixCache, "keep", spy)
    shapes = forward_shapes(model)
    async with serving(model, **LIMITS, prefix_cache_mb=most / 2**20) as engine:
        assert_same(await play(engine, prompt_of(11), params, between=asyncio.Barrier(6).wait), without)
    assert max(sizes) <= most
    assert max(new for _, new in shapes) > 30  # a whole episode


def held(cache):
    """Bytes that the kept tensors hold in memory, which a view of the grid would exceed by far."""
    storages = [states.untyped_storage() for kept in cache._kept.values() for states in kept.states]
    assert cache.bytes == sum(storage.nbytes() for storage in storages)
    return cache.bytes


def test_the_prefix_that_was_kept_first_makes_room():
    grid = KVGrid(max_rows=1, max_columns=8)
    [prefix] = prefill(llama(), [torch.tensor(prompt_of(8))], version=0)
    grid.rows, grid.end = 1, 8
    grid.store(prefix, slice(0, 1))
    cache = PrefixCache(10 * grid.column_bytes)
    for sample, length in enumerate((4, 5, 3)):
        cache.keep((0, sample), prompt_of(length), grid, 0)
    assert (len(cache), cache.bytes) == (2, 8 * grid.column_bytes)
    assert cache.take((0, 0), prompt_of(8)) is None
    cache.keep((0, 1), prompt_of(6), grid, 0)  # replaces its own
    assert (len(cache), cache.bytes) == (2, 9 * grid.column_bytes)
    cache.keep((0, 1), np.arange(11), grid, 0)  # too large, and the older one is outdated
    assert (len(cache), cache.bytes) == (1, 3 * grid.column_bytes)
    kept = cache.take((0, 2), np.concatenate([prompt_of(3), [5]]))
    assert kept.states[0].shape[0] == 3
    assert (len(cache), cache.bytes) == (0, 0)


@pytest.mark.parametrize("settings", [{}, {"keep_prefix": True, "prefix_cache_mb": 0}])
async def test_nothing_is_kept_unless_it_is_asked_for(settings):
    keep_prefix = settings.pop("keep_prefix", False)
    async with serving(llama(), **LIMITS, **settings) as engine:
        await play(engine, prompt_of(11), SamplingParams(n=4, max_tokens=5, keep_prefix=keep_prefix))
        assert len(engine._batch.prefixes) == engine._batch.prefixes.bytes == 0


# --- what must not be reused ---


def changed(prompt):
    """Another history of the same length."""
    other = prompt.copy()
    other[3] = 2 + (other[3] - 1) % (VOCABULARY - 2)
    return other


@pytest.mark.parametrize("change", [changed, lambda prompt: prompt[:12], lambda prompt: prompt[1:]])
async def test_another_history_is_read_from_its_beginning(change):
    model, params = llama(), replace(PARAMS, max_tokens=5)
    later = replace(params, first_token=5)
    async with serving(model, **LIMITS) as engine:
        [episode] = await play(engine, prompt_of(11), params, turns=1)
        prompt = change(episode.give(reply_of(episode, 0)))
        shapes = forward_shapes(model)
        [completion] = await engine.generate(prompt, later)
    assert shapes[0] == (1, len(prompt))
    np.testing.assert_allclose(completion.logprobs, full_logprobs(llama(), prompt, completion), atol=1e-4)


async def test_a_group_that_is_made_again_begins_anew():
    model, params = llama(), replace(PARAMS, n=2, max_tokens=5)
    async with serving(model, **LIMITS) as engine:
        once = await play(engine, prompt_of(11), params)
        shapes = forward_shapes(model)
        assert_same(await play(engine, prompt_of(11), params), once)
    assert shapes[0] == (1, 11)


@pytest.mark.parametrize("moment", ["running", "waiting"])
async def test_a_cancelled_turn_can_be_asked_for_again(moment):
    model, params = llama(), replace(PARAMS, n=2, max_tokens=6)
    later = replace(params, n=1, first_token=6)
    async with serving(model, **LIMITS, max_rows=2) as engine:
        episodes = await play(engine, prompt_of(11), params, turns=1)
        prompts = [episode.give(reply_of(episode, i)) for i, episode in enumerate(episodes)]
        turns = []

        async def cancel():
            turns[0].cancel()

        if moment == "running":
            at_forward(model, 3, cancel)
        turns += [await begin(engine.generate(p, replace(later, first_sample=i))) for i, p in enumerate(prompts)]
        if moment == "waiting":
            turns[0].cancel()
        _, [other] = await asyncio.gather(*turns, return_exceptions=True)
        assert turns[0].cancelled()
        [again] = await engine.generate(prompts[0], later)
    for prompt, completion in zip(prompts, (again, other), strict=True):
        np.testing.assert_allclose(completion.logprobs, full_logprobs(llama(), prompt, completion), atol=1e-4)
        assert completion.sampled_count == 6


# --- new weights ---


async def two_turns(old, new, weight_update):
    """An episode with new weights between its turns: the prompt of the second turn, and both turns."""
    async with serving(old, **LIMITS, weight_update=weight_update) as engine:
        [episode] = await play(engine, prompt_of(11), replace(PARAMS, max_tokens=5), turns=1)
        await engine.update_weights(weights_of(new, 1))
        prompt = episode.give(reply_of(episode, 0))
        [second] = await engine.generate(prompt, replace(PARAMS, max_tokens=7, first_token=5))
    return episode, prompt, second


async def test_in_flight_goes_on_over_the_old_keys_and_values_of_earlier_turns():
    new = llama(seed=2)
    episode, prompt, second = await two_turns(llama(), new, "in_flight")
    tokens = [*episode.tokens, *second.token_ids.tolist()]
    kept = logprobs_over_kept_cache(llama(), new, episode.opening, tokens, swap=5)[len(prompt) - 16 :]
    np.testing.assert_allclose(second.logprobs, kept, rtol=0, atol=1e-4)
    assert np.abs(second.logprobs - full_logprobs(new, prompt, second)).max() > 0.01
    assert second.versions == ((1, 7),)


@pytest.mark.parametrize("weight_update", ["in_flight_recompute", "drain"])
async def test_otherwise_new_weights_read_the_whole_prompt(weight_update):
    new = llama(seed=2)
    _, prompt, second = await two_turns(llama(), new, weight_update)
    async with serving(new, **LIMITS) as engine:
        [from_scratch] = await engine.generate(prompt, replace(PARAMS, max_tokens=7, first_token=5))
    assert second.token_ids.tolist() == from_scratch.token_ids.tolist()
    np.testing.assert_allclose(second.logprobs, from_scratch.logprobs, rtol=0, atol=1e-5)
    assert second.versions == ((1, 7),)


async def test_what_is_kept_of_a_recomputed_turn_is_of_the_new_weights():
    model, new, updates = llama(), llama(seed=2), []
    shapes = forward_shapes(model)
    async with serving(model, **LIMITS, weight_update="in_flight_recompute") as engine:

        async def update():
            updates.append(await begin_update(engine, weights_of(new, 1)))

        at_forward(model, 3, update)
        [episode] = await play(engine, prompt_of(11), replace(PARAMS, max_tokens=8), turns=2)
        await updates[0]
    assert episode.versions == [0] * 3 + [1] * 13
    [second] = [new_tokens for _, new_tokens in shapes[1:] if new_tokens > 1][1:]
    assert second < 11  # after the recomputation, the second turn read its reply alone
    logits_NV = full_logits(new, episode.opening, episode.tokens)[episode.sampled]
    expected = logits_NV.log_softmax(-1).gather(1, torch.tensor(episode.tokens)[episode.sampled][:, None])[:, 0]
    np.testing.assert_allclose(episode.logprobs[3:], expected[3:], rtol=0, atol=1e-4)


# --- the player ---


class Talk:
    """Says something after every turn."""

    def __init__(self, problem, seed):
        self._turns = 0

    async def begin(self):
        return Opening((Message("user", "go on"),))

    async def reply(self, said):
        self._turns += 1
        return Reply((Message("user", f"and {self._turns}"),), reward=1.0)


async def test_the_player_asks_for_reuse_and_gets_the_same_episodes():
    model, played = llama(), []
    prompt = Prompt(5, Problem("?", "!"), np.array([2]))
    calls = UserCalls(threads=1)
    config = EnvironmentConfig(max_turns=4, max_turn_tokens=6)
    player = Player(Talk, PlainRenderer(character_tokenizer(), ()), config, calls, max_prompt_tokens=64)
    for prefix_cache_mb in (0, 64):
        shapes = forward_shapes(model)
        async with serving(model, **LIMITS, prefix_cache_mb=prefix_cache_mb) as engine:
            _, episodes = await player.play(prompt, SamplingParams(n=3, max_tokens=100), engine.generate)
        read = sum(rows * new for rows, new in shapes)
        played.append((episodes, read))
    calls.close()
    (without, read_without), (reused, read_reused) = played
    assert read_reused < read_without
    for one, other in zip(without, reused, strict=True):
        assert len(one.completion.turns) == 4
        assert one.completion.token_ids.tolist() == other.completion.token_ids.tolist()
        np.testing.assert_allclose(one.completion.logprobs, other.completion.logprobs, rtol=0, atol=1e-5)
