"""The actor that scores completions with the configured reward functions: one replica of the reward service."""

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
    """Computes the weighted sum of the reward functions in `reward.workers` processes, each one group at a time.

    User code that hangs, crashes or exceeds its memory costs only its process, which is replaced.
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
        """Start the processes. Raises ConfigError for a reward function or task that can't be created."""
        self._tokenizer = load_tokenizer(self._config.model, text_only=True)
        await self._scorer.start()

    @batched
    async def score(self, prompt: Prompt, completions: Sequence[Completion], detail: Detail = "rewards") -> Scores:
        """Return the scores of one group, with its texts and tokens if `detail` asks for them.

        Raises RewardError when a function raises, or a subclass: RewardTimeout, RewardCrash, RewardMemory,
        RewardInvalid. Notes on the error contain the traceback of the user's code.
        """
        texts = await asyncio.to_thread(self._decode, completions)
        started_s = time.perf_counter()
        parts = await self._scorer.call(prompt.problem, texts)
        measure("reward/score_s", time.perf_counter() - started_s, "percentiles")
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
        """Kill the processes, whatever runs in them."""
        await self._scorer.close()

    def _decode(self, completions: Sequence[Completion]) -> list[str]:
        return self._tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
