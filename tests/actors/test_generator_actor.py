from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from grpo.actors.generator import Generator
from grpo.actors.trainer import Trainer
from grpo.config.actors import GeneratorConfig, LoraConfig
from grpo.errors import ConfigError
from grpo.models.loading import load_model
from grpo.types import Batch, SamplingParams
from grpo.weights.payload import WeightsWriter

SIMULATED = GeneratorConfig(engine="simulated", args={"mean_tokens": 3.0})


@pytest.fixture
async def make_generator(config):
    opened = []

    async def make(generator=None):
        actor = Generator(replace(config, generator=generator or config.generator))
        await actor.setup()
        opened.append(actor)
        return actor

    yield make
    for actor in opened:
        await actor.close()


@pytest.fixture
def weights(config):
    return WeightsWriter(load_model(config.model, torch.float32, "cpu"), torch.float32).write(version=3)


@pytest.mark.parametrize("settings", [None, SIMULATED], ids=["torch", "simulated"])
async def test_the_report_adds_up(make_generator, prompt, settings):
    generator = await make_generator(settings)
    completions, report = await generator.generate(prompt, SamplingParams(n=4, max_tokens=5, seed=11))
    lengths = [len(completion.token_ids) for completion in completions]
    assert report.completion_count == len(completions) == 4
    assert report.token_count == sum(lengths)
    assert max(lengths) <= 5
    assert report.truncated_count == sum(completion.finish_reason == "length" for completion in completions)
    assert report.oldest_version == 0
    for completion, length in zip(completions, lengths, strict=True):
        assert len(completion.logprobs) == length == sum(count for _, count in completion.versions)


@pytest.mark.parametrize("settings", [None, SIMULATED], ids=["torch", "simulated"])
async def test_new_weights_move_the_version_and_answer_with_the_counters(make_generator, prompt, weights, settings):
    generator = await make_generator(settings)
    _, before = await generator.generate(prompt, SamplingParams(n=2, max_tokens=4))
    stats = await generator.update_weights(weights)
    assert stats.tokens == before.token_count
    assert stats.busy_s >= 0
    completions, report = await generator.generate(prompt, SamplingParams(n=2, max_tokens=4))
    assert report.oldest_version == 3
    assert all(completion.versions == ((3, len(completion.token_ids)),) for completion in completions)
    assert (await generator.update_weights(weights)).tokens == before.token_count + report.token_count


@pytest.mark.parametrize("settings", [None, SIMULATED], ids=["torch", "simulated"])
async def test_what_is_sampled_follows_from_the_seed_alone(make_generator, prompt, settings):
    generator = await make_generator(settings)
    groups = await asyncio.gather(
        *(generator.generate(prompt, SamplingParams(n=2, max_tokens=6, seed=seed)) for seed in (1, 2, 1))
    )
    (first, _), (other, _), (again, _) = groups

    def tokens(completions):
        return [completion.token_ids.tolist() for completion in completions]

    assert tokens(first) == tokens(again) != tokens(other)


async def test_oldest_and_newest_version_are_those_of_any_token(make_generator, prompt, make_completion, monkeypatch):
    mixed = replace(make_completion([5, 6, 1]), versions=((2, 1), (3, 2)))

    class Engine:
        async def generate(self, prompt_ids, params):
            return [make_completion([5, 1], version=4), mixed]

        async def close(self):
            pass

    async def make_engine(*args):
        return Engine()

    monkeypatch.setattr("grpo.actors.generator.make_engine", make_engine)
    _, report = await (await make_generator()).generate(prompt, SamplingParams(n=2))
    assert (report.oldest_version, report.newest_version) == (2, 4)


async def test_the_models_own_eos_ends_a_completion(make_generator, config, prompt):
    """Weights that always say eos: every other embedding points the other way, and the last norm turns the sign."""
    generator = await make_generator()
    model = load_model(config.model, torch.float32, "cpu")
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = -1.0
        model.model.embed_tokens.weight[1] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight[:] = -1.0
    await generator.update_weights(WeightsWriter(model, torch.float32).write(version=1))
    completions, report = await generator.generate(prompt, SamplingParams(n=2, max_tokens=6))
    assert [completion.token_ids.tolist() for completion in completions] == [[1], [1]]
    assert report.truncated_count == 0
    np.testing.assert_allclose(completions[0].logprobs, [0.0], atol=1e-5)


async def test_unknown_engine_arguments_are_refused(make_generator):
    with pytest.raises(ConfigError, match=r"generator\.args.*'latency'.*latency_s"):
        await make_generator(GeneratorConfig(engine="simulated", args={"latency": 1.0}))


async def test_a_trainers_adapters_are_merged_into_the_base_from_disk(config, prompt, make_group):
    """Two generators agree with the trainer, whichever version they heard of first."""
    config = replace(config, lora=LoraConfig(rank=4))
    trainer, first, late = Trainer(config), Generator(config), Generator(config)
    for actor in (trainer, first, late):
        await actor.setup()
    await first.update_weights((await trainer.push_weights())[0])
    await trainer.train_step(Batch([make_group()]))
    weights, _ = await trainer.push_weights()
    params = SamplingParams(n=2, max_tokens=6, seed=1)
    answers = []
    for generator in (first, late):
        await generator.update_weights(weights)
        answers.append((await generator.generate(prompt, params))[0])
    for a, b in zip(*answers, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
    group = replace(make_group(version=1), completions=answers[0])
    assert (await trainer.train_step(Batch([group])))["mismatch/logprob_abs_diff_same_version"] < 1e-4
    for actor in (trainer, first, late):
        await actor.close()
