"""Small random models and slow, obvious references that the engine tests share."""

import asyncio
import contextlib
import copy
import itertools
import time

import numpy as np
import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from grpo.engines.base import Limits
from grpo.engines.torch.engine import TorchEngine
from grpo.engines.torch.kv_cache import cache_argument
from grpo.models.tiny import tiny_llama
from grpo.types import SamplingParams
from grpo.weights.payload import Weights, WeightsWriter

VOCABULARY = 79
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def llama(seed=1):
    return lively(tiny_llama(width=32, layers=2, heads=2), seed)


def eager_llama(seed=1):
    model = llama(seed)
    model.set_attn_implementation("eager")
    return model


def grouped_query_llama(seed=1):
    return lively(LlamaForCausalLM(LlamaConfig(**_SIZES, num_key_value_heads=2)), seed)


def qwen2(seed=1):
    return lively(Qwen2ForCausalLM(Qwen2Config(**_SIZES, num_key_value_heads=1)), seed)


def gpt2(seed=1):
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=512, bos_token_id=1, eos_token_id=1
    )
    return lively(GPT2LMHeadModel(config), seed)


def sliding_mistral(seed=1, window=4):
    config = MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=window)
    return lively(MistralForCausalLM(config), seed)


ARCHITECTURES = [llama, eager_llama, grouped_query_llama, qwen2, gpt2, sliding_mistral]


def lively(model, seed):
    """Weights large enough that every next token depends on the whole prefix and greedy output does not repeat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=generator)
    model.generation_config.eos_token_id = None  # the tests say themselves what stops
    return model.eval()


def prompt_of(length, seed=0):
    return np.random.default_rng([length, seed]).integers(2, VOCABULARY, size=length)


def greedy(count, **settings):
    return SamplingParams(temperature=0.0, max_tokens=count, **settings)


@contextlib.asynccontextmanager
async def serving(model, **settings):
    """An engine that is closed at the end; a test that would hang fails instead."""
    limits = Limits(
        max_prompt_tokens=settings.pop("max_prompt_tokens", 8),
        max_completion_tokens=settings.pop("max_completion_tokens", 40),
        max_sequences=settings.pop("max_rows", 8),
        several_turns=settings.pop("several_turns", False),
    )
    async with asyncio.timeout(300):
        engine = TorchEngine(model, limits=limits, **{"stop_token_ids": (), "threads": 1, **settings})
        try:
            yield engine
        finally:
            await engine.close()


@torch.no_grad()
def greedy_tokens(model, prompt_ids, count):
    prompt_1T = torch.tensor(np.array(prompt_ids))[None]
    output_1T = model.generate(
        prompt_1T, attention_mask=torch.ones_like(prompt_1T), do_sample=False, max_new_tokens=count, pad_token_id=0
    )
    return output_1T[0, len(prompt_ids) :].tolist()


@torch.no_grad()
def full_logits(model, prompt_ids, token_ids):
    """The logits [T, V] behind each token of a completion, from one forward pass without cache or padding."""
    sequence = torch.tensor([*prompt_ids, *token_ids])[None]
    return model(sequence, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]


def full_logprobs(model, prompt_ids, completion, temperature=1.0):
    logits_TV = full_logits(model, prompt_ids, completion.token_ids)
    return chosen_logprobs(logits_TV, completion.token_ids, temperature)


def chosen_logprobs(logits_TV, token_ids, temperature=1.0):
    logprobs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    return logprobs_TV.gather(1, torch.as_tensor(np.array(token_ids))[:, None])[:, 0].numpy()


@torch.no_grad()
def logprobs_over_kept_cache(old, new, prompt_ids, token_ids, swap):
    """What tokens [swap, T) get when the first `swap` were sampled by `old` and its keys and values are kept."""
    cache = DynamicCache()
    old(torch.tensor([*prompt_ids, *token_ids[: swap - 1]])[None], **{cache_argument(old): cache})
    logits_TV = new(torch.tensor(token_ids[swap - 1 : -1])[None], **{cache_argument(old): cache}).logits[0]
    return chosen_logprobs(logits_TV, token_ids[swap:])


def weights_of(model, version) -> Weights:
    return WeightsWriter(copy.deepcopy(model), torch.float32).write(version)


def forward_shapes(model):
    """A list that collects the shape of the input of every forward pass from now on."""
    shapes = []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def at_forward(model, number, action):
    """Hold the model's forward pass `number` (the first is 1) until the coroutine function `action` has run."""
    loop, calls = asyncio.get_running_loop(), itertools.count(1)

    def hook(_module, _args):
        if next(calls) == number:
            asyncio.run_coroutine_threadsafe(action(), loop).result(timeout=120)

    model.register_forward_pre_hook(hook)


async def begin(coroutine):
    """A task that has run up to its first wait."""
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    return task


async def begin_update(engine, weights):
    """A task that updates an engine, once the weights are checked and the next step will take them or has."""
    task = await begin(engine.update_weights(weights))
    while not task.done() and all(version != weights.version for version, *_ in engine._updates):
        await asyncio.to_thread(time.sleep, 0.001)
    return task
