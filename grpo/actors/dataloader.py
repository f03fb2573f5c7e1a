"""Hands out prompts: shuffled by the seed, epoch after epoch."""

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
    """One process that remembers nothing: the stream of prompts is a function of the seed, a prompt of its serial.

    So the driver's ledger alone says what comes next, and a new process goes on where the old one died. Prompts come
    in bulk: a group costs a fraction of a call.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    async def setup(self) -> None:
        config = self._config
        self._task = make_task(config.task)
        self._problems = self._task.problems("train")  # first: it may be made with a model of the user's
        tokenizer = load_tokenizer(config.model, text_only=True)
        self._encoder = PromptEncoder(tokenizer, config.task, config.rollout.max_prompt_tokens)
        self._encoder.check_usable(self._task)
        self._order = lru_cache(maxsize=2)(self._permutation)
        self._draws = lru_cache(maxsize=2)(self._random_numbers)

    async def sample(self, start: int, count: int, left_out: Collection[int] = frozenset()) -> PromptBatch:
        """The next `count` prompts of the endless stream from place `start` on, without those over the length limit.

        And without problems whose index is in `left_out`, except where the seed wants them revisited.
        """
        prompts: list[Prompt] = []
        passed_over: list[int] = []
        serial = start
        while len(prompts) < count:
            if self._problem_index(serial) in left_out and not self._is_revisit(serial):
                passed_over.append(serial)
            elif (prompt := self._prompt(serial)) is not None:
                prompts.append(prompt)
            serial += 1
        return PromptBatch(tuple(prompts), next_serial=serial, left_out=tuple(passed_over))

    async def prompt(self, serial: int) -> Prompt:
        """The prompt that was handed out under this serial. Raises KeyError for one over the length limit."""
        if (prompt := self._prompt(serial)) is None:
            raise KeyError(serial)
        return prompt

    async def held_out(self, count: int) -> list[Prompt]:
        """The first held-out prompts under the length limit, at most `count`, always the same ones."""
        return self._held_out(count)[0]

    async def stats(self) -> dict[str, int]:
        """Problems of an epoch, and held-out ones that were skipped for their length."""
        _, skipped = self._held_out(self._config.eval.prompts)
        return {"problems": len(self._problems), "held_out_skipped_length": skipped}

    def _prompt(self, serial: int) -> Prompt | None:
        index = self._problem_index(serial)
        token_ids = self._encoder.encode(self._problems[index])
        return None if token_ids is None else Prompt(serial, self._problems[index], token_ids, index)

    def _problem_index(self, serial: int) -> int:
        """Every problem once per epoch, each epoch in an order of its own that follows from the seed."""
        epoch, place = divmod(serial, len(self._problems))
        return int(self._order(epoch)[place])

    def _permutation(self, epoch: int) -> Ints:
        return np.random.default_rng([self._config.seed, epoch]).permutation(len(self._problems))

    def _is_revisit(self, serial: int) -> bool:
        """Whether a problem that is left out has its turn at this place all the same: a draw of the seed and serial."""
        epoch, place = divmod(serial, len(self._problems))
        return bool(self._draws(epoch)[place] < self._config.dataloader.revisit_fraction)

    def _random_numbers(self, epoch: int) -> NDArray[np.float64]:
        """One in [0, 1) for every place of an epoch. The 1 keeps them apart from the numbers behind its order."""
        return np.random.default_rng([self._config.seed, epoch, 1]).random(len(self._problems))

    def _held_out(self, count: int) -> tuple[list[Prompt], int]:
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
