"""Episodes of several turns, asked of an engine as the player asks for them."""

import asyncio
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import numpy as np
import pytest
import torch
from engine_helpers import ARCHITECTURES, VOCABULARY, chosen_logprobs, full_logits, lively
from transformers import AutoModelForCausalLM, BloomConfig, DynamicCache, Gemma2Config, GPTNeoXConfig, Qwen3Config

from grpo.engines.torch.kv_cache import cache_argument
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

    @property
    def versions_by_turn(self):
        """The runs (version, count) of each turn."""
        versions = np.split(self.versions, np.searchsorted(self.sampled, self.turns[1:]))
        return [[(version, len(list(run))) for version, run in groupby(turn.tolist())] for turn in versions]

    def give(self, reply):
        self.tokens += reply.tolist()
        return np.concatenate([self.opening, self.tokens])


def reply_of(episode, sample, longest=9):
    """Given tokens that differ from sample to sample and from turn to turn."""
    rng = np.random.default_rng([sample, len(episode.tokens)])
    return rng.integers(2, VOCABULARY, size=int(rng.integers(1, longest + 1)))


async def play_on(engine, episode, params, turns, *, between=None, longest_reply=9):
    """`turns` more turns of one episode, each after a reply."""
    for _ in range(turns):
        if between is not None:
            await between()
        prompt = episode.give(reply_of(episode, params.first_sample, longest_reply))
        [completion] = await engine.generate(prompt, replace(params, n=1, first_token=len(episode.sampled)))
        episode.add(completion)


async def play(engine, opening, params, *, turns=4, **options):
    """A group of episodes, asked for as the player does. Sample i says a little more per turn than sample i - 1."""
    first = await engine.generate(opening, params)
    episodes = [Episode(opening) for _ in first]
    for episode, completion in zip(episodes, first, strict=True):
        episode.add(completion)
    more = [
        play_on(engine, each, replace(params, first_sample=i, max_tokens=params.max_tokens + i), turns - 1, **options)
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


def logprobs_recomputed(models, episode):
    """What the sampled tokens get if each one's model, by version, has read everything before it."""
    places, versions = np.array(episode.sampled), np.array(episode.versions)
    expected = np.zeros(len(places), dtype=np.float32)
    for version in set(episode.versions):
        mine, tokens = places[versions == version], np.array(episode.tokens)
        logits_NV = full_logits(models[version], episode.opening, tokens)[mine]
        expected[versions == version] = chosen_logprobs(logits_NV, tokens[mine])
    return expected


@torch.no_grad()
def logprobs_in_flight(models, episode, block):
    """What they get if each token's model has only read what no other had read before.

    The keys and values of earlier turns are kept in whole blocks of so many tokens.
    """
    tokens, cache, expected = torch.tensor([*episode.opening, *episode.tokens]), DynamicCache(), []
    for begin, runs in zip(episode.turns, episode.versions_by_turn, strict=True):
        if lost := cache.get_seq_length() % block:
            cache.crop(-lost)
        end = len(episode.opening) + begin
        for version, count in runs:
            end += count
            unread = tokens[cache.get_seq_length() : end - 1]
            logits_TV = models[version](unread[None], **{cache_argument(models[version]): cache}).logits[0, -count:]
            expected.append(chosen_logprobs(logits_TV, tokens[end - count : end].numpy()))
    return np.concatenate(expected)
