"""Episodes of several turns, asked of an engine as the player asks for them."""

import asyncio
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
import torch
from engine_helpers import ARCHITECTURES, VOCABULARY, full_logits, lively
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, GPTNeoXConfig, Qwen3Config

from grpo.engines.torch.sampling import RowSampler, uniforms
from grpo.types import SamplingParams

PARAMS = SamplingParams(seed=3, keep_prefix=True)
LIMITS = {"max_prompt_tokens": 16, "max_completion_tokens": 104, "several_turns": True}
CONTEXT = 120

_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
MORE = {
    "qwen3": Qwen3Config(**_SIZES, **_GROUPED),
    "gemma2, every other layer slides": Gemma2Config(**_SIZES, **_GROUPED, sliding_window=4),
    "gpt_neox, rotates a part": GPTNeoXConfig(**_SIZES, intermediate_size=48),
    "bloom, alibi": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
}


def model_from(config, seed=1):
    return lively(AutoModelForCausalLM.from_config(config), seed)


EVERY_MODEL = pytest.mark.parametrize(
    "make_model",
    [*ARCHITECTURES, *(pytest.param(partial(model_from, config), id=name) for name, config in MORE.items())],
)


@dataclass
class Episode:
    """What the tests compare: all tokens after the opening, and the log-probabilities and versions of the sampled."""

    opening: np.ndarray
    tokens: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)  # where they begin in `tokens`
    sampled: list[int] = field(default_factory=list)  # places in `tokens`
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    def add(self, completion):
        self.turns.append(len(self.tokens))
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
    episodes = [Episode(opening) for _ in first]
    for episode, completion in zip(episodes, first, strict=True):
        episode.add(completion)
    more = [
        play_on(engine, each, replace(params, first_sample=i, max_tokens=params.max_tokens + i), turns - 1, between)
        for i, each in enumerate(episodes)
    ]
    await asyncio.gather(*more)
    return episodes


def assert_same(episodes, others, atol=1e-5):
    for episode, other in zip(episodes, others, strict=True):
        assert episode.tokens == other.tokens
        np.testing.assert_allclose(episode.logprobs, other.logprobs, rtol=0, atol=atol)


def assert_as_if_sampled_in_one_go(model, episodes, params):
    """One forward pass over the whole episode, and one stream of random numbers, decide all of its sampled tokens."""
    for sample, episode in enumerate(episodes):
        logits_NV = full_logits(model, episode.opening, episode.tokens)[episode.sampled]
        count = len(episode.sampled)
        sampler = RowSampler([params] * count, torch.device("cpu"))
        tokens_N, logprobs_N = sampler.draw(logits_NV, uniforms(params.seed, sample, count))
        assert np.array(episode.tokens)[episode.sampled].tolist() == tokens_N.tolist()
        np.testing.assert_allclose(episode.logprobs, logprobs_N, rtol=0, atol=1e-4)
