"""The held-out reward of models that were kept during a training, sampled with the engine of this framework."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from benchmarks.peer_case import COMPLETIONS, THREADS, Case
from grpo.config.actors import ModelConfig
from grpo.config.algorithm import TaskConfig
from grpo.engines.base import Limits
from grpo.engines.torch.engine import TorchEngine
from grpo.models.loading import load_model, stop_token_ids
from grpo.models.tokenizer import load_tokenizer
from grpo.tasks.base import Task, make_task
from grpo.types import Problem, SamplingParams

_SEQUENCES = 256


def held_out_rewards(case: Case, saved: Mapping[int, Path], until: float) -> dict[int, float]:
    """By step, 0 for the model that the training began with, up to the first that reaches `until`; at the temperature
    of the training."""
    task = make_task(TaskConfig(case.task))
    models = {0: Path(case.model), **saved}
    rewards: dict[int, float] = {}
    for step in sorted(models):
        rewards[step] = asyncio.run(_reward(case, task, models[step]))
        if rewards[step] >= until:
            break
    return rewards


async def _reward(case: Case, task: Task, model: Path) -> float:
    loaded = load_model(ModelConfig(path=str(model)), torch.float32, "cpu")
    tokenizer = load_tokenizer(ModelConfig(path=case.model))
    problems = task.problems("held_out")
    prompts = [np.array(tokenizer.encode(problem.question)) for problem in problems]
    engine = TorchEngine(
        loaded,
        stop_token_ids=stop_token_ids(loaded, tokenizer),
        limits=Limits(max(map(len, prompts)), case.most_tokens, _SEQUENCES),
        threads=THREADS,
    )

    async def score(number: int) -> float:
        params = SamplingParams(n=COMPLETIONS, max_tokens=case.most_tokens, seed=number)
        completions = await engine.generate(prompts[number], params)
        texts = [tokenizer.decode(made.token_ids, skip_special_tokens=True) for made in completions]
        return _mean_score(task, problems[number], texts)

    try:
        return fmean(await asyncio.gather(*(score(number) for number in range(len(problems)))))
    finally:
        await engine.close()


def _mean_score(task: Task, problem: Problem, texts: Sequence[str]) -> float:
    return fmean(task.score(problem, text) for text in texts)
