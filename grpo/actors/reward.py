"""Scores completions with the configured reward functions. One replica of the reward service."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence

from grpo.actors.marks import batched
from grpo.config.schema import RunConfig
from grpo.models.tokenizer import load_tokenizer, tokens_as_json
from grpo.rewards.process_pool import ProcessPool
from grpo.tasks.scoring import Parts, Scorer
from grpo.telemetry.recording import measure
from grpo.types import Completion, Detail, Prompt, Scores


class Reward:
    """The weighted sum of reward functions, which run in `reward.workers` processes, a group at a time in each.

    User code that hangs, crashes or takes too much memory costs its process, which is replaced, and holds up nobody.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        reward = config.reward
        self._scorer: ProcessPool[Parts] = ProcessPool(
            Scorer,
            (config.task, tuple(reward.functions)),
            workers=reward.workers,
            timeout_s=reward.timeout_s,
            memory_gb=reward.memory_gb,
        )

    async def setup(self) -> None:
        """Start the processes. Raises ConfigError for a reward or a task that can't be made."""
        self._tokenizer = load_tokenizer(self._config.model, text_only=True)
        await self._scorer.start()

    @batched
    async def score(self, prompt: Prompt, completions: Sequence[Completion], detail: Detail = "rewards") -> Scores:
        """Scores of one group, with its texts and tokens where `detail` asks for them.

        Raises RewardError when a function raises, and its subclasses RewardTimeout, RewardCrash, RewardMemory and
        RewardInvalid; their notes hold the traceback of user code.
        """
        texts = await asyncio.to_thread(self._decode, completions)
        asked_s = time.perf_counter()
        parts = await self._scorer.call(prompt.problem, texts)
        measure("reward/score_s", time.perf_counter() - asked_s, "percentiles")
        weights = [self._config.reward.functions[name] for name in parts]
        rewards = tuple(
            sum(map(math.prod, zip(weights, scores, strict=True))) for scores in zip(*parts.values(), strict=True)
        )
        return Scores(
            rewards,
            parts,
            texts=() if detail == "rewards" else tuple(texts),
            tokens=await asyncio.to_thread(tokens_as_json, self._tokenizer, completions) if detail == "tokens" else "",
        )

    async def close(self) -> None:
        """End the processes, whatever runs in them."""
        await self._scorer.close()

    def _decode(self, completions: Sequence[Completion]) -> list[str]:
        return self._tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
