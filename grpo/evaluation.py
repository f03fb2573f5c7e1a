"""Mean reward on held-out prompts."""

from __future__ import annotations

from statistics import fmean

from grpo.config import RunConfig
from grpo.rollout import sampling_params
from grpo.services import Services
from grpo.structured import together
from grpo.types import Prompt

_SEED = 1 << 20  # apart from the seeds that training draws with


async def evaluate(services: Services, config: RunConfig) -> float | None:
    """Sample every held-out prompt once with the training's temperature; None when `eval.prompts` is 0.

    Called while no weights move, so one policy version answers all of it. The same prompts and random numbers at
    every call: two evaluations differ by the weights alone.
    """
    if config.eval.prompts == 0:
        return None
    prompts = await services.dataloader.held_out.call_one(config.eval.prompts)
    return fmean(await together(*(_score(services, config, prompt) for prompt in prompts)))


async def _score(services: Services, config: RunConfig, prompt: Prompt) -> float:
    completions, _ = await services.generator.generate.route(
        prompt, sampling_params(config.rollout, _SEED, prompt, n=1)
    )
    scores = await services.reward.score.route(prompt, completions)
    return fmean(scores.rewards)
