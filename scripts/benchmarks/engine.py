"""Tokens per second of the embedded engine against `model.generate`, with completions of even and of ragged lengths."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.figures import Figure
from grpo.config import ModelConfig
from grpo.engines.base import Limits
from grpo.engines.torch_engine import TorchEngine
from grpo.models.loading import load_model
from grpo.models.smollm2 import prepare
from grpo.models.tiny import tiny_llama
from grpo.types import SamplingParams

GROUP = 8
PROMPT_TOKENS = 32
EVEN_TOKENS = 32
MEAN_TOKENS, MOST_TOKENS = 32, 256
BATCHES = 3  # of as many sequences as run at once
EOS, PAD = 1, 0


@dataclass(frozen=True)
class Case:
    """`sequences` at a time; ragged ones end by chance."""

    model: str
    sequences: int
    ragged: bool

    @property
    def most_tokens(self) -> int:
        return MOST_TOKENS if self.ragged else EVEN_TOKENS

    def __str__(self) -> str:
        return f"{self.model}, {'ragged' if self.ragged else 'even'}, {self.sequences} sequences"


def run(quick: bool) -> list[Figure]:
    figures = []
    for name in ("tiny",) if quick else ("tiny", "SmolLM2"):
        model = _model(name)
        for sequences in (64,) if quick else (8, 32, 64, 128):
            for ragged in (False, True):
                figures += _compare(model, Case(name, sequences, ragged), rounds=2 if quick else 3)
    return figures


def _compare(model: PreTrainedModel, case: Case, rounds: int) -> list[Figure]:
    """Rounds alternate, so that a slow moment of the machine meets both."""
    ending = model.register_forward_hook(_ends_by_chance(case), with_kwargs=True)
    try:
        ours, theirs = [], []
        for _ in range(rounds + 1):
            ours.append(asyncio.run(_engine_tokens_per_s(model, case)))
            theirs.append(_generate_tokens_per_s(model, case))
    finally:
        ending.remove()
    best, reference = max(ours[1:]), max(theirs[1:])  # the first of each warms up
    target = (1.8 if case.ragged else 1.0) if case.sequences == 64 else None
    return [
        Figure("engine", f"{case}: embedded engine", best, "tokens/s"),
        Figure("engine", f"{case}: over model.generate", best / reference, at_least=target),
    ]


def _model(name: str) -> PreTrainedModel:
    if name == "tiny":
        torch.manual_seed(0)
        return tiny_llama().eval()
    return load_model(ModelConfig(path=str(prepare(None))), torch.float32, "cpu")  # type: ignore[arg-type]


def _ends_by_chance(case: Case) -> Any:
    """A forward hook that gives the end of a sequence the same chance at every token, or none at all."""
    logit = np.log(1 / (MEAN_TOKENS - 1)) if case.ragged else -np.inf

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        logits = output.logits
        logits[..., EOS] = -torch.inf
        if case.ragged:
            logits[..., EOS] = torch.logsumexp(logits, dim=-1) + logit
        return output

    return hook


async def _engine_tokens_per_s(model: PreTrainedModel, case: Case) -> float:
    limits = Limits(PROMPT_TOKENS, case.most_tokens, case.sequences)
    engine = TorchEngine(model, stop_token_ids=[EOS], limits=limits, threads=os.cpu_count() or 1)
    groups = deque(range(BATCHES * case.sequences // GROUP))
    tokens = 0

    async def rollouts() -> None:
        nonlocal tokens
        while groups:
            seed = groups.popleft()
            params = SamplingParams(n=GROUP, max_tokens=case.most_tokens, seed=seed)
            completions = await engine.generate(_prompt(seed), params)
            tokens += sum(len(completion.token_ids) for completion in completions)

    try:
        began = time.perf_counter()
        await asyncio.gather(*(rollouts() for _ in range(case.sequences // GROUP)))
        return tokens / (time.perf_counter() - began)
    finally:
        await engine.close()


def _generate_tokens_per_s(model: PreTrainedModel, case: Case) -> float:
    """Batch after batch of as many sequences as the engine runs at once."""
    torch.set_num_threads(os.cpu_count() or 1)
    tokens, began = 0, time.perf_counter()
    for batch in range(BATCHES):
        seeds = range(batch * case.sequences // GROUP, (batch + 1) * case.sequences // GROUP)
        prompts = torch.tensor(np.stack([_prompt(seed) for seed in seeds])).repeat_interleave(GROUP, dim=0)
        with torch.inference_mode():
            made = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                max_new_tokens=case.most_tokens,
                eos_token_id=EOS,
                pad_token_id=PAD,
            )
        new = made[:, PROMPT_TOKENS:]
        ended = (new == EOS).int()
        tokens += int(((ended.cumsum(dim=1) - ended) == 0).sum())  # up to the end, that included
    return tokens / (time.perf_counter() - began)


def _prompt(seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(3, 70, PROMPT_TOKENS)
