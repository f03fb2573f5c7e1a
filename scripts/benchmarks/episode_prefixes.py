"""Episodes of several turns on the torch engine: what a sampled token costs, beside one turn with as many tokens.

Each turn's prompt is everything before it. With reuse a turn reads only the last reply, without it all of its prompt.
The replies are ready at once, so that only the engine is measured.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.figures import Figure
from grpo.config.actors import ModelConfig
from grpo.engines.base import Limits
from grpo.engines.torch.engine import TorchEngine
from grpo.models.loading import load_model
from grpo.models.smollm2 import prepare
from grpo.types import Ints, SamplingParams
from grpo.utils.torch_utils import run_in_temp_thread

THREADS = os.cpu_count() or 1
TURNS = 8
AT_MOST = 1.3


@dataclass(frozen=True)
class Case:
    """A group of episodes of `TURNS` turns, all turns and all replies of equal length."""

    episodes: int
    prompt_tokens: int
    turn_tokens: int
    reply_tokens: int

    @property
    def sampled(self) -> int:
        return TURNS * self.turn_tokens

    @property
    def limits(self) -> Limits:
        given = (TURNS - 1) * self.reply_tokens
        return Limits(self.prompt_tokens, self.sampled + given, self.episodes, several_turns=True)

    def __str__(self) -> str:
        return f"SmolLM2, {self.episodes} episodes, turns of {self.turn_tokens} tokens, replies of {self.reply_tokens}"


def run(quick: bool) -> list[Figure]:
    model = asyncio.run(run_in_temp_thread(THREADS, _load))
    cases = [Case(4, 64, 16, 16)] if quick else [Case(8, 64, 32, 32), Case(1, 64, 32, 32)]
    return [figure for case in cases for figure in _compare(model, case, rounds=2 if quick else 3)]


def _load() -> PreTrainedModel:
    return load_model(ModelConfig(path=str(prepare(None))), torch.float32, "cpu")  # type: ignore[arg-type]


def _compare(model: PreTrainedModel, case: Case, rounds: int) -> list[Figure]:
    """Measure in alternating rounds, of which the first is a warm-up."""
    took: dict[str, list[float]] = {"one turn": [], "reused": [], "read again": []}
    for _ in range(rounds):
        took["one turn"].append(asyncio.run(_seconds(model, case, turns=1, reuse=False)))
        took["reused"].append(asyncio.run(_seconds(model, case, turns=TURNS, reuse=True)))
        took["read again"].append(asyncio.run(_seconds(model, case, turns=TURNS, reuse=False)))
    alone = took["one turn"][1:]
    over = {side: float(np.median(np.divide(took[side][1:], alone))) for side in ("reused", "read again")}
    speed = case.episodes * case.sampled / min(alone)
    return [
        Figure("episodes", f"{case}: one turn as long as {TURNS}", speed, "tokens/s"),
        Figure("episodes", f"{case}: {TURNS} turns over one, prefixes reused", over["reused"], at_most=AT_MOST),
        Figure("episodes", f"{case}: {TURNS} turns over one, prefixes read again", over["read again"]),
    ]


async def _seconds(model: PreTrainedModel, case: Case, *, turns: int, reuse: bool) -> float:
    """Measure until every episode has sampled its tokens, in so many turns."""
    size_mb = 1024.0 if reuse else 0.0
    engine = TorchEngine(model, stop_token_ids=(), limits=case.limits, threads=THREADS, prefix_cache_mb=size_mb)
    params = SamplingParams(n=case.episodes, max_tokens=case.sampled // turns, keep_prefix=turns > 1)
    prompt = _tokens(case.prompt_tokens)
    try:
        began = time.perf_counter()
        first = await engine.generate(prompt, params)
        so_far = [np.concatenate([prompt, completion.token_ids]) for completion in first]
        await asyncio.gather(*(_go_on(engine, so_far[i], params, i, case.reply_tokens, turns) for i in range(params.n)))
        return time.perf_counter() - began
    finally:
        await engine.close()


async def _go_on(
    engine: TorchEngine, so_far: Ints, params: SamplingParams, episode: int, reply_tokens: int, turns: int
) -> None:
    for turn in range(1, turns):
        prompt = np.concatenate([so_far, _tokens(reply_tokens)])
        later = replace(params, n=1, first_sample=episode, first_token=turn * params.max_tokens)
        [completion] = await engine.generate(prompt, later)
        so_far = np.concatenate([prompt, completion.token_ids])


def _tokens(count: int) -> Ints:
    return np.random.default_rng(count).integers(100, 1000, count)
