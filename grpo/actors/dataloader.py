"""The actor that serves prompts: every problem once per epoch, shuffled by the seed."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from grpo.config.schema import RunConfig
from grpo.models.tokenizer import load_tokenizer
from grpo.tasks.base import PromptEncoder, make_task
from grpo.types import Ints, Prompt, PromptBatch


class Dataloader:
    """Serves an endless stream of prompts, in which a prompt is a function of the seed and its serial.

    It has no state: the driver knows which serial is next, so a replacement process continues where the old one died.

    Example:
        batch = await dataloader.sample(start=0, count=16)
        later = await dataloader.sample(batch.next_serial, 16)
        assert await dataloader.prompt(batch.prompts[3].serial) == batch.prompts[3]
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    async def setup(self) -> None:
        config = self._config
        self._task = make_task(config.task)
        self._problems = self._task.problems("train")  # before the tokenizer: a task may create the model
        tokenizer = load_tokenizer(config.model, text_only=True)
        self._encoder = PromptEncoder(tokenizer, config.task, config.rollout.max_prompt_tokens)
        self._encoder.check_usable(self._task)
        self._order = lru_cache(maxsize=2)(self._permutation)
        self._draws = lru_cache(maxsize=2)(self._random_numbers)

    async def sample(self, start: int, count: int, left_out: Collection[int] = frozenset()) -> PromptBatch:
        """Return the next `count` prompts from serial `start` on.

        Skips prompts over the length limit, and problems whose index is in `left_out` unless the seed has this
        occurrence revisited.
        """
        prompts: list[Prompt] = []
        left_out_serials: list[int] = []
        serial = start
        while len(prompts) < count:
            if self._problem_index(serial) in left_out and not self._is_revisit(serial):
                left_out_serials.append(serial)
            elif (prompt := self._prompt(serial)) is not None:
                prompts.append(prompt)
            serial += 1
        return PromptBatch(tuple(prompts), next_serial=serial, left_out=tuple(left_out_serials))

    async def prompt(self, serial: int) -> Prompt:
        """Return the prompt with this serial. Raises KeyError if it is over the length limit."""
        if (prompt := self._prompt(serial)) is None:
            raise KeyError(serial)
        return prompt

    async def held_out(self, count: int) -> list[Prompt]:
        """Return the first held-out prompts within the length limit, at most `count`; the same at every call."""
        return self._held_out(count)[0]

    async def stats(self) -> dict[str, int]:
        """Return the number of problems per epoch, and of held-out problems skipped for their length."""
        _, skipped = self._held_out(self._config.eval.prompts)
        return {"problems": len(self._problems), "held_out_skipped_length": skipped}

    def _prompt(self, serial: int) -> Prompt | None:
        index = self._problem_index(serial)
        token_ids = self._encoder.encode(self._problems[index])
        return None if token_ids is None else Prompt(serial, self._problems[index], token_ids, index)

    def _problem_index(self, serial: int) -> int:
        """Return the problem at this place of the stream: every epoch is a permutation that follows from the seed."""
        epoch, place = divmod(serial, len(self._problems))
        return int(self._order(epoch)[place])

    def _permutation(self, epoch: int) -> Ints:
        return np.random.default_rng([self._config.seed, epoch]).permutation(len(self._problems))

    def _is_revisit(self, serial: int) -> bool:
        """Draw whether a problem that is left out is revisited here: a function of the seed and the serial."""
        epoch, place = divmod(serial, len(self._problems))
        return bool(self._draws(epoch)[place] < self._config.dataloader.revisit_fraction)

    def _random_numbers(self, epoch: int) -> NDArray[np.float64]:
        """Draw a number in [0, 1) for every place of an epoch; the 1 makes the draws independent of its order."""
        return np.random.default_rng([self._config.seed, epoch, 1]).random(len(self._problems))

    def _held_out(self, count: int) -> tuple[list[Prompt], int]:
        """Return up to `count` prompts, and how many were skipped on the way."""
        prompts: list[Prompt] = []
        skipped = 0
        for serial, problem in enumerate(self._task.problems("held_out")):
            if len(prompts) == count:
                break
            if (token_ids := self._encoder.encode(problem)) is None:
                skipped += 1
            else:
                prompts.append(Prompt(serial, problem, token_ids))
        return prompts, skipped
