"""Sorting of a few letters, the task of the default experiment: the answer to `dbca>` is `abcd`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from grpo.errors import ConfigError
from grpo.tasks.base import Split
from grpo.types import Problem

ALPHABET = "abcdefghijkl"


class Sorting:
    """Distinct random strings of `min_letters` to `max_letters` different letters. The sorted string has reward 1."""

    def __init__(
        self,
        min_letters: int = 3,
        max_letters: int = 6,
        train_size: int = 4000,
        held_out_size: int = 256,
        seed: int = 0,
    ) -> None:
        wanted, lengths = train_size + held_out_size, range(min_letters, max_letters + 1)
        possible = sum(math.perm(len(ALPHABET), length) for length in lengths)
        if max_letters > len(ALPHABET) or wanted > possible:
            raise ConfigError(
                f"there are {possible} strings of {min_letters} to {max_letters} different letters out of {ALPHABET}, "
                f"but train_size + held_out_size is {wanted}; lower one of them, or allow longer strings",
                key="task.args",
            )
        rng = np.random.default_rng(seed)
        questions: dict[str, None] = {}  # a set that keeps its order
        while len(questions) < wanted:
            length = int(rng.integers(min_letters, max_letters + 1))
            questions["".join(rng.choice(list(ALPHABET), size=length, replace=False)) + ">"] = None
        problems = [Problem(question, answer="".join(sorted(question[:-1]))) for question in questions]
        self._splits = {"held_out": problems[:held_out_size], "train": problems[held_out_size:]}

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._splits[split]

    def score(self, problem: Problem, completion: str) -> float:
        return float(completion == problem.answer)

    def demonstration(self, problem: Problem, rng: np.random.Generator) -> str:
        """Return one of three answers, of which one is right.

        A model trained on these can sort, but does so a third of the time, so its reward can rise.
        """
        answers = (problem.answer, problem.answer[::-1], problem.question[:-1])
        return answers[int(rng.integers(len(answers)))]
