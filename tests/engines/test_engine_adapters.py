"""Engines that are given adapters, the torch engine and vLLM: they sample from the base with the adapters merged."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import threading
from contextlib import asynccontextmanager

import numpy as np
import pytest
import torch
from engine_helpers import at_forward, begin, full_logprobs, greedy, greedy_tokens, lively, prompt_of, weights_of
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo.engines.base import Limits
from grpo.engines.torch.engine import TorchEngine
from grpo.errors import WeightsError
from grpo.models.tiny import tiny_llama
from grpo.types import SamplingParams
from grpo.weights.adapters import Merge, base_of
from grpo.weights.flat_buffer import buffer_checksum, buffer_for, lay_out, views
from grpo.weights.payload import Weights, load_weights, parameter_shapes

LIMITS = Limits(max_prompt_tokens=16, max_completion_tokens=24, max_sequences=8)
SCALE, RANK = 0.5, 4


def llama():
    return lively(tiny_llama(width=64, layers=2, heads=2), 1)


def qwen2_with_biases():
    """vLLM computes with its q, k and v, biases included, as one layer."""
    config = Qwen2Config(
        vocab_size=79, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, max_position_embeddings=512, eos_token_id=1,
    )  # fmt: skip
    model = lively(Qwen2ForCausalLM(config), 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    return model


def adapters(model, endings, version, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        f"{name}.lora_{which}.default.weight": (RANK, module.in_features)
        if which == "A"
        else (module.out_features, RANK)
        for name, module in model.named_modules()
        for which in "AB"
        if name.endswith(endings)
    }
    specs = lay_out((name, shape, torch.float32) for name, shape in shapes.items())
    buffer = buffer_for(specs)
    for _, target in views(specs, buffer):
        target.normal_(0, 0.3, generator=generator)
    return Weights(version, specs, buffer, buffer_checksum(buffer))


def merged_model(model, weights):
    merged = copy.deepcopy(model)
    load_weights(merged, Merge(base_of(model), SCALE)(weights), part=True)
    return merged


@asynccontextmanager
async def opened(kind, model, folder):
    merge = Merge(base_of(copy.deepcopy(model)), SCALE)
    if kind == "torch":
        engine = TorchEngine(copy.deepcopy(model), stop_token_ids=(), limits=LIMITS, threads=1, merge=merge)
    else:
        from grpo.engines.vllm.engine import VLLMEngine

        model.save_pretrained(folder)
        engine = await VLLMEngine(
            str(folder), stop_token_ids=(), shapes=parameter_shapes(model), limits=LIMITS, threads=1,
            settings={"dtype": "float32"}, merge=merge,
        ).start()  # fmt: skip
    try:
        async with asyncio.timeout(600):
            yield engine
    finally:
        await engine.close()


@pytest.mark.parametrize("make_model", [llama, qwen2_with_biases])
async def test_it_samples_from_the_base_with_each_versions_adapters(request, make_model, tmp_path):
    """Of all linear layers, then of one part of a fused one, then as before: the base is untouched throughout."""
    model, updates = make_model(), [("proj", 1), (("q_proj", "up_proj"), 2), ("proj", 1)]
    async with opened(request.config.getoption("--engine"), model, tmp_path) as engine:
        (before,) = await engine.generate(prompt_of(5), greedy(12))
        assert before.token_ids.tolist() == greedy_tokens(model, prompt_of(5), 12)
        for version, (endings, seed) in enumerate(updates, start=1):
            weights = adapters(model, endings, version, seed)
            await engine.update_weights(weights)
            assert engine.version == version
            expected = merged_model(model, weights)
            group = await engine.generate(prompt_of(7), SamplingParams(n=3, max_tokens=12, seed=version))
            for completion in group:
                assert completion.versions == ((version, len(completion.token_ids)),)
                np.testing.assert_allclose(
                    completion.logprobs, full_logprobs(expected, prompt_of(7), completion), rtol=0, atol=1e-4
                )


async def test_what_are_no_adapters_of_it_is_refused_and_the_old_ones_stay(request, tmp_path):
    model = llama()
    first = adapters(model, "proj", 1, seed=1)
    async with opened(request.config.getoption("--engine"), model, tmp_path) as engine:
        await engine.update_weights(first)
        with pytest.raises(WeightsError, match="version 2 are no adapters"):
            await engine.update_weights(weights_of(model, 2))
        damaged = dataclasses.replace(adapters(model, "proj", 3, seed=2), checksum=5)
        with pytest.raises(WeightsError, match="version 3 was damaged"):
            await engine.update_weights(damaged)
        (completion,) = await engine.generate(prompt_of(4), greedy(10))
    assert completion.token_ids.tolist() == greedy_tokens(merged_model(model, first), prompt_of(4), 10)
    assert completion.versions == ((1, 10),)


async def test_the_torch_engine_generates_while_it_merges():
    """The merge waits for a forward pass that waits for the merge to begin."""
    began, passed, model = threading.Event(), threading.Event(), llama()

    class Waiting(Merge):
        def __call__(self, weights):
            began.set()
            assert passed.wait(30)
            return super().__call__(weights)

    async def update():
        updates.append(await begin(engine.update_weights(adapters(model, "proj", 1, seed=1))))

    async def meet():
        assert await asyncio.to_thread(began.wait, 30)
        passed.set()

    updates, used = [], copy.deepcopy(model)
    async with asyncio.timeout(600):
        engine = TorchEngine(
            used, stop_token_ids=(), limits=LIMITS, threads=1, merge=Waiting(base_of(copy.deepcopy(model)), SCALE)
        )
        at_forward(used, 2, update)
        at_forward(used, 4, meet)
        await engine.generate(prompt_of(4), greedy(10))
        await asyncio.gather(*updates)
        assert engine.version == 1
        await engine.close()
