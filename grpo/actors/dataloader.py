"""Hands out prompts: shuffled by the seed, epoch after epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from grpo.config import RunConfig
from grpo.models.tokenizer import load_tokenizer
from grpo.tasks.base import make_task
from grpo.tasks.encoding import PromptEncoder
from grpo.types import Problem, Prompt


class Dataloader:
    """One process; calls are answered in order. Prompts come in bulk, so that a group costs a fraction of a call."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._handed_out = 0
        self.counts: Counter[str] = Counter()

    async def setup(self) -> None:
        config = self._config
        self._task = make_task(config.task)
        tokenizer = load_tokenizer(config.model)
        self._encoder = PromptEncoder(tokenizer, config.task, config.rollout.max_prompt_tokens)
        self._encoder.check_usable(self._task)
        self._stream = self._prompts()

    async def sample(self, count: int) -> list[Prompt]:
        """The next prompts of the endless stream. Those over the length limit are skipped and counted."""
        return [next(self._stream) for _ in range(count)]

    async def held_out(self, count: int) -> list[Prompt]:
        """The first held-out prompts under the length limit, at most `count`, always the same ones.

        Those skipped for their length are counted once, however often they are asked for.
        """
        prompts: list[Prompt] = []
        skipped = 0
        for serial, problem in enumerate(self._task.problems("held_out")):
            if len(prompts) == count:
                break
            if (token_ids := self._encoder.encode(problem)) is None:
                skipped += 1
            else:
                prompts.append(Prompt(serial, problem, token_ids))
        self.counts["held_out_skipped_length"] = max(self.counts["held_out_skipped_length"], skipped)
        return prompts

    async def stats(self) -> dict[str, int]:
        """Prompts handed out, skipped for their length, of training and held out, and epochs begun."""
        return {"handed_out": self._handed_out, **self.counts}

    async def close(self) -> None:
        """Nothing to end."""

    def _prompts(self) -> Iterator[Prompt]:
        for problem in self._problems():
            token_ids = self._encoder.encode(problem)
            if token_ids is None:
                self.counts["skipped_length"] += 1
                continue
            self._handed_out += 1
            yield Prompt(self._handed_out - 1, problem, token_ids)

    def _problems(self) -> Iterator[Problem]:
        """Every problem once per epoch, each epoch in an order of its own that follows from the seed."""
        problems = self._task.problems("train")
        while True:
            order = np.random.default_rng([self._config.seed, self.counts["epochs"]]).permutation(len(problems))
            self.counts["epochs"] += 1
            for i in order:
                yield problems[i]
