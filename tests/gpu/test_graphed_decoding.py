"""CUDA graphs and the decode kernel against plain decoding; only where there is a GPU."""

import asyncio
import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo.engines.base import Limits
from grpo.engines.torch.engine import TorchEngine
from grpo.engines.torch.forward import PlainDecoding
from grpo.types import SamplingParams
from grpo.weights.payload import WeightsWriter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_model(dtype, *, head_size=64, heads=6, kv_heads=2, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=503, hidden_size=heads * head_size, intermediate_size=256, num_hidden_layers=2, head_dim=head_size,
        num_attention_heads=heads, num_key_value_heads=kv_heads, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to("cuda", dtype).eval()


async def generate(model, requests, *, cuda_graphs, rows=16, update=None):
    engine = TorchEngine(model, stop_token_ids=(7,), limits=Limits(64, 600, rows), cuda_graphs=cuda_graphs)
    try:
        running = [asyncio.create_task(engine.generate(*request)) for request in requests]
        if update is not None:
            await running[0]
            await engine.update_weights(update)
        groups = await asyncio.gather(*running)
        return [completion for group in groups for completion in group], engine
    finally:
        await engine.close()


def some_requests(count, temperature=0.0):
    rng = np.random.default_rng(1)
    draw = rng.integers
    return [
        (
            draw(8, 500, size=draw(1, 64)),
            SamplingParams(int(draw(1, 6)), temperature, max_tokens=int(draw(1, 600)), seed=i),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(
    "shape", [{}, {"head_size": 48}, {"heads": 14}, {"heads": 4, "kv_heads": 4, "head_size": 128}, {"kv_heads": 1}]
)
async def test_graphs_say_what_plain_decoding_says(shape):
    model, requests = make_model(torch.float32, **shape), some_requests(12)
    plain, engine = await generate(copy.deepcopy(model), requests, cuda_graphs=False)
    assert isinstance(engine._batch._decoding, PlainDecoding)
    graphed, engine = await generate(model, requests, cuda_graphs=True)
    assert not isinstance(engine._batch._decoding, PlainDecoding)
    same = [a.token_ids.tolist() == b.token_ids.tolist() for a, b in zip(plain, graphed, strict=True)]
    assert np.mean(same) > 0.95  # rounding may tip a greedy choice
    for a, b, equal in zip(plain, graphed, same, strict=True):
        if equal:
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.3)])
async def test_logprobs_are_those_of_a_forward_pass_before_and_after_an_update(dtype, tolerance):
    model, new = make_model(dtype), make_model(dtype, seed=5)
    weights = WeightsWriter(copy.deepcopy(new), dtype).write(1)
    requests = [(np.arange(8, 20), SamplingParams(max_tokens=2)), *some_requests(20, temperature=1.0)]
    completions, _ = await generate(copy.deepcopy(model), requests, cuda_graphs=True, update=weights)
    prompts = [prompt for prompt, params in requests for _ in range(params.n)]
    checked = {0: 0, 1: 0}
    for prompt, made in zip(prompts, completions, strict=True):
        if len(made.versions) > 1:
            continue
        ((version, count),) = made.versions
        ids = torch.tensor([*prompt, *made.token_ids], device="cuda")[None]
        with torch.no_grad():
            logits = [model, new][version](ids).logits[0, len(prompt) - 1 : -1].float()
        found = torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu().numpy()
        assert np.abs(found - made.logprobs).max() < tolerance
        checked[version] += count
    assert checked[0] >= 2
    assert checked[1] > 100
