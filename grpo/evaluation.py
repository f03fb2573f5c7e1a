"""Mean reward on held-out prompts."""

from __future__ import annotations

import logging
from statistics import fmean

from grpo.config import RunConfig
from grpo.rollout import sampling_params
from grpo.services import Services
from grpo.structured import together, watchdog
from grpo.types import Prompt, RewardError

log = logging.getLogger(__name__)

_SEED = 1 << 20  # apart from the seeds that training draws with


async def evaluate(services: Services, config: RunConfig) -> float | None:
    """Sample every held-out prompt once with the training's temperature; None when `eval.prompts` is 0.

    Called while no weights move, so one policy version answers all of it. The same prompts and random numbers at
    every call: two evaluations differ by the weights alone. With `reward.on_error=drop` a prompt whose reward fails
    is left out. Raises StalledError after `watchdog.seconds`.
    """
    if config.eval.prompts == 0:
        return None
    async with watchdog(config.watchdog.seconds, "the evaluation"):
        prompts = await services.dataloader.held_out.call_one(config.eval.prompts)
        scores = await together(*(_score(services, config, prompt) for prompt in prompts))
    counted = [score for score in scores if score is not None]
    return fmean(counted) if counted else None


async def _score(services: Services, config: RunConfig, prompt: Prompt) -> float | None:
    completions, _ = await services.generator.generate.route(
        prompt, sampling_params(config.rollout, _SEED, prompt, n=1)
    )
    try:
        scores = await services.reward.score.route(prompt, completions)
    except RewardError as error:
        if config.reward.on_error == "fail":
            raise
        log.warning("left out of the evaluation: %s", error)
        return None
    return fmean(scores.rewards)
