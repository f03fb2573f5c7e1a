"""Turns of an episode: the same tokens as if it had been sampled in one go, whether its prefix was kept or not."""

import asyncio
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from engine_helpers import (
    ARCHITECTURES,
    VOCABULARY,
    at_forward,
    begin,
    forward_shapes,
    full_logits,
    gpt2,
    llama,
    logprobs_over_kept_cache,
    prompt_of,
    sliding_mistral,
    weights_of,
)
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, GPTNeoXConfig, Qwen3Config

from grpo.engines.base import Limits
from grpo.engines.torch import batch as batch_module
from grpo.engines.torch import kv_cache
from grpo.engines.torch.engine import TorchEngine
from grpo.engines.torch.kv_cache import KVGrid
from grpo.engines.torch.prefix_cache import PrefixCache
from grpo.engines.torch.sampling import RowSampler, uniforms
from grpo.types import SamplingParams

CONTEXT = 120
PARAMS = SamplingParams(seed=3, temperature=0.8, keep_prefix=True)


def model_from(config):
    """A maker of models like those in engine_helpers."""

    def make(seed=1):
        model = AutoModelForCausalLM.from_config(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.25, generator=generator)
        return model.eval()

    return make


_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
MORE = {
    "qwen3": model_from(Qwen3Config(**_SIZES, **_GROUPED)),
    "gemma2": model_from(Gemma2Config(**_SIZES, **_GROUPED, sliding_window=4)),  # every other layer slides
    "gpt_neox": model_from(GPTNeoXConfig(**_SIZES, intermediate_size=48)),
    "bloom": model_from(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)),  # alibi
}
EVERY_MODEL = pytest.mark.parametrize("make_model", [*ARCHITECTURES, *MORE.values()])


class serving:  # noqa: N801
    """An engine for episodes, as a context."""

    def __init__(self, model, *, rows=16, **settings):
        self._model, self._settings = model, {"stop_token_ids": (), "threads": 1, **settings}
        self._limits = Limits(16, CONTEXT - 16, rows, several_turns=True)

    async def __aenter__(self):
        self._engine = TorchEngine(self._model, limits=self._limits, **self._settings)
        return self._engine

    async def __aexit__(self, *_):
        await self._engine.close()


@dataclass
class Episode:
    """What the tests compare: all tokens after the opening, and the log-probabilities and versions of the sampled."""

    opening: np.ndarray
    tokens: list[int]
    sampled: list[int]  # places in `tokens`
    logprobs: list[float]
    versions: list[int]

    def add(self, completion):
        self.sampled += range(len(self.tokens), len(self.tokens) + completion.sampled_count)
        self.tokens += completion.token_ids.tolist()
        self.logprobs += completion.logprobs.tolist()
        self.versions += np.repeat(*np.array(completion.versions).T).tolist()

    def give(self, reply):
        self.tokens += reply.tolist()
        return np.concatenate([self.opening, self.tokens])


def reply_of(episode, sample, longest=9):
    """Given tokens that differ from sample to sample and from turn to turn."""
    rng = np.random.default_rng([sample, len(episode.tokens)])
    return rng.integers(2, VOCABULARY, size=int(rng.integers(1, longest + 1)))


async def play_on(engine, episode, params, turns, between=None):
    """`turns` more turns of one episode, each after a reply."""
    for _ in range(turns):
        if between is not None:
            await between()
        prompt = episode.give(reply_of(episode, params.first_sample))
        [completion] = await engine.generate(prompt, replace(params, n=1, first_token=len(episode.sampled)))
        episode.add(completion)


async def play(engine, opening, params, *, turns=4, between=None):
    """A group of episodes, asked for as the player does. Sample i says a little more per turn than sample i - 1."""
    first = await engine.generate(opening, params)
    episodes = [Episode(opening, [], [], [], []) for _ in first]
    for episode, completion in zip(episodes, first, strict=True):
        episode.add(completion)
    more = [
        play_on(engine, each, replace(params, first_sample=i, max_tokens=params.max_tokens + i), turns - 1, between)
        for i, each in enumerate(episodes)
    ]
    await asyncio.gather(*more)
    return episodes


def assert_same(episodes, others):
    for episode, other in zip(episodes, others, strict=True):
        assert episode.tokens == other.tokens
        np.testing.assert_allclose(episode.logprobs, other.logprobs, rtol=0, atol=1e-5)


def assert_as_if_sampled_in_one_go(model, episodes, params):
    """One forward pass over the whole episode, and one stream of random numbers, decide all of its sampled tokens."""
    for sample, episode in enumerate(episodes):
        logits_NV = full_logits(model, episode.opening, episode.tokens)[episode.sampled]
        count = len(episode.sampled)
        sampler = RowSampler([params] * count, torch.device("cpu"))
        tokens_N, logprobs_N = sampler.draw(logits_NV, uniforms(params.seed, sample, count))
        assert np.array(episode.tokens)[episode.sampled].tolist() == tokens_N.tolist()
        np.testing.assert_allclose(episode.logprobs, logprobs_N, rtol=0, atol=1e-4)


# --- the contract ---


@EVERY_MODEL
@pytest.mark.parametrize("prefix_cache_mb", [0, 64])
async def test_turns_are_sampled_as_one_long_completion_into_which_tokens_are_given(make_model, prefix_cache_mb):
    model, params = make_model(), replace(PARAMS, n=4, max_tokens=5)
    async with serving(model, prefix_cache_mb=prefix_cache_mb) as engine:
        episodes = await play(engine, prompt_of(11), params)
    assert [len(episode.sampled) for episode in episodes] == [20, 23, 26, 29]
    assert_as_if_sampled_in_one_go(model, episodes, params)


@EVERY_MODEL
async def test_reuse_changes_no_token_and_no_logprob(make_model):
    model, params = make_model(), replace(PARAMS, n=4, max_tokens=5)
    async with serving(model, prefix_cache_mb=0) as engine:
        without = await play(engine, prompt_of(11), params)
    async with serving(model) as engine:
        assert_same(await play(engine, prompt_of(11), params), without)


async def test_a_turn_reads_only_what_is_new():
    model = llama()
    async with serving(model) as engine:
        [episode] = await play(engine, prompt_of(11), replace(PARAMS, max_tokens=5), turns=1)
        shapes = forward_shapes(model)
        reply = reply_of(episode, 0)
        await engine.generate(episode.give(reply), replace(PARAMS, max_tokens=3, first_token=5))
    assert shapes == [(1, 1 + len(reply)), (1, 1), (1, 1)]  # the last sampled token had not been read yet
