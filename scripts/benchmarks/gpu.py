"""One GPU: decoding with and without CUDA graphs, the learner's share of the peak, and weights to and from the host."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks import gpu_run
from benchmarks.figures import Figure
from grpo.config.actors import TrainerConfig
from grpo.config.algorithm import CorrectionConfig, LossConfig
from grpo.engines.base import Limits
from grpo.engines.torch.engine import TorchEngine
from grpo.learner.learner import Learner
from grpo.learner.objective import Objective
from grpo.types import Batch, Completion, Group, Problem, Prompt, SamplingParams
from grpo.weights.payload import StagedWeights, WeightsWriter, check_intact

# The shapes of Qwen2.5's, with random weights: width, inner width, layers, heads, heads for keys and values.
SHAPES = {"0.5B": (896, 4864, 24, 14, 2), "1.5B": (1536, 8960, 28, 12, 2)}
WORDS = 151_936
GROUP, PROMPT_TOKENS = 8, 128
EVEN_TOKENS, MEAN_TOKENS, MOST_TOKENS = 256, 128, 1024


def run(quick: bool) -> list[Figure]:
    if not torch.cuda.is_available():
        print("left out: there is no GPU here")
        return []
    print(torch.cuda.get_device_name())
    figures, peak = [], _Peak.measured()
    for name in ("0.5B",) if quick else SHAPES:
        model = make_model(name, torch.bfloat16).eval()
        for sequences in (256,) if quick else (32, 256):
            for ragged in (False, True):
                figures += _decoding(model, name, sequences, ragged, peak)
        del model
        torch.cuda.empty_cache()
        for settings in ({}, {"compile": True}, {"compile": True, "gradient_checkpointing": True}):
            figures += _training(name, settings, peak, steps=2 if quick else 4)
            torch.cuda.empty_cache()
        figures += _weights(name)
        torch.cuda.empty_cache()
    return [*figures, *gpu_run.run("0.5B", make_model("0.5B", torch.bfloat16), steps=12 if quick else 40)]


@dataclass(frozen=True)
class _Peak:
    """What the GPU does at most: operations of bf16 matrix products, and bytes read and written by a copy, a second."""

    flops: float
    bandwidth: float

    @staticmethod
    def measured() -> _Peak:
        a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        source = torch.randint(255, (2**32,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        product_s = min(_timed(lambda: torch.matmul(a, b)) for _ in range(10))
        copy_s = min(_timed(lambda: target.copy_(source)) for _ in range(10))
        return _Peak(2 * 8192**3 / product_s, 2 * source.nbytes / copy_s)


def _timed(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def make_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    width, inner, layers, heads, kv_heads = SHAPES[name]
    config = Qwen2Config(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return Qwen2ForCausalLM(config).to(dtype)


# --- decoding ---


def _decoding(model: PreTrainedModel, name: str, sequences: int, ragged: bool, peak: _Peak) -> list[Figure]:
    """Two batches' worth of sequences, all waiting from the start."""
    model.set_attn_implementation("sdpa")
    tokens, seconds, steps = asyncio.run(_decode(model, sequences, ragged, cuda_graphs=True))
    settings = model.config
    head_bytes = 2 * 2 * settings.num_key_value_heads * (settings.hidden_size // settings.num_attention_heads)
    token_bytes = settings.num_hidden_layers * head_bytes
    weights = sum(parameter.nbytes for parameter in model.parameters())
    mean = PROMPT_TOKENS + (MEAN_TOKENS if ragged else EVEN_TOKENS // 2)  # of ragged ones: by what is left to come
    floor_s = (weights * steps + tokens * mean * token_bytes) / peak.bandwidth * 2  # the copy's counts both ways
    what = f"{name}, {'ragged' if ragged else 'even'}, {sequences} sequences"
    figures = [
        Figure("gpu", f"{what}: decoding", tokens / seconds, "tokens/s"),
        Figure("gpu", f"{what}: of the time, reading weights, keys and values takes at least", floor_s / seconds),
    ]
    if not ragged:  # which would take minutes
        model.set_attn_implementation("sdpa")
        _, plain_s, _ = asyncio.run(_decode(model, sequences, ragged, cuda_graphs=False))
        figures.append(Figure("gpu", f"{what}: over without CUDA graphs", plain_s / seconds))
    return figures


async def _decode(
    model: PreTrainedModel, sequences: int, ragged: bool, *, cuda_graphs: bool
) -> tuple[int, float, float]:
    """Tokens, seconds, and steps: of a full batch, had there been only such. The first round warms up."""
    limits = Limits(PROMPT_TOKENS, MOST_TOKENS if ragged else EVEN_TOKENS, sequences)
    stops = list(range(WORDS // MEAN_TOKENS)) if ragged else []
    engine = TorchEngine(model, stop_token_ids=stops, limits=limits, cuda_graphs=cuda_graphs)
    try:
        for batches in (1, 2):
            seeds = range(batches * 1000, batches * 1000 + batches * sequences // GROUP)
            params = [SamplingParams(n=GROUP, max_tokens=limits.max_completion_tokens, seed=seed) for seed in seeds]
            began = time.perf_counter()
            groups = await asyncio.gather(*(engine.generate(_prompt(each.seed), each) for each in params))
            seconds = time.perf_counter() - began
        tokens = sum(len(made.token_ids) for group in groups for made in group)
        return tokens, seconds, tokens / sequences
    finally:
        await engine.close()


def _prompt(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(WORDS, size=PROMPT_TOKENS)


# --- training ---


def _training(name: str, settings: dict[str, Any], peak: _Peak, steps: int) -> list[Figure]:
    config = TrainerConfig(lr=1e-6, **settings)
    learner = Learner(
        make_model(name, torch.float32),
        config,
        Objective(LossConfig(), CorrectionConfig()),
        temperature=1.0,
        age_bound=steps,
        compute_dtype=torch.bfloat16,
    )
    torch.cuda.reset_peak_memory_stats()
    batch = _batch(groups=32)
    learner.train_step(batch)
    seconds = min(_timed(lambda: learner.train_step(batch)) for _ in range(steps))
    tokens = sum(len(made.token_ids) for group in batch.groups for made in group.completions)
    what = f"{', '.join([name, 'training', *settings])}"
    return [
        Figure("gpu", f"{what}: completion tokens", tokens / seconds, "tokens/s"),
        Figure("gpu", f"{what}: model FLOPs utilization", _flops(learner.model, batch) / seconds / peak.flops),
        Figure("gpu", f"{what}: GPU memory", torch.cuda.max_memory_allocated() / 2**30, "GiB"),
    ]


def _batch(groups: int) -> Batch:
    rng = np.random.default_rng(0)

    def group(serial: int) -> Group:
        lengths = np.minimum(rng.geometric(1 / (2 * MEAN_TOKENS), size=GROUP), MOST_TOKENS)
        made = [
            Completion(rng.integers(WORDS, size=n), np.full(n, -12, np.float32), ((0, int(n)),), "stop")
            for n in lengths
        ]
        prompt = Prompt(serial, Problem("", ""), _prompt(serial))
        advantages = tuple(float(i % 2 * 2 - 1) for i in range(GROUP))
        return Group(prompt, made, None, advantages, advantages, oldest_version=0)

    return Batch([group(serial) for serial in range(groups)])


def _flops(model: PreTrainedModel, batch: Batch) -> float:
    """Of matrix products and attention, forward and twice that backward; what is computed again does not count."""
    settings = model.config
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)  # the head is one
    head = WORDS * settings.hidden_size
    flops = 0.0
    for group in batch.groups:
        lengths = [len(made.token_ids) for made in group.completions]
        flops += 6 * (matrices - head) * (PROMPT_TOKENS + sum(lengths)) + 6 * head * sum(lengths)
        squares = sum((PROMPT_TOKENS + length) ** 2 for length in lengths)
        flops += 6 * settings.num_hidden_layers * settings.hidden_size * squares
    return flops


# --- weights ---


def _weights(name: str) -> list[Figure]:
    """One process writes what another one loads; both have the GPU."""
    model, receiver = make_model(name, torch.float32), make_model(name, torch.bfloat16)
    writer = WeightsWriter(model, torch.bfloat16)
    weights = writer.write(0)
    on_host = torch.from_numpy(weights.buffer)
    pinned = torch.empty_like(on_host, pin_memory=True)
    on_gpu = on_host.to("cuda")
    staged: list[StagedWeights] = []
    ways: dict[str, Callable[[], object]] = {
        "a copy to pinned memory": lambda: pinned.copy_(on_gpu),
        "publishing": lambda: writer.write(1),
        "verifying": lambda: check_intact(weights),
        "bringing them to the GPU": lambda: staged.append(StagedWeights(receiver, weights)),
        "swapping, while generation waits": lambda: staged.pop().swap(),
    }
    figures = [Figure("gpu", f"{name}, weights in bf16", weights.buffer.nbytes / 2**30, "GiB")]
    for what, work in ways.items():
        seconds = min(_timed(work) for _ in range(3))
        figures.append(Figure("gpu", f"{name}, weights: {what}", seconds, "s"))
    return figures
