"""The generator's log-probabilities against the trainer's, on the same weights and tokens."""

from __future__ import annotations

import asyncio
import copy

import numpy as np
import pytest
import torch

from grpo.engines.base import Limits
from grpo.engines.torch.engine import TorchEngine
from grpo.learner.batch import samples_of
from grpo.learner.logprobs import TokenLogprobs
from grpo.types import Batch, Group, Problem, Prompt, SamplingParams


async def sample_groups(model, temperature):
    engine = TorchEngine(copy.deepcopy(model), stop_token_ids=(1, 2), limits=Limits(9, 12, 9))
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(i, Problem("?", "!"), rng.integers(3, 60, size=length)) for i, length in enumerate([2, 9, 1, 5, 5])
    ]

    async def group(prompt):
        params = SamplingParams(n=3, temperature=temperature, max_tokens=12, seed=prompt.serial)
        completions = await engine.generate(prompt.token_ids, params)
        return Group(prompt, completions, None, (1.0, 0.5, 0.0), (1.0, 0.1, -1.0), oldest_version=0)

    try:
        return await asyncio.gather(*map(group, prompts))
    finally:
        await engine.close()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_trainer_and_generator_agree_token_by_token(model, make_learner, temperature):
    groups = await sample_groups(model, temperature)
    samples = [sample for group in groups for sample in samples_of(group)]
    with torch.no_grad():
        trainer_N, _ = TokenLogprobs(model, temperature)(samples)
    gap_N = (trainer_N - torch.tensor(np.concatenate([sample.behavior_logprobs for sample in samples]))).abs()
    assert len(gap_N) > 50
    assert float(gap_N.max()) < 1e-4

    metrics = make_learner(temperature=temperature, micro_batch_tokens=64).train_step(Batch(groups))
    assert metrics["mismatch/logprob_abs_diff_same_version"] < 1e-4
    assert metrics["mismatch/logprob_abs_diff"] < 1e-4
    assert metrics["trainer/ratio_mean"] == pytest.approx(1, abs=1e-4)
    assert metrics["trainer/clip_fraction"] == 0


async def test_a_wrong_temperature_shows_in_the_mismatch(model, make_learner):
    groups = await sample_groups(model, temperature=0.7)
    assert make_learner(temperature=1.0).train_step(Batch(groups))["mismatch/logprob_abs_diff_same_version"] > 0.01
